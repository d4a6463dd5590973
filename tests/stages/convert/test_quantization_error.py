"""stages/convert/quantization_error.py: the surviving share of the LoRA update, the error by type, replaced types."""

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.models.small_weights import (
    MLP,
    Weights,
    random_weights,
    trained_weights,
    write_gguf,
    write_model,
)

from tutor.errors import ArtifactError, GateError
from tutor.formats.models.gguf import Gguf, Tensor, read_gguf
from tutor.formats.models.gguf_weights import weights_of
from tutor.stages.convert import quantization_error

Measure = Callable[..., quantization_error.QuantizationError]


@pytest.fixture
def measure(tmp_path: Path) -> Measure:
    """A function that measures a file of some weights against merged and base weights."""

    def figures(
        weights: Weights, kind: str, merged: Weights, base: Weights | None
    ) -> quantization_error.QuantizationError:
        number = len(list(tmp_path.iterdir()))
        path = write_gguf(tmp_path / f"{number}.gguf", weights, kind)
        merged_weights = weights_of(write_model(tmp_path / f"m{number}", merged))
        untuned = weights_of(write_model(tmp_path / f"b{number}", base)) if base else None
        return quantization_error.measure(path, read_gguf(path), merged_weights, untuned)

    return figures


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
def test_never_quantized_weights_keep_the_update(measure: Measure, kind: str) -> None:
    base = random_weights()
    merged = trained_weights(base, 0.05)
    found = measure(merged, kind, merged, base)
    assert found.kept == pytest.approx(1, abs=0.2)
    assert 0 < found.error < 0.1
    assert quantization_error.is_kept(found.kept)


def test_file_without_the_update_is_refused(measure: Measure) -> None:
    base = random_weights()
    merged = trained_weights(base)
    found = measure(base, "Q8_0", merged, base)
    assert found.kept == pytest.approx(0, abs=0.05)
    with pytest.raises(GateError, match=r"a\.gguf keeps -?\d % of the LoRA update.*Q8_0") as raised:
        quantization_error.require_kept(Path("a.gguf"), "Q8_0", found)
    assert raised.value.code == 8


def once_quantized() -> Weights:
    """Weights that lie on Q4_1's grid, like those of the demo's base."""
    kind = gguf.GGMLQuantizationType.Q4_1
    return {
        name: gguf.dequantize(gguf.quantize(value.astype(np.float32), kind), kind).astype(np.float16)
        if value.ndim > 1
        else value
        for name, value in random_weights().items()
    }


@pytest.mark.parametrize(("kind", "least", "most"), [("Q5_1", 1.25, 2.0), ("Q4_1", 0.0, 0.3)])
def test_base_on_an_old_grid_is_refused(measure: Measure, kind: str, least: float, most: float) -> None:
    """Q5_1 makes every change larger (held-out perplexity 18.6 instead of 10.6), Q4_1 removes the changes."""
    base = once_quantized()
    merged = trained_weights(base)
    found = measure(merged, kind, merged, base)
    assert found.kept is not None
    assert least < found.kept < most
    with pytest.raises(GateError, match="was quantized before"):
        quantization_error.require_kept(Path("a.gguf"), kind, found)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0"])
def test_type_with_another_grid_keeps_the_update(measure: Measure, kind: str) -> None:
    base = once_quantized()
    merged = trained_weights(base)
    found = measure(merged, kind, merged, base)
    assert found.kept == pytest.approx(1, abs=0.2)
    quantization_error.require_kept(Path("a.gguf"), kind, found)


def test_unmeasurable_update_is_not_judged(measure: Measure) -> None:
    base = random_weights()
    assert measure(base, "Q4_0", base, base).kept is None
    merged = trained_weights(base, 0.0005)
    assert measure(base, "Q4_0", merged, base).kept is None
    assert measure(base, "Q4_0", base, None).kept is None
    quantization_error.require_kept(Path("a.gguf"), "Q4_0", measure(base, "Q4_0", base, None))


def test_tensor_with_large_error_is_named_with_its_type(measure: Measure) -> None:
    weights = random_weights()
    damaged = {**weights, f"{MLP}down_proj.weight": weights[f"{MLP}down_proj.weight"] * np.float16(1.5)}
    with pytest.raises(ArtifactError, match=r"blk\.0\.ffn_down\.weight \(Q8_0\) is 50\.0 % off"):
        measure(damaged, "Q8_0", weights, None)


def test_nan_tensor_is_refused(measure: Measure) -> None:
    weights = random_weights()
    broken = {name: value.copy() for name, value in weights.items()}
    broken["model.norm.weight"][3] = np.nan
    with pytest.raises(ArtifactError, match=r"output_norm\.weight \(F32\) is nan % off"):
        measure(broken, "Q8_0", weights, None)


def figures(kept: float | None, **by_type: float | None) -> quantization_error.QuantizationError:
    return quantization_error.QuantizationError(0.05, kept, by_type)


TENSORS = {
    "token_embd.weight": Tensor("Q8_0", (96, 10)),
    "blk.0.attn_q.weight": Tensor("Q5_1", (96, 96)),
    "blk.0.ffn_down.weight": Tensor("Q5_K", (256, 96)),
    "output_norm.weight": Tensor("F32", (96,)),
}


@pytest.mark.parametrize(
    ("kind", "by_type", "unfit"),
    [
        ("Q5_K_M", {"Q5_1": 1.5, "Q5_K": 0.1, "Q8_0": 1.0}, ("Q5_1",)),
        ("Q5_K_M", {"Q5_1": 0.3, "Q5_K": 1.0}, ("Q5_1",)),
        ("Q5_K_M", {"Q5_1": 1.2, "Q5_K": 1.0}, ()),
        ("Q5_K_M", {"Q5_1": None, "Q5_K": None}, ()),
        ("Q5_1", {"Q5_1": 1.5, "Q5_K": 1.0}, ()),
    ],
)
def test_only_unfit_fallback_types_are_replaced(
    kind: str, by_type: Mapping[str, float | None], unfit: tuple[str, ...]
) -> None:
    assert quantization_error.unfit_types(Gguf({}, TENSORS), kind, figures(1.0, **by_type)) == unfit


def test_replacement_lists_every_matrix() -> None:
    assert quantization_error.replacement_types(Gguf({}, TENSORS), ("Q5_1",)) == {
        "token_embd.weight": "Q8_0",
        "blk.0.attn_q.weight": "Q8_0",
        "blk.0.ffn_down.weight": "Q5_K",
    }


@pytest.mark.parametrize("kept", [float("nan"), float("inf"), -float("inf")])
def test_share_that_is_no_number_is_refused(kept: float) -> None:
    with pytest.raises(GateError, match="of the LoRA update"):
        quantization_error.require_kept(Path("a.gguf"), "Q8_0", figures(kept))


def test_file_of_which_no_tensor_is_compared_is_refused(tmp_path: Path) -> None:
    """The file's tensors belong to no weight."""
    path = write_gguf(tmp_path / "a.gguf", random_weights(), "Q8_0")
    with pytest.raises(ArtifactError, match="belongs to no weight"):
        quantization_error.measure(path, read_gguf(path), {}, None)
    with pytest.raises(ArtifactError, match="belongs to no weight"):
        quantization_error.require_exact(path, read_gguf(path), {})
