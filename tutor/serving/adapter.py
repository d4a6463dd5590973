"""The adapter published apart from its base: `lora/` with the adapter as a GGUF and its own Modelfile.

In: the folders of the data, base, train and convert stages. Out: `lora/` in the build folder, made when missing or
outdated. Publishes nothing.
"""

import logging
import os
from pathlib import Path
from typing import Any

from tutor.artifacts import provenance
from tutor.artifacts.disk import write_json
from tutor.artifacts.layout import LORA, BuildFolder, gguf_name
from tutor.artifacts.manifest import is_made, read_manifest, require_stage
from tutor.artifacts.stage_folder import writing
from tutor.engines.answer_limit import with_answer_limit
from tutor.engines.llamacpp.build import build_key
from tutor.errors import ArtifactError, RecipeError
from tutor.pipeline.registry import BY_NAME
from tutor.prompt.format import PromptFormat
from tutor.recipe.settings import Recipe
from tutor.serving.builds import served_name
from tutor.serving.models import quantization_of

log = logging.getLogger(__name__)

PARSER = "passthrough"
"""Ollama's name of a parser that changes nothing; with any parser, TEMPLATE wins over the GGUF's own chat template."""
LEFT_OUT = (*provenance.LEFT_OUT, "pipeline", "serving/builds.py", "serving/models.py")
"""Modules that `lora/` does not depend on, beside those of every key: their values are key fields."""


def refuse_variant(recipe: Recipe) -> None:
    """Raise RecipeError for an adapter that a GGUF cannot hold: it has matrices, and no lengths of rows."""
    if recipe.train.variant == "dora":
        raise RecipeError(
            f"{recipe.path}: train.variant is 'dora', which an adapter GGUF cannot represent",
            "publish the merged model: tutor publish without --adapter; or train with variant lora or rslora",
        )


def lora_folder(recipe: Recipe, folder: BuildFolder) -> Path:
    """Return `lora/`, made first when it is missing or outdated.

    Raises ArtifactError without a stage that it needs, RecipeError for a DoRA.
    """
    from tutor.engines.llamacpp.adapter import lora_to_gguf
    from tutor.formats.models.model_folder import read_facts
    from tutor.formats.models.prompt_format import read_format
    from tutor.stages.convert.lineage import adapter_lineage, recipe_hash, to_fields

    refuse_variant(recipe)
    inputs = {name: folder.stage(name) for name in ("data", "base", "train", "convert")}
    fields: dict[str, Any] = {f"input.{name}": require_stage(at, name).fingerprint for name, at in inputs.items()}
    fields |= BY_NAME["modelfile"].recipe_fields(recipe)
    code = provenance.SourceTree(folder.hashes).provenance("serving/adapter.py", left_out=LEFT_OUT).code
    fields |= {"code": code, "version.llama.cpp": build_key(), "recipe.lineage": recipe_hash(recipe)}
    fields["served"] = served = quantization_of(recipe, folder)
    target = folder.lora
    if is_made(target, fields):
        return target
    base = folder.gguf("base", served)
    if not base.is_file():
        raise ArtifactError(f"{base} is not there", "an adapter needs convert.base = true; then run: tutor convert")
    merged = read_manifest(folder.stage("merge"))
    if merged and merged.results.get("base") == "nf4":
        log.warning("merged/ contains the base as dequantized from NF4, lora/ the 16-bit base: their answers differ")
    log.info("converting the adapter to GGUF")
    with writing(target, LORA, fields) as (out, results):
        gguf = out / gguf_name("tutor", LORA)
        metadata = to_fields(adapter_lineage(recipe, inputs))
        results["matrices"] = lora_to_gguf(inputs["train"], read_facts(inputs["base"])[1], base, gguf, metadata)
        _write_modelfile(
            with_answer_limit(recipe, inputs["train"]), read_format(recipe, inputs["base"]), base, gguf, out
        )
    return target


def _write_modelfile(recipe: Recipe, prompt: PromptFormat, base: Path, adapter: Path, out: Path) -> None:
    """Write `out`/Modelfile and `out`/create.json of a base with an adapter, as the modelfile stage does for merged.

    The base's GGUF has its own chat template (R1's names tools and <think>), which Ollama would prefer to TEMPLATE
    without a parser. In the format of the base that template is the one to serve.
    """
    from tutor.stages.modelfile.render import render
    from tutor.stages.modelfile.stage import create_body, model_spec

    spec = model_spec(recipe, prompt, served_name(recipe, adapter=True), base, adapter)
    parser = {"parser": PARSER} if prompt.go_template else {}
    lines = [f"{name.upper()} {value}\n" for name, value in parser.items()]
    (out / "Modelfile").write_text("".join([render(spec, out), *lines]), "utf-8")
    places = {path: os.path.relpath(path, out) for path in (base, adapter)}
    write_json(out / "create.json", {"name": spec.name, **create_body(spec, places), **parser})
