"""Fixtures of the tests of machine: a fake machine, a fake Docker host, recipes on other bases."""

from types import SimpleNamespace

import pytest
from support.fakes.docker import host
from support.fakes.machine import based_on, machine

__all__ = ["based_on", "host", "machine"]


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks with enough free space."""
    free = SimpleNamespace(free=10**15, total=10**15, used=0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
