"""The modelfile stage: one spec as a Modelfile and as the JSON of Ollama's POST /api/create.

In: the served GGUF file, the Go template and stops of the prompt format, the recipe. Out: `Modelfile` (for people
and `ollama create -f`) and `create.json`, which has the same content. Talks to no server.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutor.artifacts.layout import gguf_name
from tutor.engines.answer_limit import max_new_tokens, with_answer_limit
from tutor.engines.protocol import TOP_K
from tutor.errors import ArtifactError
from tutor.formats.models.gguf import read_fields
from tutor.formats.models.prompt_format import read_format
from tutor.formats.models.served_quantization import served_quantization
from tutor.formats.rows.control_tokens import END_TEXTS
from tutor.prompt.format import PromptFormat
from tutor.recipe.settings import Recipe
from tutor.stages.modelfile.render import location, render
from tutor.stages.modelfile.spec import ModelSpec, Parameter


def run(recipe: Recipe, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write `out`/Modelfile and `out`/create.json; return their main values. Raises the errors of `render`."""
    recipe = with_answer_limit(recipe, inputs["train"])
    # create.json is the request, with each file's path from `out` instead of its digest.
    served = served_quantization(recipe.ollama.quantization, inputs["ladder"])
    gguf = inputs["convert"] / gguf_name("tutor", served)
    spec = model_spec(recipe, read_format(recipe, inputs["base"]), recipe.ollama.model, gguf)
    place = location(gguf, out)
    create = {"name": spec.name, **create_body(spec, {gguf: place})}
    (out / "Modelfile").write_bytes(render(spec, out).encode())
    (out / "create.json").write_text(json.dumps(create, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return {"model": spec.name, "gguf": place, "system": spec.system, "parameters": dict(spec.parameters)}


def model_spec(recipe: Recipe, prompt: PromptFormat, name: str, gguf: Path, adapter: Path | None = None) -> ModelSpec:
    """Return what Ollama serves of a GGUF, perhaps with an adapter. Raises ArtifactError as `stop_texts`."""
    generate = {**recipe.generate.model_dump(), "max_new_tokens": max_new_tokens(recipe.generate)}
    parameters = ollama_parameters(generate, recipe.seed, stop_texts(prompt, gguf))
    return ModelSpec(name, gguf, prompt.go_template, parameters, system=recipe.system, adapter=adapter)


def stop_texts(prompt: PromptFormat, gguf: Path) -> tuple[str, ...]:
    """Return the stop texts of a format, and that of its end-of-turn token where it is not the EOS of a GGUF.

    Raises ArtifactError where nothing would end an answer at that token: the text of a control token is in no answer,
    so that a stop text alone does not find it.
    """
    if prompt.end_id is None:
        return prompt.stops
    fields = read_fields(gguf)
    eos, *others = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    if prompt.end_id == eos:
        return prompt.stops
    text = str(fields["tokenizer.ggml.tokens"][prompt.end_id])
    if prompt.end_id not in others and text not in END_TEXTS:
        raise ArtifactError(
            f"{gguf} does not end answers at {text!r}, which ends a turn in the base's chat template",
            "publish the merged model: its file names this token as EOS",
        )
    return (*prompt.stops, text)


def create_body(spec: ModelSpec, files: Mapping[Path, str]) -> dict[str, Any]:
    """Return a create request without `model` and `stream`; `files` maps each file to its path or digest."""
    body = {
        "files": {spec.gguf.name: files[spec.gguf]},
        "adapters": {spec.adapter.name: files[spec.adapter]} if spec.adapter else {},
        "template": spec.template,
        "system": spec.system,
        "parameters": dict(spec.parameters),
        "messages": [{"role": role, "content": text} for role, text in spec.messages],
        "license": list(spec.license),
    }
    return {name: value for name, value in body.items() if value}


def ollama_parameters(generate: Mapping[str, int | float], seed: int, stops: Sequence[str]) -> dict[str, Parameter]:
    """Return the recipe's [generate] settings under Ollama's names, in the Modelfile's order."""
    return {
        "num_ctx": generate["context"],
        "num_predict": generate["max_new_tokens"],
        "temperature": generate["temperature"],
        "top_p": generate["top_p"],
        "top_k": TOP_K,
        "repeat_penalty": generate["repetition_penalty"],
        # transformers penalises the whole sequence, Ollama 64 tokens by default. Not -1 (documented as all):
        # llama-server gets it unchanged and answers 400 to a negative number.
        "repeat_last_n": generate["context"],
        "seed": seed,
        **({"stop": list(stops)} if stops else {}),
    }
