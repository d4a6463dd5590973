"""stages/train/stage.py and loop.py on the tiny Llama: it learns, keeps the best adapter, and makes equal bytes."""

import json
import logging
import math
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.models.tiny_models import adapter_stage, base_stage, recipe, tensors
from support.shared import copied
from support.tolerances import roundoff

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file
from support.models.training import SOURCE, settings

from tutor.artifacts.stage_folder import log_folder
from tutor.errors import ArtifactError, DataError
from tutor.formats.models.base_source import public_source
from tutor.formats.rows.row_ids import row_encoder
from tutor.formats.rows.split_files import HELD_OUT, TRAIN, read_split
from tutor.machine.capacity import plan_training
from tutor.prompt.encoding import Encoded
from tutor.stages.train import held_out_loss, loop
from tutor.stages.train import stage as train
from tutor.stages.train.loop import round_adapter, save_adapter

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]


# --- the whole stage -------------------------------------------------------------------------------------------------

LONG = {"epochs": 3, "batch_size": 2, "accumulation": 1, "save_steps": 5}


def run(inputs: dict[str, Path], out: Path, **changes: Any) -> dict[str, Any]:
    out.mkdir()
    wanted = recipe(Path("r.toml"), data={"eval": "eval.jsonl"}, train=settings(**{**LONG, **changes}).model_dump())
    return train.run(wanted, inputs, out, plan_training(wanted, inputs))


@pytest.mark.parametrize(
    ("name", "source"), [("train", "tutor.jsonl"), ("held_out", "tutor.jsonl"), ("prompts", "eval.jsonl")]
)
def test_control_token_in_a_row_is_refused_before_the_model(
    name: str, source: str, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = copied(inputs["data"], tmp_path / "data")
    with (data / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"instruction": "¿Qué es <｜Assistant｜>?", "response": "a", "line": 77}) + "\n")
    monkeypatch.setattr(train, "load_trainer", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(DataError) as caught:
        run({**inputs, "data": data}, tmp_path / "adapter")
    assert caught.value.problems == (f"{Path(source).resolve()}:77: holds <｜Assistant｜>",)


@pytest.fixture(scope="module")
def trained(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The adapter of a training on twelve rows for three epochs, and the stage's results."""
    out = tmp_path_factory.mktemp("trained") / "adapter"
    return out, run(inputs, out)


Trained = tuple[Path, dict[str, Any]]


@pytest.mark.pipeline
def test_training_lowers_the_held_out_loss(trained: Trained) -> None:
    _, results = trained
    held_out = results["held_out"]
    assert (results["rows"], results["steps"], held_out["rows"]) == (12, 18, 2)
    assert held_out["loss_after"] < 0.8 * held_out["loss_before"]
    assert held_out["perplexity_after"] == pytest.approx(math.exp(held_out["loss_after"]))
    assert results["quantization"] == "nf4"
    if not torch.cuda.is_available():
        assert results["precision_reason"] == "rates"
        assert set(results["matmul_gflops"]) == {"bf16", "fp32"}
    json.dumps(results, allow_nan=False)


@pytest.mark.pipeline
def test_metrics_have_one_line_per_step(trained: Trained) -> None:
    lines = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 19))
    assert all(isinstance(line[name], float) for line in lines for name in ("loss", "learning_rate", "grad_norm"))
    assert max(line["learning_rate"] for line in lines) == pytest.approx(5e-3)
    assert lines[-1]["epoch"] == 3.0
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.pipeline
def test_longest_answer_is_recorded(trained: Trained, inputs: dict[str, Path]) -> None:
    rows = [row for name in (TRAIN, HELD_OUT) for row in read_split(inputs["data"], name)]
    encoder = row_encoder(recipe(Path("r.toml")), inputs["base"])
    longest = max(len(ids) for row in rows for _, ids in encoder.answers(row))
    assert trained[1]["longest_answer"] == {"tokens": longest, "line": 0}  # rows without lines


@pytest.mark.pipeline
def test_evaluations_keep_the_best_adapter(trained: Trained) -> None:
    out, results = trained
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scored = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert list(scored) == [3, 6, 9, 12, 15, 18]
    assert results["kept_step"] == min(scored, key=scored.__getitem__)
    # The file rounds A and B to FP16, and the compute dtype rounds differently.
    rounding = 2 * roundoff(torch.float16) + (2 * roundoff(torch.bfloat16) if results["precision"] == "bf16" else 0)
    assert results["held_out"]["loss_after"] == pytest.approx(min(scored.values()), rel=rounding)
    timed = [json.loads(line) for line in (log_folder(out) / "metrics.jsonl").read_text().splitlines()]
    assert [{name: line[name] for name in lines[0]} for line in timed] == [
        {name: line[name] for name in lines[0]} for line in lines
    ]
    assert all(line["samples_per_second"] > 0 for line in timed)


@pytest.mark.pipeline
@pytest.mark.parametrize(
    ("wanted", "quantization", "checkpointing"),
    [
        ({"quantization": "int8"}, "int8", False),
        ({"quantization": "auto", "precision": "bf16"}, "none", False),
        ({"gradient_checkpointing": True}, "nf4", True),
    ],
    ids=["int8", "auto", "checkpointing"],
)
def test_each_quantization_and_precision_lowers_the_loss(
    wanted: dict[str, Any], quantization: str, checkpointing: Any, inputs: dict[str, Path], tmp_path: Path
) -> None:
    results = run(inputs, tmp_path / "out", **wanted)
    assert (results["quantization"], results["gradient_checkpointing"]) == (quantization, checkpointing)
    assert results["held_out"]["loss_after"] < 0.8 * results["held_out"]["loss_before"]


