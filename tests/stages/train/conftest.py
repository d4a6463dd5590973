"""Fixtures of the train stage's tests: rows, stage folders, trainers, an uninterrupted run."""

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest
from support.models.tiny_models import base_stage, edit

torch = pytest.importorskip("torch")
from support.models.training import HELD_OUT, ROWS, SOURCE, settings
from support.processes.interrupted import Folders, Terminated, by_step, checkpoints, made, noted, stage

from tutor.engines.hf.loading import load_base
from tutor.formats.models.model_folder import load_tokenizer
from tutor.machine.memory.batching import split_step
from tutor.prompt.encoding import Encoded, RowEncoder
from tutor.stages.train.audit import encode_rows
from tutor.stages.train.trainer import lora_config, make_trainer, training_arguments


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return load_tokenizer(tiny)


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[Encoded]:
    return encode_rows(RowEncoder(tokenizer), ROWS, 1024)


@pytest.fixture(scope="module")
def inputs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the data and base stages."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "data").mkdir()
    for name, held in (("train", ROWS), ("held_out", HELD_OUT), ("prompts", HELD_OUT)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in held]
        (folder / "data" / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    base_stage(tiny, folder / "base")
    edit(folder / "base" / "base.json", source=SOURCE)
    return {"data": folder / "data", "base": folder / "base"}


@pytest.fixture
def trainer_of(tiny: Path, tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Function that makes the stage's trainer for any rows and settings."""

    def make(rows: Sequence[Encoded], quantization: str = "none", precision: str = "fp32", **changes: Any) -> Any:
        chosen = settings(**changes)
        torch.manual_seed(1)
        batches = split_step(chosen, [len(row.ids) for row in rows])
        arguments = training_arguments(chosen, precision, 1, tmp_path / "checkpoints", batches)
        model = load_base(tiny, quantization, precision)
        return make_trainer(model, tokenizer, rows, lora_config(chosen), arguments)

    return make


@pytest.fixture
def sigterm() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise an exception, as `tutor` does."""

    def raise_it(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = {number: signal.signal(number, raise_it) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for number, handler in before.items():
        assert signal.getsignal(number) is raise_it
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def uninterrupted(
    inputs: Folders, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[int, list[Any]]]:
    """The files of an uninterrupted run, and the rows of its steps."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "adapter"
    with noted() as notes:
        stage(inputs, folder)
    assert checkpoints(folder) == []
    return made(folder), by_step(notes)


@pytest.fixture(scope="module")
def files(uninterrupted: tuple[dict[str, Any], dict[int, list[Any]]]) -> dict[str, Any]:
    """The files of an uninterrupted run."""
    return uninterrupted[0]
