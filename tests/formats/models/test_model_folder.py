"""formats/models/model_folder.py: the facts of a base. tests/stages/base/test_stage.py covers unfit folders."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

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
