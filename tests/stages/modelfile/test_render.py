"""stages/modelfile/render.py: the text of a Modelfile, and that it is read back unchanged."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from support.processes.command import ROOT

from tutor.errors import ArtifactError, RecipeError
from tutor.prompt.tutor_format import STOPS
from tutor.stages.modelfile.parse import parse
from tutor.stages.modelfile.render import render
from tutor.stages.modelfile.spec import representable

printable = st.characters(exclude_categories=["C", "Z"]) | st.sampled_from(list(' \t\r\n"""'))


texts = st.lists(printable | st.sampled_from(['"""', '"\n', "\n\n", "[[ x ]]", "{{ .System }}", "# ", "FROM x\n"])).map(
    "".join
)


def test_rendered_file_has_the_expected_bytes(build, spec):
    (build / "lora.gguf").write_bytes(b"GGUF")
    whole = replace(
        spec,
        system='Eres un "tutor" de TypeScript.\nContesta en español.',
        adapter=build / "lora.gguf",
        license=("MIT\n\nSin garantía.", "Llama 3.1"),
        messages=(("user", "¿Qué es any?"), ("assistant", 'Un tipo: "any"')),
    )
    expected = '''\
# rendered by tutor - do not edit
FROM ../gguf/tutor-Q4_K_M.gguf
ADAPTER ../lora.gguf
TEMPLATE """{{ if .System }}{{ .System }}

{{ end }}Instrucción: {{ .Prompt }}
Respuesta:{{ .Response }}

"""
SYSTEM """Eres un "tutor" de TypeScript.
Contesta en español."""
PARAMETER num_ctx 4096
PARAMETER num_predict 515
PARAMETER temperature 0.003
PARAMETER top_p 0.85
PARAMETER top_k 40
PARAMETER repeat_penalty 1.15
PARAMETER repeat_last_n 4096
PARAMETER seed 42
PARAMETER stop """
Instrucción:"""
MESSAGE user """¿Qué es any?"""
MESSAGE assistant """Un tipo: "any""""
LICENSE """MIT

Sin garantía."""
LICENSE """Llama 3.1"""
'''
    assert render(whole, build / "model").encode() == expected.encode()


def test_blank_line_at_the_end_of_a_turn_is_kept(build, spec):
    assert parse(render(spec, build / "model")).template.endswith("{{ .Response }}\n\n")


@given(st.text() | texts)
@example('a"""')
@example('a"""\n')
@example('"""\n')
@example('"""\t \r')
@example('""\n')
@example("a\u00a0b")
@example("\ud800")
def test_representable_predicts_the_result_of_parse(text):
    try:
        same = parse(f'FROM x\nSYSTEM """{text}"""\nPARAMETER stop z\n')
    except ArtifactError:
        assert not representable(text)
    else:
        assert representable(text) == (same.system == text and same.parameters == {"stop": ["z"]})


@given(texts, texts, texts, st.floats(0, 2))
def test_representable_texts_are_rendered_and_read_back(build, spec, system, stop, text, temperature):
    assume(all(map(representable, (system, stop, text))) and stop)
    parameters = {**spec.parameters, "stop": [*STOPS, stop], "temperature": temperature}
    meant = replace(spec, system=system, parameters=parameters, license=(text,), messages=(("user", text),))
    parsed = parse(render(meant, build / "model"))
    assert (parsed.system, parsed.parameters, parsed.license) == (system, parameters, (text,))
    assert parsed.messages == (("user", text),)


@pytest.mark.parametrize(
    "system",
    ['hi"""\nFROM registry.evil/x\nSYSTEM """x', 'ends in """ \r\n', "NBSP\u00a0", "👩\u200d💻", "bell\x07", "\ufeffa"],
)
def test_unrepresentable_system_raises_recipe_error(build, spec, system):
    with pytest.raises(RecipeError, match=r"^system (has U\+|ends line 1)"):
        render(replace(spec, system=system), build / "model")


