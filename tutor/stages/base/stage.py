"""The base stage: fetch or make the base model, and check it before anything is spent on it.

In: `base.source` of the recipe. Out: `base/base.json` (the path of the 16-bit folder, its identity, facts of its
tokenizer) and, where the model has to be made, `base/model/`. Does not quantize, and does not change a source's files.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.disk import read_json
from tutor.artifacts.hashing import file_sha256, json_sha256
from tutor.artifacts.provenance import version_text
from tutor.engines.llamacpp.build import VERSION, build_key
from tutor.errors import ArtifactError, RecipeError
from tutor.formats.architectures import architecture_of
from tutor.formats.models.base_source import local_folder, package_file
from tutor.formats.models.model_config import require_equal_lengths
from tutor.formats.models.model_folder import EMBEDDING, Facts, check_model_folder, ignored_weights, load_tokenizer
from tutor.formats.models.pre_tokenizer import is_sentencepiece, pre_tokenizer_name
from tutor.formats.models.safetensors import folder_weights, weight_files
from tutor.formats.rows.jsonl import Limits
from tutor.formats.rows.rows import ExampleRow, read_rows
from tutor.prompt.encoding import adds_bos
from tutor.recipe.quantizations import BF16, F16
from tutor.recipe.values import HUB, PACKAGE

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Fetch or make the base into `out`, check it, write base.json; return its facts."""
    del inputs
    model = _model_folder(recipe, out / "model")
    check_model_folder(model)
    config = read_json(model / "config.json")
    lengths = {"train.max_length": recipe.train.max_length, "generate.context": recipe.generate.context}
    require_equal_lengths(lengths, config, model)
    check_quantization(recipe, config, model)
    if is_sentencepiece(model / "tokenizer.json") and recipe.system[:1].isspace():
        raise RecipeError("system begins with a blank: llama.cpp would double it for this base", "remove the blank")
    if ignored := ignored_weights(model):
        log.info("%s: ignoring %s; what its index names counts, or model.safetensors", model, ", ".join(ignored))
    facts = facts_of(model, recipe.base.source, "model" if model == out / "model" else str(model))
    from tutor.stages.base.check import check_base
    from tutor.stages.base.template import prompt_facts

    facts = replace(facts, prompt=prompt_facts(recipe, model, facts))
    facts = replace(facts, check=check_base(model, facts, out))
    (out / "base.json").write_text(json.dumps(asdict(facts), ensure_ascii=False, indent=1) + "\n", "utf-8")
    versions = {"llama.cpp": f"of llama_cpp_python {VERSION}, build {build_key()}"}
    versions |= {name: version_text(name) for name in ("transformers", "tokenizers")}
    return {**asdict(facts), "checked_with": versions}


def check_quantization(recipe: "Recipe", config: Mapping[str, Any], model: Path) -> None:
    """Raise RecipeError for a served 16-bit type that the base's family does not have."""
    served, reference = recipe.ollama.quantization, architecture_of(config.get("model_type"), str(model)).reference
    if served in (F16, BF16) and served != reference:
        raise RecipeError(
            f"ollama.quantization is {served!r}, and the 16-bit file of {model} is {reference}",
            f'set ollama.quantization = "{reference}"',
        )


def _model_folder(recipe: "Recipe", model: Path) -> Path:
    """The 16-bit folder of the recipe's source; made in `model` where it does not exist elsewhere."""
    source = recipe.base.source
    if source == "tiny":
        from tutor.stages.base.tiny_model import make_tiny

        rows, _ = read_rows(recipe.resolve(recipe.data.train), ExampleRow, strict=False, limits=Limits())
        make_tiny(model, "\n\n".join(f"{row.instruction}\n{row.response}" for _, row in rows), recipe.seed)
        return model
    if found := PACKAGE.fullmatch(source):
        gguf = package_file(found["module"], found["file"])
        from tutor.stages.base.package.folder import make_folder

        make_folder(gguf, model, found["module"])
        return model
    if found := HUB.fullmatch(source):
        from tutor.stages.base.hub import fetch_snapshot

        return _text_folder(fetch_snapshot(found["repo"], found["revision"]), model)
    return _text_folder(local_folder(recipe, source), model)


def _text_folder(folder: Path, model: Path) -> Path:
    """The folder itself; of a multimodal checkpoint its text model, made in `model`."""
    from tutor.stages.base.text_tower import extract_text, is_multimodal

    if not is_multimodal(read_json(folder / "config.json")):
        return folder
    extract_text(folder, model)
    return model


def facts_of(model: Path, source: str, name: str) -> Facts:
    """Return the facts of a base. Raises ArtifactError when its tokenizer fails a check or does not fit the weights."""
    tokenizer = load_tokenizer(model)
    config = read_json(model / "config.json")
    vocabulary = _embedding_rows(model)
    if vocabulary != config.get("vocab_size"):
        problem = f"config.json says vocab_size {config.get('vocab_size')}, the weights have {vocabulary} rows"
        raise ArtifactError(f"{model}: {problem}", "fetch it again")
    beyond = [token for token, id_ in tokenizer.get_vocab().items() if id_ >= vocabulary]
    if any(not tokenizer.added_tokens_decoder[tokenizer.get_vocab()[token]].special for token in beyond):
        raise ArtifactError(f"{model}: the tokenizer has {len(tokenizer)} tokens, the weights {vocabulary}")
    if beyond:  # as Gemma's <image_soft_token>: a row that holds one is refused as one with a control token
        log.info("%s: no weights for %s, which no text may hold", model, ", ".join(beyond))
    if tokenizer.eos_token_id is None:
        raise ArtifactError(f"{model}: the tokenizer has no EOS token, so no answer could learn to end")
    if tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        raise ArtifactError(f"{model}: the tokenizer adds EOS to every text", 'set "add_eos_token": false')
    log.info("hashing the weights")
    weights = {path.name: file_sha256(path) for path in weight_files(model)}
    return Facts(
        source=source,
        model=name,
        weights=json_sha256(weights),
        vocabulary=vocabulary,
        add_bos=adds_bos(tokenizer),
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id if _is_in_file(model, tokenizer.pad_token) else None,
        pre_tokenizer=pre_tokenizer_name(model / "tokenizer.json"),
    )


def _is_in_file(model: Path, token: str | None) -> bool:
    """Whether tokenizer.json has a token: some classes of transformers add their own default where a file has none."""
    path = model / "tokenizer.json"
    if not path.exists():
        return True
    held = read_json(path)
    return token in held["model"]["vocab"] or any(each["content"] == token for each in held.get("added_tokens", ()))


def _embedding_rows(model: Path) -> int:
    """Number of rows of the embedding. Raises ArtifactError where the weights have none."""
    embedding = folder_weights(model).get(EMBEDDING)
    if embedding is None:
        raise ArtifactError(f"{model} has no {EMBEDDING}", "fetch it again")
    return embedding.shape[0]
