"""stages/modelfile/spec.py: each value that Ollama would refuse or alter is refused by name."""

import re
from dataclasses import replace

import pytest

from tutor.errors import ArtifactError, RecipeError
from tutor.prompt.tutor_format import GO_TEMPLATE
from tutor.stages.modelfile.spec import check_spec


def with_parameter(spec, name, value):
    return replace(spec, parameters={**spec.parameters, name: value})


def test_file_with_other_suffix_or_odd_path_is_refused(spec, tmp_path):
    for name, error in (("model.bin", ArtifactError), ("a\nb.gguf", RecipeError), ("a\u00a0b.gguf", RecipeError)):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(error):
            check_spec(replace(spec, gguf=tmp_path / name))


@pytest.mark.parametrize(
    ("name", "value", "message"),
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
def test_wrong_parameter_is_refused_by_name_and_value(spec, name, value, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        check_spec(with_parameter(spec, name, value))


@pytest.mark.parametrize("name", ["num_ctx", "num_predict"])
def test_missing_context_or_length_is_refused(spec, name):
    parameters = {key: value for key, value in spec.parameters.items() if key != name}
    with pytest.raises(RecipeError, match=f"{name} is None"):
        check_spec(replace(spec, parameters=parameters))


@pytest.mark.parametrize(
    "template",
    [
        "Instrucción: \nRespuesta:{{ .Response }}",
        "{{ .Prompt }}\nRespuesta:",
        "{{ .Prompt }}\nRespuesta: {{ .Response }}",
        "{{ .Prompt }}\nRespuesta:{{ .Response }}{{ .Response }}",
        "{{ .Response }}{{ .Prompt }}\nRespuesta:",
        "<｜begin▁of▁sentence｜>" + GO_TEMPLATE,
    ],
)
def test_template_against_the_prompt_contract_is_refused(spec, template):
    with pytest.raises(RecipeError, match=r"^template "):
        check_spec(replace(spec, template=template))


def test_bos_text_in_system_or_message_is_refused(spec):
    for changed in ({"system": "<|im_start|>x"}, {"messages": (("user", "<|begin_of_text|>"),)}):
        with pytest.raises(RecipeError, match="BOS"):
            check_spec(replace(spec, **changed))


@pytest.mark.parametrize("name", ["tutor", "Tutor_2.b-c", "_t", "tutor:v1.0", "me/tutor", "host.lan:5000/me/tutor:q4"])
def test_valid_model_name_passes(spec, name):
    check_spec(replace(spec, name=name))


@pytest.mark.parametrize(
    "name",
    [
        *("", "mi tutor", "tutór", "a+b", "-t", "t" * 81, "tutor:", "n.s/tutor", "../t", "a/b/c/d", "tutor\n"),
        *("deepseek-r1", "deepseek-r1:8b", "t:cloud", "t:8b-cloud", "t:local"),
    ],
)
def test_invalid_or_special_model_name_is_refused(spec, name):
    with pytest.raises(RecipeError, match="model name"):
        check_spec(replace(spec, name=name))


def test_unknown_message_role_is_refused(spec):
    with pytest.raises(RecipeError, match="'User'"):
        check_spec(replace(spec, messages=(("User", "hola"),)))
