"""A GGUF's tensors against the weights that it was made of."""

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.small_weights import HIDDEN, MLP, NAMES, SHAPES, Weights, file, folder, moved, random

from tutor.errors import ArtifactError, GateError
from tutor.formats.models import gguf_weights
from tutor.formats.models.gguf import Gguf, Tensor, read_gguf
from tutor.formats.models.gguf_weights import check_exact, check_names, weights_of
from tutor.stages.convert import quantization_error


def exact(path: Path, model: Path) -> list[str]:
    return check_exact(path, read_gguf(path), weights_of(model))


def test_a_file_of_the_same_numbers_has_no_difference(tmp_path: Path) -> None:
    weights = random()
    assert exact(file(tmp_path / "a.gguf", weights), folder(tmp_path / "m", weights)) == []


def test_q_and_k_in_the_folder_s_own_order_are_noticed(tmp_path: Path) -> None:
    """Ollama's own conversion of adapters does this: the numbers are all there, in the wrong rows."""
    weights = random()
    lines = exact(file(tmp_path / "a.gguf", weights, as_is=True), folder(tmp_path / "m", weights))
    assert {line.split()[0] for line in lines} == {"blk.0.attn_q.weight", "blk.0.attn_k.weight"}


@pytest.mark.parametrize("name", SHAPES)
def test_one_changed_number_is_noticed_wherever_it_stands(tmp_path: Path, name: str) -> None:
    weights = random()
    model = folder(tmp_path / "m", weights)
    weights[name].reshape(-1)[-1] += np.float16(0.125)
    assert [line.split()[0] for line in exact(file(tmp_path / "a.gguf", weights), model)] == [NAMES[name]]


def test_pieces_are_compared_to_the_last_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_weights, "PIECE", 3 * HIDDEN)
    weights = random()
    model = folder(tmp_path / "m", weights)
    assert exact(file(tmp_path / "a.gguf", weights), model) == []
    weights["model.embed_tokens.weight"][-1, -1] += np.float16(0.125)
    assert len(exact(file(tmp_path / "b.gguf", weights), model)) == 1


