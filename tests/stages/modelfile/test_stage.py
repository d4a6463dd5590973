import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tutor.errors import ArtifactError, RecipeError
from tutor.prompt import GO_TEMPLATE, STOPS
from tutor.recipe.settings import read_recipe
from tutor.stages.modelfile import stage as modelfile
from tutor.stages.modelfile.parse import parse
from tutor.stages.modelfile.render import render
from tutor.stages.modelfile.spec import ModelSpec, check_spec, representable
from tutor.stages.modelfile.stage import create_body, ollama_parameters

GENERATE = {"max_new_tokens": 515, "temperature": 0.003, "top_p": 0.85, "repetition_penalty": 1.15, "context": 4096}

kept = st.characters(exclude_categories=["C", "Z"]) | st.sampled_from(list(' \t\r\n"""'))
texts = st.lists(kept | st.sampled_from(['"""', '"\n', "\n\n", "[[ x ]]", "{{ .System }}", "# ", "FROM x\n"])).map(
    "".join
)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A build folder with a quantized file, as the convert stage leaves it."""
    folder = tmp_path_factory.mktemp("build")
    (folder / "gguf").mkdir()
    (folder / "gguf" / "tutor-Q4_K_M.gguf").write_bytes(b"GGUF")
    return folder


@pytest.fixture(scope="module")
def spec(build):
    parameters = ollama_parameters(GENERATE, 42, STOPS)
    return ModelSpec("tutor", build / "gguf" / "tutor-Q4_K_M.gguf", GO_TEMPLATE, parameters)


def with_parameter(spec, name, value):
    return replace(spec, parameters={**spec.parameters, name: value})


def test_the_rendered_file_is_this_byte_for_byte(build, spec):
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


def test_the_blank_line_that_ends_a_turn_survives(build, spec):
    assert parse(render(spec, build / "model")).template.endswith("{{ .Response }}\n\n")


def test_an_empty_system_is_no_instruction_and_no_field(build, spec):
    assert "SYSTEM" not in render(spec, build / "model")
    assert create_body(spec, {spec.gguf: "sha256:0"}).keys() == {"files", "template", "parameters"}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('di "hola" ya', 'di "hola" ya'),
        ('"di "hola" ya"', 'di "hola" ya'),
        ('"hola" dijo\nPARAMETER stop "</s>"', 'hola" dijo\nPARAMETER stop "</s>'),
        ('"""a "b"\nc"""', 'a "b"\nc'),
        ('"""dijo "hola""""', 'dijo "hola"'),
        ('"""\na\n"""', "\na\n"),
        ('"""  a  """', "  a  "),
        ("  a  ", "a"),
        ('""', ""),
        ('""""""', ""),
        ("hola # x", "hola # x"),
        ("'a'", "'a'"),
        (r'"a\nb"', r"a\nb"),
        ("a\u00a0b\u200dc\u2028d\u3000e\x07", "abcde"),
        ('"""a\r\nb"""', "a\r\nb"),
        ("▁｜ñ👩🏽\ufe0f", "▁｜ñ👩🏽\ufe0f"),
    ],
)
def test_a_value_is_read_as_ollama_reads_it(written, read):
    assert parse(f"FROM x\nSYSTEM {written}\n").system == read


@pytest.mark.parametrize("written", ['"hola" dijo', '"a "b"\nc"', '"""a"""\nb"""', '"""a"""  \nb"""', '"""""', '"'])
def test_a_value_that_ollama_refuses_is_refused(written):
    with pytest.raises(ArtifactError):
        parse(f"FROM x\nSYSTEM {written}\n")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SYSTEM x",
        "FROM",
        "FROMx y",
        'FROM x\nSYSTEM\n"""y"""',
        "FROM x\nNOTHING y",
        "FROM x\nMESSAGE User hola",
        "FROM x\nMESSAGE  user hola",
        "FROM x\nPARAMETER num_ctx",
        "FROM x\nPARAMETER  num_ctx 1",
        "FROM x\nPARAMETER NUM_CTX 1",
        "FROM x\nPARAMETER num_ctx 4096.0",
        "FROM x\nPARAMETER num_ctx 9223372036854775808",
        "FROM x\nPARAMETER seed 1 # x",
        "FROM x\nPARAMETER temperature cold",
        "FROM x\nPARAMETER temperature 3.5e38",
        "FROM x\nPARAMETER use_mmap yes",
        "FROM x\nPARAMETER tfs_z 1",
    ],
)
def test_a_file_that_ollama_refuses_is_refused(text):
    with pytest.raises(ArtifactError):
        parse(text)


