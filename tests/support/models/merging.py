"""Stage folders for the merge stage's tests, and PEFT's own merge to compare with.

In: the tiny model. Out: a base in two shards, an adapter of it, merged weights. Does not check a merge.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.models.tiny_models import adapter_stage, base_stage, edit, in_two_shards, recipe, tensors
from support.shared import copied

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file

from tutor.artifacts.disk import read_json
from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import read_facts
from tutor.formats.models.safetensors import read_folder
from tutor.stages.merge import stage as merge
from tutor.stages.merge import weights
from tutor.stages.merge.peft_adapter import read_adapter

MERGE_MARKS = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.*gradient_checkpointing",
        "ignore:.*alpha_pattern keys did not match",
        "ignore:Setting `save_embedding",
        "ignore:Adapter 'default'",
        "ignore:`lora_bias=True` was passed",
    ),
]
"""Marks of the test files of the merge stage: one thread, and no warnings of PEFT about test adapters."""

Q0 = "model.layers.0.self_attn.q_proj.weight"


A0, B0 = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB")


class MergeStages:
    """A base in two shards and an adapter of it, in folders like those of their stages."""

    def __init__(self, tiny: Path, folder: Path, **lora: Any) -> None:
        self.model = in_two_shards(copied(tiny, folder / "model"))
        self.base = base_stage(self.model, folder / "base")
        self.adapter = adapter_stage(self.model, folder / "adapter", read_facts(self.base)[0].weights, **lora)
        self.out = folder / "merged"

    @property
    def inputs(self) -> dict[str, Path]:
        """The folders of the stages that merging needs."""
        return {"base": self.base, "train": self.adapter}

    def merge(self, **settings: Any) -> dict[str, Any]:
        """Run the stage into a new folder; return its results."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        return merge.run(recipe(self.out / "r.toml", merge=settings), self.inputs, self.out)

    def merged(self, nf4: Any = None) -> weights.MergedWeights:
        """The weights that the stage would write."""
        files = read_folder(self.model)
        return weights.MergedWeights(
            {tensor.name: tensor for stored in files.values() for tensor in stored},
            read_adapter(self.adapter),
            "F16",
            nf4,
        )

    def refused(self) -> str:
        """Return the one-line error with which the stage refuses its input."""
        with pytest.raises(ArtifactError) as caught:
            self.merge()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def edit_adapter(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change the adapter's tensors in its file."""
        path = self.adapter / "adapter_model.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path, metadata={"format": "pt"})

    def edit_base(self, name: str, change: Callable[[Any], Any]) -> None:
        """Change one tensor of the base, and update its facts and the adapter's manifest."""
        for path in self.model.glob("*.safetensors"):
            held = load_file(path)
            if name in held:
                save_file({**held, name: change(held[name])}, path, metadata={"format": "pt"})
        shutil.rmtree(self.base)
        base_stage(self.model, self.base)
        self.trained_on(read_facts(self.base)[0].weights)

    def trained_on(self, weights: str, **more: str) -> None:
        """Set the base's hash and other results in the adapter's manifest."""
        edit(self.adapter / "manifest.json", results={"base_weights": weights, **more})

    def trained_in_nf4(self, precision: str = "bf16") -> None:
        """Set the results of a training on the NF4 base."""
        self.trained_on(read_facts(self.base)[0].weights, quantization="nf4", precision=precision)


def by_peft(model: Path, adapter: Path, dtype: Any = torch.float32) -> dict[str, Any]:
    """Return PEFT's merge in a dtype, rounded to FP16 at the end."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    plain = PeftModel.from_pretrained(loaded, adapter).merge_and_unload(safe_merge=True)
    return {name: weight.to(torch.float16) for name, weight in plain.state_dict().items()}


def written(model: Path, adapter: Path, out: Path, dtype: str = "F16") -> dict[str, Any]:
    """Write the merged weights of any adapter folder; return them."""
    files, read = read_folder(model), read_adapter(adapter)
    base = {tensor.name: tensor for stored in files.values() for tensor in stored}
    weights.require_fit(base, read, read_json(model / "config.json"))
    out.mkdir()
    merge.write_shards(weights.MergedWeights(base, read, dtype), files, out)
    return tensors(out)


def differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name in found if not torch.equal(found[name], wanted[name])]
