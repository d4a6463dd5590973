"""The facts of a base, and JSON that is damaged; what makes a base unfit is in test_base.py."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tutor.artifacts.disk import read_json
from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import Facts, read_facts


def test_facts_are_read_with_their_folder(tmp_path):
    facts = Facts("tiny", "model", "0" * 64, 8, add_bos=True, bos=0, eos=1, pad=None, pre_tokenizer="llama-bpe")
    path = tmp_path / "base.json"
    path.write_text(json.dumps(asdict(facts)))
    assert read_facts(tmp_path) == (facts, tmp_path / "model")
    path.write_text(json.dumps({**asdict(facts), "model": "/elsewhere"}))
    assert read_facts(tmp_path)[1] == Path("/elsewhere")
    path.write_text(json.dumps({**asdict(facts), "more": 1}))
    with pytest.raises(ArtifactError, match="of another version; run: tutor base"):
        read_facts(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "is missing"),
        (b"", "is damaged"),
        (b"\xff", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b"[]", "is not a JSON object"),
    ],
)
def test_unreadable_json_is_an_artifact_error(tmp_path, text, expected):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(ArtifactError, match=f"{path} {expected}"):
        read_json(path)