def test_of_repeated_instructions_the_last_counts_and_lists_grow():
    parsed = parse(
        "\ufeff # a comment\rfrom a.gguf\r\nFROM b.gguf\nSystem uno\nSYSTEM dos\nTEMPLATE x\n\u00a0TEMPLATE y\n"
        'PARAMETER stop </s>\nPARAMETER seed 1\nPARAMETER\tstop "b c"\nPARAMETER seed -2\nPARAMETER top_p .5e-1\n'
        "PARAMETER use_mmap F\nLICENSE a\nLICENSE b\nMESSAGE user q: r\nADAPTER l.gguf\nPARSER p\nPARAMETER mirostat 1"
    )
    assert parsed.models == ("a.gguf", "b.gguf")
    assert parsed.adapters == ("l.gguf",)
    assert (parsed.system, parsed.template) == ("dos", "y")
    assert parsed.parameters == {"stop": ["</s>", "b c"], "seed": -2, "top_p": 0.05, "use_mmap": False}
    assert parsed.license == ("a", "b")
    assert parsed.messages == (("user", "q: r"),)
    assert set(parsed.others) == {"parser", "mirostat"}


@given(st.text() | texts)
@example('a"""')
@example('a"""\n')
@example('"""\n')
@example('"""\t \r')
@example('""\n')
@example("a\u00a0b")
@example("\ud800")
def test_representable_says_what_comes_back(text):
    try:
        same = parse(f'FROM x\nSYSTEM """{text}"""\nPARAMETER stop z\n')
    except ArtifactError:
        assert not representable(text)
    else:
        assert representable(text) == (same.system == text and same.parameters == {"stop": ["z"]})


@given(texts, texts, texts, st.floats(0, 2))
def test_what_is_representable_is_rendered_and_read_back(build, spec, system, stop, text, temperature):
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
def test_a_text_that_ollama_would_alter_is_refused_by_name(build, spec, system):
    with pytest.raises(RecipeError, match=r"^system (has U\+|ends line 1)"):
        render(replace(spec, system=system), build / "model")


def test_quotes_and_line_ends_that_ollama_keeps_pass(build, spec):
    system = 'uno """dos""" "tres"\r\n\r\n"""'
    assert parse(render(replace(spec, system=system), build / "model")).system == system


@pytest.mark.parametrize(
    "payload",
    ["[[ 7 * 7 ]]", "{{ 7 * 7 }}", "[% for x in ().__class__.__mro__ %]x[% endfor %]", "[# gone #]", "{{ .System }}"],
)
def test_template_code_in_a_value_is_text(build, spec, payload):
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
def test_a_template_file_that_does_not_fill_is_a_recipe_fault(build, spec, tmp_path, source, why):
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
def test_a_template_file_that_says_something_else_is_refused(build, spec, tmp_path, old, new, name):
    source = (Path(modelfile.__file__).parents[3] / "Modelfile.j2").read_text("utf-8")
    assert old in source
    (tmp_path / "Modelfile.j2").write_text(source.replace(old, new), "utf-8")
    with pytest.raises(ArtifactError, match=name):
        render(replace(spec, system='"a" b '), build / "model", tmp_path / "Modelfile.j2")


def test_a_missing_gguf_is_refused_before_ollama_could_pull_it(build, spec):
    for field, code in (("gguf", 5), ("adapter", 5)):
        with pytest.raises(ArtifactError, match=f"^{field} .*mistyped.gguf is not there") as caught:
            render(replace(spec, **{field: build / "gguf" / "mistyped.gguf"}), build / "model")
        assert caught.value.code == code


