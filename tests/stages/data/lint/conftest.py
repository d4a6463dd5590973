"""Fixtures of the linter's tests."""

from pathlib import Path

import pytest
from support.models.small_tokenizer import write_byte_tokenizer


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A tokenizer.json that makes a token of every byte."""
    pytest.importorskip("tokenizers")
    return write_byte_tokenizer(tmp_path / "tokenizer.json")
