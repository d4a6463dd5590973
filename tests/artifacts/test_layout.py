"""The paths below the build folder."""

from pathlib import Path

import pytest

from tutor.artifacts.layout import STAGE_FOLDERS, BuildFolder, evaluation_name
from tutor.pipeline.registry import STAGES

FOLDER = BuildFolder(Path("build"), "demo")


def test_stage_folders_name_every_stage_in_its_order() -> None:
    assert list(STAGE_FOLDERS) == [stage.name for stage in STAGES]
    assert len(set(STAGE_FOLDERS.values())) == len(STAGES)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (FOLDER.path, "build/demo"),
        (FOLDER.stage("train"), "build/demo/adapter"),
        (FOLDER.gguf("base", "Q8_0"), "build/demo/gguf/base-Q8_0.gguf"),
        (FOLDER.published(), "build/demo/model/published.json"),
        (FOLDER.published(adapter=True), "build/demo/lora/published.json"),
        (FOLDER.lora, "build/demo/lora"),
        (FOLDER.ollama_parity, "build/demo/parity-ollama"),
        (FOLDER.evaluation("hf:base"), "build/demo/eval-hf-base"),
        (FOLDER.served("0123abcd"), "build/demo/served/0123abcd"),
        (FOLDER.hashes, "build/demo/.hashes.json"),
        (FOLDER.server_log, "build/demo/server.log"),
        (FOLDER.service_logs, "build/demo/logs"),
    ],
    ids=str,
)
def test_build_folder_path_is_where_users_find_it(path: Path, expected: str) -> None:
    assert path == Path(expected)


def test_evaluation_name_keeps_no_separator_of_a_label() -> None:
    assert evaluation_name("ollama:a/b") == "eval-ollama-a-b"