def test_a_file_not_called_gguf_or_with_an_odd_path_is_refused(spec, tmp_path):
    for name, error in (("model.bin", ArtifactError), ("a\nb.gguf", RecipeError), ("a\u00a0b.gguf", RecipeError)):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(error):
            check_spec(replace(spec, gguf=tmp_path / name))


@pytest.mark.parametrize(
    ("file", "folder", "written"),
    [
        ("build/model/t.gguf", "build/model", "./t.gguf"),
        ("build/gguf/a b.gguf", "build/model", "../gguf/a b.gguf"),
        ("build/gguf/..t.gguf", "build/gguf", "./..t.gguf"),
        ("elsewhere/t.gguf", "build/model", "{root}/elsewhere/t.gguf"),
    ],
)
def test_from_is_relative_inside_the_build_and_absolute_outside(spec, tmp_path, monkeypatch, file, folder, written):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    for gguf, place in ((Path(file), Path(folder)), (tmp_path / file, tmp_path / folder)):
        line = render(replace(spec, gguf=gguf), place).splitlines()[1]
        assert line == "FROM " + written.format(root=tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("num_ctx", 4096.0, "num_ctx is 4096.0; it must be an integer"),
        ("num_ctx", True, "num_ctx is True; it must be an integer"),
        ("num_ctx", 0, "num_ctx is 0; give it a positive"),
        ("num_predict", 0, "num_predict is 0; give it a positive"),
        ("num_predict", -1, "num_predict is -1; give it a positive"),
        ("seed", 2**63, "must be an integer"),
        ("temperature", "0.1", "temperature is '0.1'; it must be a number"),
        ("temperature", True, "must be a number"),
        ("temperature", float("nan"), "must be a number"),
        ("temperature", float("inf"), "must be a number"),
        ("top_p", 1e39, "must be a number"),
        ("use_mmap", 1, "must be true or false"),
        ("stop", "</s>", "must be non-empty texts"),
        ("stop", [], "must be non-empty texts"),
        ("stop", ["a", ""], "must be non-empty texts"),
        ("stop", ["a\u00a0"], "parameter stop has U+00A0"),
        ("NUM_CTX", 1, "did you mean num_ctx"),
        ("repeat_penality", 1.1, "did you mean repeat_penalty"),
        ("zzz", 1, "known: num_ctx"),
        ("mirostat", 1, "deprecated"),
        ("tfs_z", 1.0, "removed"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name_and_value(spec, name, value, says):
    with pytest.raises(RecipeError, match=re.escape(says)):
        check_spec(with_parameter(spec, name, value))


@pytest.mark.parametrize("name", ["num_ctx", "num_predict"])
def test_ollama_is_never_left_to_choose_context_or_length(spec, name):
    parameters = {key: value for key, value in spec.parameters.items() if key != name}
    with pytest.raises(RecipeError, match=f"{name} is None"):
        check_spec(replace(spec, parameters=parameters))


@pytest.mark.parametrize("value", [0, 1, 1e-05, 1.15, 5e-324, 123456789.0, 1e22, 0.1 + 0.2])
def test_a_number_survives_the_modelfile(build, spec, value):
    assert parse(render(with_parameter(spec, "temperature", value), build / "model")).parameters["temperature"] == value


@pytest.mark.parametrize("value", [True, False])
def test_a_switch_survives_the_modelfile(build, spec, value):
    text = render(with_parameter(spec, "use_mmap", value), build / "model")
    assert f"PARAMETER use_mmap {str(value).lower()}\n" in text


@pytest.mark.parametrize(
    "template",
    [
        "",
        "Instrucción: \nRespuesta:{{ .Response }}",
        "{{ .Prompt }}\nRespuesta:",
        "{{ .Prompt }}\nRespuesta: {{ .Response }}",
        "{{ .Prompt }}\nRespuesta:{{ .Response }}{{ .Response }}",
        "{{ .Response }}{{ .Prompt }}\nRespuesta:",
        "<｜begin▁of▁sentence｜>" + GO_TEMPLATE,
    ],
)
def test_a_template_that_breaks_the_prompt_contract_is_refused(spec, template):
    with pytest.raises(RecipeError, match=r"^template "):
        check_spec(replace(spec, template=template))


def test_bos_text_is_refused_where_the_model_reads_it(spec):
    for changed in ({"system": "<|im_start|>x"}, {"messages": (("user", "<|begin_of_text|>"),)}):
        with pytest.raises(RecipeError, match="BOS"):
            check_spec(replace(spec, **changed))


@pytest.mark.parametrize("name", ["tutor", "Tutor_2.b-c", "_t", "tutor:v1.0", "me/tutor", "host.lan:5000/me/tutor:q4"])
def test_a_name_that_ollama_takes_passes(spec, name):
    check_spec(replace(spec, name=name))


@pytest.mark.parametrize(
    "name",
    [
        *("", "mi tutor", "tutór", "a+b", "-t", "t" * 81, "tutor:", "n.s/tutor", "../t", "a/b/c/d", "tutor\n"),
        *("deepseek-r1", "deepseek-r1:8b", "t:cloud", "t:8b-cloud", "t:local"),
    ],
)
def test_a_name_that_ollama_refuses_or_treats_specially_is_refused(spec, name):
    with pytest.raises(RecipeError, match="model name"):
        check_spec(replace(spec, name=name))


def test_a_message_has_a_role_that_ollama_knows(spec):
    with pytest.raises(RecipeError, match="'User'"):
        check_spec(replace(spec, messages=(("User", "hola"),)))


def test_the_request_says_what_the_modelfile_says(build, spec):
    (build / "lora.gguf").write_bytes(b"GGUF")
    whole = replace(spec, system="Eres.", adapter=build / "lora.gguf", license=("MIT",), messages=(("user", "a: b"),))
    body = create_body(whole, {whole.gguf: "sha256:1", whole.adapter: "sha256:2"})
    parsed = parse(render(whole, build / "model"))
    assert json.loads(json.dumps(body)) == {
        "files": {"tutor-Q4_K_M.gguf": "sha256:1"},
        "adapters": {"lora.gguf": "sha256:2"},
        "template": parsed.template,
        "system": parsed.system,
        "parameters": parsed.parameters,
        "messages": [{"role": "user", "content": "a: b"}],
        "license": ["MIT"],
    }


def test_the_penalty_covers_the_context_as_in_transformers_and_is_not_negative():
    parameters = ollama_parameters(GENERATE, 7, STOPS)
    assert parameters["repeat_last_n"] == parameters["num_ctx"] == 4096
    assert parameters["repeat_penalty"] == 1.15
    assert parameters["seed"] == 7


def test_run_writes_a_modelfile_and_the_same_as_json(build, tmp_path):
    (tmp_path / "r.toml").write_text('system = "Eres un tutor."\nseed = 7\n[ollama]\nmodel = "mi-tutor"\n', "utf-8")
    recipe = read_recipe(tmp_path / "r.toml")
    (build / "model").mkdir()
    summary = modelfile.run(recipe, {"convert": build / "gguf", "ladder": build / "ladder"}, build / "model")
    parsed = parse((build / "model" / "Modelfile").read_bytes().decode())
    create = json.loads((build / "model" / "create.json").read_bytes())
    assert create == {
        "name": "mi-tutor",
        "files": {"tutor-Q4_K_M.gguf": "../gguf/tutor-Q4_K_M.gguf"},
        "template": parsed.template,
        "system": parsed.system,
        "parameters": parsed.parameters,
    }
    assert parsed.template == GO_TEMPLATE
    assert parsed.parameters["stop"] == list(STOPS)
    assert summary["model"] == "mi-tutor"
    assert summary["parameters"] == create["parameters"]
