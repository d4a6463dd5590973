"""formats/models/prompt_format.py: the format that the base stage stored, for the recipe that it was stored for."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support.models.chat_templates import FACTS, SWITCH
from support.models.gguf_bytes import facts

from tutor.errors import ArtifactError
from tutor.formats.models.prompt_format import read_format
from tutor.prompt.template_analysis import analyse_template
from tutor.prompt.tutor_format import TUTOR
from tutor.recipe.settings import Recipe

PROMPT = analyse_template(SWITCH, FACTS, where="base", reasoning="rows")


def asked(**top: Any) -> Recipe:
    return Recipe.model_validate(top).model_copy(update={"path": Path("r.toml")})


def test_stored_format_is_read(tmp_path):
    (tmp_path / "base.json").write_text(json.dumps(asdict(replace(facts(), prompt=PROMPT.to_json()))), "utf-8")
    assert read_format(asked(prompt="base", reasoning="rows"), tmp_path) == PROMPT
    assert read_format(asked(), tmp_path) is TUTOR
    with pytest.raises(ArtifactError, match=r"is of another prompt or reasoning than r\.toml; run: tutor base"):
        read_format(asked(prompt="base", reasoning="empty"), tmp_path)
    (tmp_path / "base.json").write_text(json.dumps(asdict(facts())), "utf-8")
    with pytest.raises(ArtifactError, match="run: tutor base"):
        read_format(asked(prompt="base"), tmp_path)
