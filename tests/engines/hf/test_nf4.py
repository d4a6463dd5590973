"""engines/hf/nf4.py: pieces are bit for bit equal to bitsandbytes' result for the whole tensor."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")
from tutor.engines.hf.nf4 import round_trip


def by_library(weight: Any) -> Any:
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 64), (192, 576), (1000, 24), (3, 2), (4096, 130)])
@pytest.mark.parametrize("rows", [64, 128, 1 << 20])
def test_round_trip_in_pieces_equals_whole_tensor(dtype: Any, shape: tuple[int, int], rows: int) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 0.05).to(dtype)
    weight[1] = 0  # a block whose scale is zero
    wanted = by_library(weight)
    found = [*round_trip(iter(weight.split(rows)))]
    assert [len(piece) for piece in found] == [len(piece) for piece in weight.split(rows)]
    assert torch.equal(torch.cat(found), wanted)
    assert wanted.dtype == found[0].dtype == dtype
    assert not torch.equal(wanted, weight)


def test_round_trip_uses_mean_scale_of_whole_tensor() -> None:
    """Pieces of very different magnitudes: quantized one by one they would have other values."""
    torch.manual_seed(0)
    pieces = (torch.randn(64, 512) * 0.01, torch.randn(64, 512) * 10)
    found = torch.cat([*round_trip(iter(pieces))])
    assert torch.equal(found, by_library(torch.cat(pieces)))
    assert not torch.equal(found, torch.cat([by_library(piece) for piece in pieces]))
