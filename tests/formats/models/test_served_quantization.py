"""formats/models/served_quantization.py: the quantization of the recipe, or the one that the ladder stage chose."""

from pathlib import Path

import pytest

from tutor.artifacts.disk import write_json
from tutor.artifacts.manifest import MANIFEST
from tutor.errors import ArtifactError
from tutor.formats.models.served_quantization import possible_quantizations, resolve, served_quantization, write_served


def test_served_quantization_is_read_only_for_auto(tmp_path: Path) -> None:
    assert served_quantization("Q4_K_M", tmp_path / "missing") == "Q4_K_M"
    with pytest.raises(ArtifactError, match="run: tutor ladder"):
        served_quantization("auto", tmp_path)
    write_json(tmp_path / MANIFEST, {})
    write_served(tmp_path, "Q8_0")
    assert served_quantization("auto", tmp_path) == "Q8_0"
    write_json(tmp_path / "served.json", {"quantization": None})
    with pytest.raises(ArtifactError, match=r"served\.json names no quantization") as caught:
        served_quantization("auto", tmp_path)
    assert caught.value.hint == "run: tutor ladder"


def test_setting_decides_unless_it_is_auto() -> None:
    assert (resolve("Q4_K_M", "Q8_0"), resolve("auto", "Q8_0")) == ("Q4_K_M", "Q8_0")


def test_possible_quantizations_for_auto_are_all_made() -> None:
    assert possible_quantizations("auto", ["Q4_K_M", "Q8_0"]) == ["Q4_K_M", "Q8_0"]
    assert possible_quantizations("Q8_0", ["Q4_K_M", "Q8_0"]) == ["Q8_0"]
    assert possible_quantizations("F16", ["Q8_0"]) == ["F16"]
