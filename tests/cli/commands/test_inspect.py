"""cli/commands/inspect.py: status and why. tests/serving/test_verify.py and tests/stages/report cover the others."""

import json

import pytest


@pytest.mark.slow
def test_status_of_a_damaged_stage_exits_5_with_one_document(tutor, recipe_file, tmp_path):
    where = ("-r", recipe_file, "-b", tmp_path / "build")
    tutor("data", "split", *where)
    train = tmp_path / "build" / "small" / "data" / "train.jsonl"
    train.write_bytes(train.read_bytes()[:-1] + b" ")
    assert tutor("status", *where).returncode == 0
    done = tutor("status", "--verify", "--json", *where)
    assert done.returncode == 5
    problem = f"{train} has changed since it was made"
    assert json.loads(done.stdout)[0]["problems"] == [problem]
    assert done.stderr == f"Error: {problem}; tutor run makes it again\n"
    assert tutor("why", "data", *where).stdout == "data is up to date\n"
