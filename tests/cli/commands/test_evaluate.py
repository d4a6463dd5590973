"""cli/commands/evaluate.py: compare. tests/serving covers what both commands call."""

import json
from pathlib import Path

from click.testing import CliRunner
from support.outputs.evaluations import PROMPTS, write_evaluation

from tutor.cli.commands.evaluate import compare_command


def test_compare_command_prints_a_table_or_json(tmp_path: Path, recipe_file: Path) -> None:
    early = str(write_evaluation(tmp_path / "one", [False] * 8, PROMPTS))
    late = str(write_evaluation(tmp_path / "two", [True] * 8, PROMPTS))
    where = ["-r", str(recipe_file), "-b", str(tmp_path / "build")]
    done = CliRunner().invoke(compare_command, [early, late, *where], obj={"quiet": True})
    assert done.exit_code == 0, done.output
    assert "0 % (0/8)" in done.stdout
    assert "+100 [+38, +100]" in done.stdout
    as_json = CliRunner().invoke(compare_command, [early, late, *where, "--json"], obj={"quiet": True})
    assert json.loads(as_json.stdout)["all"]["passed"]["better"] == 8
