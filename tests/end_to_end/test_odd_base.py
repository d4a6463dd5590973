"""A base with biases, without an architecture and beside other weights, from its check to parity."""

from pathlib import Path

import pytest
from support.models.odd_llama import make_odd
from support.models.tiny_models import tensors
from support.processes.command import TINY, forked

from tutor.artifacts.disk import read_json
from tutor.engines.llamacpp.build import build_folder, is_built
from tutor.formats.models.gguf import read_gguf

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.llamacpp,
    pytest.mark.skipif(not is_built(build_folder()), reason="the pinned llama.cpp is not built"),
]


def test_odd_base_passes_every_stage_up_to_parity(tiny: Path, tmp_path: Path) -> None:
    make_odd(tiny, tmp_path / "odd")
    text = TINY.read_text("utf-8").replace('"tiny"', '"path:odd"').replace("../../data", str(TINY.parents[2] / "data"))
    (tmp_path / "odd.toml").write_text(
        text.replace('"Q8_0", "Q4_K_M"', '"Q8_0"').replace("epochs = 2", "epochs = 1"), "utf-8"
    )
    options = ("--recipe", tmp_path / "odd.toml", "--build", tmp_path / "build", "--until", "parity")
    done = forked("run", "--json", *options, scratch=tmp_path / "run").finish(280)
    assert done.returncode == 0, done.stderr
    assert "ignoring consolidated.safetensors, model-00002-of-00002.safetensors" in done.stderr
    made = tmp_path / "build" / "odd"
    merged = read_json(made / "merged" / "config.json")
    assert (merged["architectures"], merged["pad_token_id"]) == (["LlamaForCausalLM"], None)
    assert tensors(made / "merged").keys() == tensors_of_base(tmp_path / "odd")
    assert "blk.1.attn_k.bias" in read_gguf(made / "gguf" / "base-Q8_0.gguf").tensors


def tensors_of_base(folder: Path) -> set[str]:
    from tutor.formats.models.safetensors import folder_weights

    return set(folder_weights(folder))