def test_representable_quotes_and_line_ends_are_kept(build, spec):
    system = 'uno """dos""" "tres"\r\n\r\n"""'
    assert parse(render(replace(spec, system=system), build / "model")).system == system


@pytest.mark.parametrize(
    "payload",
    ["[[ 7 * 7 ]]", "{{ 7 * 7 }}", "[% for x in ().__class__.__mro__ %]x[% endfor %]", "[# gone #]", "{{ .System }}"],
)
def test_template_code_in_a_value_is_not_executed(build, spec, payload):
    assert f'SYSTEM """{payload}"""' in render(replace(spec, system=payload), build / "model")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("FROM [[ modell ]]\n", "'modell' is undefined"),
        ("FROM [[ gguf ]]\nSYSTEM [[ ''.__class__.__mro__ ]]\n", "unsafe"),
        ("FROM [[ gguf", "end of template|expected token"),
        ("[% include 'x' %]", "loader"),
    ],
)
def test_invalid_template_file_raises_recipe_error(build, spec, tmp_path, source, why):
    (tmp_path / "Modelfile.j2").write_text(source)
    with pytest.raises(RecipeError, match=why) as caught:
        render(spec, build / "model", tmp_path / "Modelfile.j2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("[[ gguf ]]", "llama3.1", "FROM"),
        ("FROM [[ gguf ]]", "FROM [[ gguf ]]\nFROM llama3.1", "FROM"),
        ("[[ template | quoted ]]", "[[ template ]]", "no instruction at '{{ end }}"),
        ("[[ system | quoted ]]", '[[ system ]]\n# "', "SYSTEM"),
        ("[% for name", "PARAMETER min_p 0.1\n[% for name", "PARAMETER"),
        ("[% for name", "PARSER passthrough\n[% for name", "others"),
    ],
)
def test_template_file_with_other_content_is_refused(build, spec, tmp_path, old, new, name):
    source = (ROOT / "Modelfile.j2").read_text("utf-8")
    assert old in source
    (tmp_path / "Modelfile.j2").write_text(source.replace(old, new), "utf-8")
    with pytest.raises(ArtifactError, match=name):
        render(replace(spec, system='"a" b '), build / "model", tmp_path / "Modelfile.j2")


def test_missing_gguf_raises_artifact_error(build, spec):
    for field, code in (("gguf", 5), ("adapter", 5)):
        with pytest.raises(ArtifactError, match=f"^{field} .*mistyped.gguf is not there") as caught:
            render(replace(spec, **{field: build / "gguf" / "mistyped.gguf"}), build / "model")
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("file", "folder", "written"),
    [
        ("build/model/t.gguf", "build/model", "./t.gguf"),
        ("build/gguf/a b.gguf", "build/model", "../gguf/a b.gguf"),
        ("build/gguf/..t.gguf", "build/gguf", "./..t.gguf"),
        ("elsewhere/t.gguf", "build/model", "{root}/elsewhere/t.gguf"),
    ],
)
def test_from_is_relative_inside_and_absolute_outside_build(spec, tmp_path, monkeypatch, file, folder, written):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    for gguf, place in ((Path(file), Path(folder)), (tmp_path / file, tmp_path / folder)):
        line = render(replace(spec, gguf=gguf), place).splitlines()[1]
        assert line == "FROM " + written.format(root=tmp_path)


@pytest.mark.parametrize("value", [0, 1, 1e-05, 1.15, 5e-324, 123456789.0, 1e22, 0.1 + 0.2])
def test_number_is_read_back_unchanged(build, spec, value):
    spec = replace(spec, parameters={**spec.parameters, "temperature": value})
    assert parse(render(spec, build / "model")).parameters["temperature"] == value


@pytest.mark.parametrize("value", [True, False])
def test_boolean_is_written_in_lower_case(build, spec, value):
    text = render(replace(spec, parameters={**spec.parameters, "use_mmap": value}), build / "model")
    assert f"PARAMETER use_mmap {str(value).lower()}\n" in text
