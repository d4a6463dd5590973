"""Figures of quantizations, as the ladder stage measures them."""

from typing import Any


def quantization(size: int, more: float, kl: float) -> dict[str, Any]:
    return {"size": size, "more": more, "kl": kl}


F16 = {"F16": quantization(270, 0.0, 0.0)}


DEMO = {
    **F16,
    "Q4_K_M": quantization(105, 0.0413, 0.0536),
    "Q5_K_M": quantization(136, 0.0083, 0.0123),
    "Q8_0": quantization(144, 0.0001, 0.0039),
}
