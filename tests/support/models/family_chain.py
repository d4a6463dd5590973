"""Tiny models of families from the base to the 16-bit GGUF, with the template of the base; the adapter is not trained.

In: names of FAMILIES. Out: stage folders, made once a test run with one start of the converter; what a stage's gate
says of a folder. A test spoils a copy.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from support.files import write_rows
from support.models.families import family_folder
from support.models.tiny_models import adapter_stage, recipe
from support.shared import copied, shared
from tutor.artifacts.layout import STAGE_FOLDERS, gguf_name
from tutor.engines.llamacpp.convert import Conversion, to_gguf
from tutor.formats.architectures import ARCHITECTURES, Architecture
from tutor.formats.models.gguf_metadata import implied_metadata
from tutor.formats.models.model_folder import load_tokenizer, read_facts
from tutor.formats.models.prompt_format import read_format
from tutor.prompt.base_format import BaseFormat
from tutor.recipe.settings import Recipe
from tutor.stages.base.stage import facts_of
from tutor.stages.base.template import prompt_facts
from tutor.stages.base.tiny_families import FAMILIES
from tutor.stages.convert import stage as convert
from tutor.stages.merge import stage as merge
from tutor.stages.parity import stage as parity

REASONING = {"qwen3": "empty"}
"""`reasoning` of the recipes, where it is not "none"."""
HISTORY = [{"role": "user", "content": "¿Qué es un tipo?"}, {"role": "assistant", "content": "Un conjunto de valores."}]
ROWS = [
    {"instruction": "¿Y una unión?", "response": "Uno u otro:\n\n```ts\nlet x: A | B;\n```", "history": HISTORY},
    {"instruction": "¿Cuánto es 2 + 9?", "response": "Son 11.", "history": []},
]
"""Training rows and held-out rows of every chain; the first has two turns."""


@dataclass(frozen=True)
class Chain:
    """The stage folders of a family."""

    name: str
    folder: Path

    @property
    def inputs(self) -> dict[str, Path]:
        """The folders by the names of their stages."""
        return {stage: self.folder / name for stage, name in STAGE_FOLDERS.items()}

    @property
    def base(self) -> Path:
        """The model folder of the base."""
        return read_facts(self.inputs["base"])[1]

    @property
    def merged(self) -> Path:
        """The model folder after merging."""
        return self.inputs["merge"]

    @property
    def reference(self) -> str:
        """The type of the GGUF."""
        return ARCHITECTURES[FAMILIES[self.name].model_type].reference

    @property
    def gguf(self) -> Path:
        """The GGUF of the merged model."""
        return self.inputs["convert"] / gguf_name("tutor", self.reference)

    @cached_property
    def recipe(self) -> Recipe:
        """A recipe that serves the 16-bit GGUF with the base's template."""
        top = {"prompt": "base", "reasoning": REASONING.get(self.name, "none")}
        made = recipe(self.folder / "r.toml", generate={"context": 512}, **top)  # type: ignore[arg-type]
        return made.model_copy(
            update={
                "convert": made.convert.model_copy(update={"quantizations": (), "base": False}),
                "ollama": made.ollama.model_copy(update={"quantization": self.reference}),
            }
        )

    @property
    def prompt(self) -> BaseFormat:
        """The prompt format."""
        found = read_format(self.recipe, self.inputs["base"])
        assert isinstance(found, BaseFormat)
        return found

    def source(self) -> convert.ConversionSource:
        """What the convert stage expects of the GGUF."""
        facts, _ = read_facts(self.inputs["base"])
        template = self.prompt.chat_template(add_bos=facts.add_bos)
        expected = replace(implied_metadata(self.merged, facts), chat_template=template, eos=self.prompt.end_id)
        return convert.ConversionSource("tutor", self.merged, expected, {}, convert.CalibrationText([]), None)

    def check_conversion(self) -> None:
        """Compare the GGUF with merged/ as the convert stage does. Raises ArtifactError."""
        convert.quantize_model(self.source(), (), self.gguf.parent)

    def compare(self) -> dict[str, Any]:
        """Return the result of the parity stage."""
        out = self.inputs["parity"]
        out.mkdir(exist_ok=True)
        return parity.run(self.recipe, self.inputs, out)


def family_chain(factory: pytest.TempPathFactory, name: str, names: Sequence[str], to: Path) -> Chain:
    """Return a copy of the chain of a family, which is made together with those of all `names`."""
    made = shared(factory, "family_chains", partial(_make_chains, factory, names))
    return Chain(name, copied(made / name, to / name))


def _make_chains(factory: pytest.TempPathFactory, names: Sequence[str], folder: Path) -> None:
    chains = [Chain(name, folder / name) for name in names]
    for chain in chains:
        _make_merged(chain, family_folder(factory, chain.name))
    sources = [chain.source() for chain in chains]
    to_gguf(
        *(
            Conversion(source.folder, chain.gguf, source.expected.pre_tokenizer or "")
            for chain, source in zip(chains, sources, strict=True)
        )
    )


def _make_merged(chain: Chain, model: Path) -> None:
    """Make the stages up to merge: a base, an adapter with random numbers, both in one folder."""
    folders = chain.inputs
    for stage in ("data", "base", "merge", "convert", "ladder"):
        folders[stage].mkdir(parents=True)
    for name in ("train", "held_out"):
        write_rows(folders["data"] / f"{name}.jsonl", ROWS)
    base = copied(model, folders["base"] / "model")
    _soften(base, ARCHITECTURES[FAMILIES[chain.name].model_type])
    facts = facts_of(base, "path:model", "model")
    facts = replace(facts, prompt=prompt_facts(chain.recipe, base, facts))
    (folders["base"] / "base.json").write_text(json.dumps(asdict(facts)), "utf-8")
    adapter_stage(base, folders["train"], facts.weights)
    merge.run(chain.recipe, folders, folders["merge"])


def _soften(model: Path, family: Architecture) -> None:
    """Make rounding and pieces of characters rare in the answers of a random model.

    Halves its logits where norms have no offset, and shrinks the rows of tokens that are no whole characters: engines
    print those in other ways.
    """
    path = model / "model.safetensors"
    weights, tokenizer = load_file(path), load_tokenizer(model)
    parts = [token for token in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([token])]
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & weights.keys():
        weights[name][parts] *= 0.1
    if not family.norm_offset:
        weights["model.norm.weight"] *= 0.5
    save_file(weights, path, metadata={"format": "pt"})