def test_bfloat16_is_read_as_what_it_means(tmp_path: Path) -> None:
    weights = random()
    bits = {name: (value.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for name, value in weights.items()}
    model = folder(tmp_path / "m", bits)
    path = model / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(b'"U16"', b'"BF16"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    short = {name: (value.astype(np.uint32) << 16).view(np.float32) for name, value in bits.items()}
    assert exact(file(tmp_path / "a.gguf", short), model) == []


def test_a_tensor_without_its_weight_and_the_other_way_round_are_named(tmp_path: Path) -> None:
    weights = random()
    less = {name: value for name, value in weights.items() if "down" not in name}
    down = "blk.0.ffn_down.weight"
    missing = check_names(read_gguf(file(tmp_path / "a.gguf", less)), weights_of(folder(tmp_path / "m", weights)))
    assert missing == [f"{down} is missing"]
    more = check_names(read_gguf(file(tmp_path / "b.gguf", weights)), weights_of(folder(tmp_path / "l", less)))
    assert more == [f"{down} belongs to no weight"]
    other = {**weights, f"{MLP}down_proj.weight": weights[f"{MLP}down_proj.weight"].T.copy()}
    shape = check_names(read_gguf(file(tmp_path / "c.gguf", other)), weights_of(folder(tmp_path / "o", weights)))
    assert shape == [f"{down} has the shape (256, 128) instead of (128, 256)"]


def test_what_the_converter_computes_itself_belongs_to_no_folder() -> None:
    tensors = {"rope_freqs.weight": Tensor("F32", (8,))}
    assert check_names(Gguf({}, tensors), {}) == []


def test_a_weight_that_no_gguf_has_is_an_artifact_error(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", {"model.vision.weight": np.zeros((2, 2), np.float16)})
    with pytest.raises(ArtifactError, match=r"no name for model\.vision\.weight"):
        weights_of(model)


def test_a_sample_takes_whole_rows_from_the_first_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_weights, "SAMPLE", 100)
    assert gguf_weights._sampled((1000, 10)).tolist() == [111 * number for number in range(10)]
    assert gguf_weights._sampled((3, 1000)).tolist() == [0, 2]
    assert gguf_weights._sampled((5, 10)).tolist() == [0, 1, 2, 3, 4]
    assert gguf_weights._sampled((7,)).tolist() == [0]


# What training changed

Measure = Callable[..., quantization_error.QuantizationError]


@pytest.fixture
def measure(tmp_path: Path) -> Measure:
    """The figures of a file of some weights, made for merged and base weights."""

    def figures(
        weights: Weights, kind: str, merged: Weights, base: Weights | None
    ) -> quantization_error.QuantizationError:
        number = len(list(tmp_path.iterdir()))
        path = file(tmp_path / f"{number}.gguf", weights, kind)
        told = weights_of(folder(tmp_path / f"m{number}", merged))
        untuned = weights_of(folder(tmp_path / f"b{number}", base)) if base else None
        return quantization_error.measure(path, read_gguf(path), told, untuned)

    return figures


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
def test_weights_that_were_never_quantized_keep_what_training_changed(measure: Measure, kind: str) -> None:
    base = random()
    merged = moved(base, 0.05)
    found = measure(merged, kind, merged, base)
    assert found.kept == pytest.approx(1, abs=0.2)
    assert 0 < found.error < 0.1
    assert quantization_error.is_kept(found.kept)


def test_a_file_of_the_base_has_nothing_of_the_training_and_is_refused(measure: Measure) -> None:
    base = random()
    merged = moved(base)
    found = measure(base, "Q8_0", merged, base)
    assert found.kept == pytest.approx(0, abs=0.05)
    with pytest.raises(GateError, match=r"a\.gguf has -?\d % of what training changed.*Q8_0") as raised:
        quantization_error.refuse_lost(Path("a.gguf"), "Q8_0", found)
    assert raised.value.code == 8


def once_quantized() -> Weights:
    """Weights that lie on Q4_1's grid, as the demo's base has them."""
    kind = gguf.GGMLQuantizationType.Q4_1
    return {
        name: gguf.dequantize(gguf.quantize(value.astype(np.float32), kind), kind).astype(np.float16)
        if value.ndim > 1
        else value
        for name, value in random().items()
    }


@pytest.mark.parametrize(("kind", "least", "most"), [("Q5_1", 1.25, 2.0), ("Q4_1", 0.0, 0.3)])
def test_a_base_that_was_quantized_before_meets_its_old_grid(
    measure: Measure, kind: str, least: float, most: float
) -> None:
    """Seen as held-out perplexity 18.6 instead of 10.6: Q5_1 makes every change larger, Q4_1 takes it back."""
    base = once_quantized()
    merged = moved(base)
    found = measure(merged, kind, merged, base)
    assert found.kept is not None
    assert least < found.kept < most
    with pytest.raises(GateError, match="once quantized"):
        quantization_error.refuse_lost(Path("a.gguf"), kind, found)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0"])
def test_a_type_with_a_grid_of_its_own_does_not(measure: Measure, kind: str) -> None:
    base = once_quantized()
    merged = moved(base)
    found = measure(merged, kind, merged, base)
    assert found.kept == pytest.approx(1, abs=0.2)
    quantization_error.refuse_lost(Path("a.gguf"), kind, found)


def test_a_training_too_small_to_be_seen_is_not_judged(measure: Measure) -> None:
    base = random()
    assert measure(base, "Q4_0", base, base).kept is None
    merged = moved(base, 0.0005)
    assert measure(base, "Q4_0", merged, base).kept is None
    assert measure(base, "Q4_0", base, None).kept is None
    quantization_error.refuse_lost(Path("a.gguf"), "Q4_0", measure(base, "Q4_0", base, None))


def test_a_tensor_that_is_too_far_off_is_named_with_its_type(measure: Measure) -> None:
    weights = random()
    damaged = {**weights, f"{MLP}down_proj.weight": weights[f"{MLP}down_proj.weight"] * np.float16(1.5)}
    with pytest.raises(ArtifactError, match=r"blk\.0\.ffn_down\.weight \(Q8_0\) is 50\.0 % off"):
        measure(damaged, "Q8_0", weights, None)


def test_a_tensor_that_is_no_number_is_too_far_off(measure: Measure) -> None:
    weights = random()
    broken = {name: value.copy() for name, value in weights.items()}
    broken["model.norm.weight"][3] = np.nan
    with pytest.raises(ArtifactError, match=r"output_norm\.weight \(F32\) is nan % off"):
        measure(broken, "Q8_0", weights, None)


# What is done about it


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
def test_only_what_was_fallen_back_to_is_replaced(
    kind: str, by_type: Mapping[str, float | None], unfit: tuple[str, ...]
) -> None:
    assert quantization_error.unfit_types(Gguf({}, TENSORS), kind, figures(1.0, **by_type)) == unfit


def test_every_matrix_is_named_when_one_type_is_replaced() -> None:
    assert quantization_error.replacement_types(Gguf({}, TENSORS), ("Q5_1",)) == {
        "token_embd.weight": "Q8_0",
        "blk.0.attn_q.weight": "Q8_0",
        "blk.0.ffn_down.weight": "Q5_K",
    }
