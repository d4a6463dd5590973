"""formats/models/model_folder.py: the facts of a base. tests/stages/base/test_stage.py covers unfit folders."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from support.models.families import family_folder

from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import Facts, load_tokenizer, read_facts


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


@pytest.mark.parametrize("name", ["qwen2", "mistral"])
def test_accents_are_read_as_llama_cpp_reads_them(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = family_folder(tmp_path_factory, name)
    assert ('"NFC"' in (folder / "tokenizer.json").read_text("utf-8")) is (name == "qwen2")
    tokenizer = load_tokenizer(folder)
    for text in ("un cafe\u0301", "un caf\u00e9"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
