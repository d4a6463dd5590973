"""The base stage: a model that can be tuned, wherever it comes from, checked before anything is spent on it.

In: `base.source` of the recipe. Out: `base/base.json` (where the 16-bit folder is, its identity, its tokenizer's
facts) and, where it has to be made, `base/model/`. Does not quantize and does not change a hub repository's files.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.hashing import file_sha256, json_sha256
from tutor.errors import ArtifactError, HostError, RecipeError, ServiceError
from tutor.formats.models.base_source import HUB, KNOWN, PACKAGE, local_folder, package_file
from tutor.formats.models.gguf import pre_tokenizer, read_gguf
from tutor.formats.models.model_folder import (
    SIXTEEN_BIT,
    WEIGHTS,
    Facts,
    load_tokenizer,
    open_weights,
    read_json,
    refuse,
    refuse_config,
)
from tutor.prompt import adds_bos

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

WHOLE = ("F16", "BF16", "F32")
"""safetensors' names of the number types that are no quantization."""
EMBEDDING = "model.embed_tokens.weight"
FILES = (WEIGHTS, "*.json", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*")


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Fetch or make the base into `out`, check it, write base.json; its facts."""
    del inputs
    source = recipe.base.source
    model = out / "model"
    if source == "tiny":
        from tutor.stages.base.tiny_model import make_tiny

        lines = recipe.resolve(recipe.data.train).read_text("utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        make_tiny(model, "\n\n".join(f"{row['instruction']}\n{row['response']}" for row in rows), recipe.seed)
    elif found := PACKAGE.fullmatch(source):
        _from_gguf(package_file(found["module"], found["file"]), model, found["module"])
    elif found := HUB.fullmatch(source):
        model = _from_hub(found["repo"], found["revision"])
    else:
        model = local_folder(recipe, source)
    refuse(model)
    facts = inspect(model, source, "model" if model == out / "model" else str(model))
    (out / "base.json").write_text(json.dumps(asdict(facts), ensure_ascii=False, indent=1) + "\n", "utf-8")
    return asdict(facts)


def _from_hub(repo: str, revision: str) -> Path:
    """The hub's snapshot folder of exactly this revision, from its cache where it is whole; configuration first."""
    import huggingface_hub as hub
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx2 from 2.0, httpx before

    try:
        config = Path(hub.hf_hub_download(repo, "config.json", revision=revision))
        refuse_config(read_json(config), f"{repo}@{revision}")
        log.info("fetching %s@%s: about 16 GB for 8 billion parameters, once", repo, revision[:12])
        folder = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))
    except HFValidationError as error:
        raise RecipeError(f"base.source is {f'hub:{repo}@{revision}'!r}: {error}", KNOWN) from None
    except (httpx.HTTPError, OSError) as error:  # the hub's own are OSErrors, without a number
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if getattr(error, "errno", None) is not None:
            raise HostError(
                f"cannot keep {repo}@{revision} on this disk: {reason}", "make room, or set HF_HOME to another folder"
            ) from error
        raise ServiceError(
            f"cannot fetch {repo}@{revision} from the model hub: {reason}",
            "check the network, or name a local copy: base.source = 'path:FOLDER'",
        ) from error
    for path in sorted(folder.glob(WEIGHTS)):
        # The hub's cache names a large file's blob by its sha256.
        name = path.resolve().name
        if re.fullmatch(r"[0-9a-f]{64}", name) and file_sha256(path) != name:
            raise ArtifactError(f"{path} is damaged: its hash is not {name[:12]}…", f"rm {path.resolve()}, run again")
    return folder


def _from_gguf(gguf: Path, model: Path, package: str) -> None:
    """A quantized GGUF as a plain 16-bit folder: weights that were once quantized, said so, and nothing hidden."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    try:
        fields = read_gguf(gguf).fields
    except ArtifactError as error:
        raise ArtifactError(error.message, f"install {package} again") from None
    refuse_config({"model_type": fields.get("general.architecture")}, str(gguf))
    log.info("reading %s", gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    # The loaded model refuses .half() and keeps this key: its state goes into a plain model without it.
    settings.pop("quantization_config", None)
    config = type(loaded.config).from_dict({**settings, "dtype": "float16"})
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.float16).save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    split = fields.get("tokenizer.ggml.pre")
    if split == "smollm":
        # transformers' loader ignores the GGUF's splitting: blanks before a digit would get other ids than served.
        digits = pre_tokenizers.Digits(individual_digits=True)
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.save_pretrained(model)
    if (found := pre_tokenizer(model / "tokenizer.json")) != split:
        raise ArtifactError(f"{gguf} splits text as {split!r}, its tokenizer was read as {found!r}")
    path = model / "tokenizer_config.json"
    labels = json.loads(path.read_text("utf-8"))
    for name in ("is_local", "local_files_only", "backend"):
        labels.pop(name, None)
    # transformers 4 (llama.cpp's own pin) knows this name, and not version 5's.
    labels["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(labels, ensure_ascii=False, indent=1) + "\n", "utf-8")
    card = f"# Weights of {gguf.name}\n\nOnce quantized as the file's name says; here they are 16-bit again.\n"
    (model / "README.md").write_text(card, "utf-8")


def inspect(model: Path, source: str, name: str) -> Facts:
    """The facts of a base. Raises ArtifactError when its tokenizer fails the canary or does not fit the weights."""
    tokenizer = load_tokenizer(model)
    config = read_json(model / "config.json")
    vocabulary = embedding_rows(model)
    if vocabulary != config.get("vocab_size"):
        said = f"config.json says vocab_size {config.get('vocab_size')}, the weights have {vocabulary} rows"
        raise ArtifactError(f"{model}: {said}", "fetch it again")
    if len(tokenizer) > vocabulary:
        raise ArtifactError(f"{model}: the tokenizer has {len(tokenizer)} tokens, the weights {vocabulary}")
    if tokenizer.eos_token_id is None:
        raise ArtifactError(f"{model}: the tokenizer has no EOS token, so no answer could learn to end")
    log.info("hashing the weights")
    weights = {path.name: file_sha256(path) for path in sorted(model.glob(WEIGHTS))}
    return Facts(
        source=source,
        model=name,
        weights=json_sha256(weights),
        vocabulary=vocabulary,
        add_bos=adds_bos(tokenizer),
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        pre_tokenizer=pre_tokenizer(model / "tokenizer.json"),
    )


def embedding_rows(model: Path) -> int:
    """Rows of the embedding, from the files' headers. Raises ArtifactError for quantized numbers, or where it lacks."""
    rows = None
    for path in sorted(model.glob(WEIGHTS)):
        with open_weights(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                tensor = file.get_slice(name)
                if (kind := tensor.get_dtype()) not in WHOLE:
                    raise ArtifactError(f"{path}: {name} is {kind}; the base must be 16-bit", SIXTEEN_BIT)
                if name == EMBEDDING:
                    rows = int(tensor.get_shape()[0])
    if rows is None:
        raise ArtifactError(f"{model} has no {EMBEDDING}", "fetch it again")
    return rows
