"""stages/modelfile/stage.py: create.json, the parameters, and a run of the stage."""

import json
from dataclasses import replace

import pytest
from support.fakes.ollama import write_gguf
from support.models.chat_templates import CHATML, FACTS

from tutor.artifacts.stage_folder import writing
from tutor.errors import ArtifactError
from tutor.prompt.template_analysis import analyse_template
from tutor.prompt.tutor_format import GO_TEMPLATE, STOPS
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe
from tutor.stages.modelfile import stage
from tutor.stages.modelfile.parse import parse
from tutor.stages.modelfile.render import render
from tutor.stages.modelfile.stage import create_body, ollama_parameters, stop_texts

AUTO = '[generate]\nmax_new_tokens = "auto"\n'


def test_empty_system_gives_no_instruction_and_no_field(build, spec):
    assert "SYSTEM" not in render(spec, build / "model")
    assert create_body(spec, {spec.gguf: "sha256:0"}).keys() == {"files", "template", "parameters"}


def test_create_body_has_the_content_of_the_modelfile(build, spec):
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


def test_repetition_penalty_covers_the_context():
    parameters = ollama_parameters(Recipe().generate.model_dump(), 7, STOPS)
    assert parameters["repeat_last_n"] == parameters["num_ctx"] == 4096
    assert parameters["repeat_penalty"] == 1.15
    assert parameters["seed"] == 7


def test_without_a_template_the_gguf_has_the_one_to_serve(build, spec):
    own = replace(spec, template="", parameters=ollama_parameters(Recipe().generate.model_dump(), 7, ()))
    assert not {"TEMPLATE", "PARSER", "stop"} & set(render(own, build / "model").replace("\n", " ").split())
    body = create_body(own, {own.gguf: "sha256:0"})
    assert "template" not in body
    assert "stop" not in body["parameters"]


@pytest.mark.parametrize(
    ("tokens", "end_id", "stops"),
    [(("<eos>", "<turn>"), 0, ()), (("<eos>", "<|im_end|>"), 1, ("<|im_end|>",)), (("<eos>", "<turn>"), 1, None)],
    ids=["EOS", "known to llama.cpp", "neither"],
)
def test_token_that_ends_a_turn_is_a_stop_where_it_is_not_eos(tmp_path, tokens, end_id, stops):
    gguf = tmp_path / "a.gguf"
    write_gguf(gguf, tokens=tokens)
    prompt = replace(analyse_template(CHATML, FACTS, where="base", reasoning="none"), end_id=end_id)
    if stops is not None:
        assert stop_texts(prompt, gguf) == stops
        return
    with pytest.raises(ArtifactError, match="does not end answers at '<turn>', which ends a turn"):
        stop_texts(prompt, gguf)


def test_run_writes_modelfile_and_equal_create_json(build, tmp_path):
    settings = ('system = "Eres un tutor."', "seed = 7", '[ollama]\nmodel = "mi-tutor"', AUTO)
    (tmp_path / "r.toml").write_text("\n".join(settings), "utf-8")
    with writing(build / "train", "train", {}) as (_, results):
        results["longest_answer"] = {"tokens": 333, "line": 1}
    recipe = read_recipe(tmp_path / "r.toml")
    (build / "model").mkdir()
    summary = stage.run(
        recipe,
        {name: build / name.replace("convert", "gguf") for name in ("base", "train", "convert", "ladder")},
        build / "model",
    )
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
    assert parsed.parameters["num_predict"] == 370
    assert summary["model"] == "mi-tutor"
    assert summary["parameters"] == create["parameters"]