@pytest.mark.pipeline
def test_gradient_checkpointing_does_not_change_the_adapter(
    trained: Trained, inputs: dict[str, Path], tmp_path: Path
) -> None:
    results = run(inputs, tmp_path / "out", gradient_checkpointing=True)
    assert results["held_out"] == trained[1]["held_out"]


@pytest.mark.pipeline
def test_patience_stops_early_and_logs_the_step(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An evaluation every three of 48 steps; the held-out losses are given, only the last one is measured."""
    given, measured = iter([3.0, 2.0, 2.5, 2.1]), []

    def mean_loss(model: Any, rows: Sequence[Encoded]) -> float:
        if (loss := next(given, None)) is None:
            measured.append(loss := held_out_loss.mean_loss(model, rows))
        return loss

    monkeypatch.setattr(loop, "mean_loss", mean_loss)
    with caplog.at_level(logging.INFO, "tutor"):
        results = run(inputs, tmp_path / "out", epochs=8, patience=2)
    assert (results["steps"], results["kept_step"]) == (12, 6)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    scored = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert scored == {3: 3.0, 6: 2.0, 9: 2.5, 12: 2.1}
    assert [results["held_out"]["loss_after"]] == measured
    assert "no better held-out loss in 2 evaluations: training ends" in caplog.text
    assert "the adapter of step 6 is kept" in caplog.text


@pytest.mark.pipeline
def test_last_adapter_is_kept_though_an_earlier_one_was_better(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """train.keep = "last": the learning rate has reached its end; no copy of the better adapter is made."""
    given = iter([1.0, 2.0, 2.5])
    monkeypatch.setattr(loop, "mean_loss", lambda *_: next(given))
    with caplog.at_level(logging.INFO, "tutor"):
        results = run(inputs, tmp_path / "out", epochs=1, keep="last")
    assert (results["steps"], results["kept_step"], results["held_out"]["loss_after"]) == (6, 6, 2.5)
    assert "the last adapter is kept: held-out loss 2.0000, and 1.0000 at step 3" in caplog.text
    assert not list(tmp_path.rglob("best.safetensors"))


@pytest.mark.pipeline
def test_adapter_config_names_source_and_no_local_path(trained: Trained, tiny: Path) -> None:
    out, results = trained
    config = json.loads((out / "adapter_config.json").read_text())
    name = public_source(SOURCE, results["base_weights"])
    assert name.startswith("local:")
    assert (config["base_model_name_or_path"], results["base_source"]) == (name, name)
    assert config["target_modules"] == sorted(config["target_modules"])  # a set's order changes from run to run
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "training.svg",
    }  # fmt: skip
    for path in out.iterdir():
        assert str(tiny.parent).encode() not in path.read_bytes()
    assert {str(tensor.dtype) for tensor in tensors(out).values()} == {"torch.float16"}
    assert results["adapter_bytes"] == (out / "adapter_model.safetensors").stat().st_size < 2 * 7168 + 4096


@pytest.mark.pipeline
def test_equal_recipes_make_equal_adapter_bytes(trained: Trained, inputs: dict[str, Path], tmp_path: Path) -> None:
    again = run(inputs, tmp_path / "again")
    for path in trained[0].iterdir():  # the files in the next stage's key
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert again["held_out"] == trained[1]["held_out"]


@pytest.mark.pipeline
def test_base_with_nan_loss_fails_before_training(tiny: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    model = copied(tiny, tmp_path / "model")
    held = load_file(model / "model.safetensors")
    held["lm_head.weight"][:] = math.inf
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="held-out loss is nan"):
        run({**inputs, "base": base_stage(model, tmp_path / "base")}, tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.pipeline
def test_support_adapter_has_the_form_of_a_trained_one(trained: Trained, tiny: Path, tmp_path: Path) -> None:
    # The merge stage's tests use it.
    made = adapter_stage(tiny, tmp_path / "adapter", "")
    assert tensors(made).keys() == tensors(trained[0]).keys()


# --- the adapter's file ----------------------------------------------------------------------------------------------


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]


def test_save_adapter_opens_no_network_connection(
    trainer_of: Any, rows: list[Encoded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = trainer_of(rows).model, []

    def nobody(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    monkeypatch.setattr(socket.socket, "connect", nobody)
    save_adapter(model, "tiny", tmp_path / "adapter")
    assert asked == []


def test_adapter_is_rounded_to_fp16_and_overflow_raises_error(trainer_of: Any, rows: list[Encoded]) -> None:
    model = trainer_of(rows).model
    weight = next(weight for weight in model.parameters() if weight.requires_grad)
    with torch.no_grad():
        weight[0, 0] = 0.1
    round_adapter(model)
    assert weight.dtype == torch.float32
    assert weight[0, 0].item() == torch.tensor(0.1).half().item()
    with torch.no_grad():
        weight[0, 0] = 70000.0
    with pytest.raises(ArtifactError, match="beyond FP16's 65504"):
        round_adapter(model)
