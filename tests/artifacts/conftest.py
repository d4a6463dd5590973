"""Fixtures of the tests of artifacts: a small disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import small_disk as disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of one MiB and 24 files."""
    with disks.small_disk(tmp_path / "disk", "size=1m,nr_inodes=24") as folder:
        yield folder
