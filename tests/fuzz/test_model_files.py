"""Model files of any content are read or refused: the base's folder, the adapter's, and a GGUF."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from support.fuzzing.examples import check, seeds
from support.fuzzing.guard import Call, run
from support.fuzzing.mutations import bytes_of, json_of
from support.models.tiny_models import adapter_stage
from support.processes.command import TINY

from tutor.formats.models.model_folder import check_model_folder
from tutor.formats.models.safetensors import folder_weights
from tutor.stages.base.stage import facts_of
from tutor.stages.merge.peft_adapter import read_adapter

pytestmark = pytest.mark.slow
WEIGHTS = "model.safetensors"


def changed_weights(raw: bytes, random: Random) -> bytes:
    """A safetensors file with its header changed as JSON, or the bytes of its header."""
    size = int.from_bytes(raw[:8], "little")
    if random.random() < 0.4:
        return bytes_of(raw[: 8 + size], random) + raw[8 + size :]
    header = json_of(json.loads(raw[8 : 8 + size]), random)
    return len(header).to_bytes(8, "little") + header + raw[8 + size :]


def changed(path: Path, raw: bytes, random: Random) -> bytes:
    """The content of a model folder's file, changed according to its kind."""
    return changed_weights(raw, random) if path.suffix == ".safetensors" else json_of(json.loads(raw), random)


def read_base(model: Path) -> None:
    check_model_folder(model)
    facts_of(model, "path:model", "model")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inputs").mkdir()
    return tmp_path


def read_changed(files: list[Path], folder: Path, read: Callable[[Path], object]) -> None:
    """Read the folder of the files, first as it is, then with one file of it changed at a time."""
    contents = {path: path.read_bytes() for path in files}
    name = files[0].parent.name
    assert run(name, folder=folder, entry=Call(read)).code == 0
    for random in seeds(20):
        path = random.choice(files)
        path.write_bytes(changed(path, contents[path], random))
        outcome = run(name, folder=folder, entry=Call(read))
        check(outcome, path.read_bytes(), folder)
        assert outcome.code in (0, 5)
        path.write_bytes(contents[path])


def test_base_folders_of_any_content_are_read_or_refused(tiny, folder):
    model = Path(shutil.copytree(tiny, folder / "inputs" / "model"))
    names = folder_weights(model)
    (model / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, WEIGHTS)}), "utf-8"
    )
    files = [path for path in sorted(model.iterdir()) if path.suffix in (".json", ".safetensors")]
    read_changed(files, folder, read_base)


def test_adapters_of_any_content_are_read_or_refused(tiny, folder):
    adapter = adapter_stage(tiny, folder / "inputs" / "adapter", "")
    files = [adapter / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    read_changed(files, folder, read_adapter)


def test_gguf_files_of_any_content_are_verified_or_refused(built, folder):
    raw = next((built / "tiny" / "gguf").glob("tutor-Q*.gguf")).read_bytes()
    path = folder / "inputs" / "x.gguf"
    for random in seeds(20):
        end = random.choice((64, 1024, 65_536, len(raw)))
        path.write_bytes(bytes_of(raw[:end], random) + raw[end:])
        outcome = run("verify", path, "-r", TINY, "-b", built, folder=folder)
        check(outcome, path.read_bytes(), folder)
        assert outcome.code in (0, 5)
