"""stages/modelfile/stage.py: create.json, the parameters, and a run of the stage."""

import json
from dataclasses import replace

from tutor.prompt.tutor_format import GO_TEMPLATE, STOPS
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe
from tutor.stages.modelfile import stage
from tutor.stages.modelfile.parse import parse
from tutor.stages.modelfile.render import render
from tutor.stages.modelfile.stage import create_body, ollama_parameters


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


def test_run_writes_modelfile_and_equal_create_json(build, tmp_path):
    (tmp_path / "r.toml").write_text('system = "Eres un tutor."\nseed = 7\n[ollama]\nmodel = "mi-tutor"\n', "utf-8")
    recipe = read_recipe(tmp_path / "r.toml")
    (build / "model").mkdir()
    summary = stage.run(
        recipe,
        {name: build / name.replace("convert", "gguf") for name in ("base", "convert", "ladder")},
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
    assert summary["model"] == "mi-tutor"
    assert summary["parameters"] == create["parameters"]
