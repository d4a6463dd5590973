"""Fixtures of the trainings' tests."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import base_stage, edit

torch = pytest.importorskip("torch")
from support.training import HELD_OUT, ROWS, SOURCE

from tutor.formats.models.model_folder import load_tokenizer
from tutor.prompt import Encoded
from tutor.stages.train.audit import encode_rows


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return load_tokenizer(tiny)


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[Encoded]:
    return encode_rows(tokenizer, ROWS, "", 1024)


@pytest.fixture(scope="module")
def inputs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the data and base stages leave."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "data").mkdir()
    for name, held in (("train", ROWS), ("held_out", HELD_OUT)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in held]
        (folder / "data" / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    base_stage(tiny, folder / "base")
    edit(folder / "base" / "base.json", source=SOURCE)
    return {"data": folder / "data", "base": folder / "base"}
