"""cli/commands/stack.py: the option --gpu. tests/pipeline/test_compose.py covers the rest."""

from click.testing import CliRunner

from tutor.cli.commands.stack import stack_run
from tutor.machine import preflight


def test_stack_run_with_gpu_requires_a_gpu(host, recipe_file, tmp_path):
    options = ["--recipe", str(recipe_file), "--build", str(tmp_path / "build"), "--gpu"]
    done = CliRunner().invoke(stack_run, options, obj={"quiet": True})
    assert isinstance(done.exception, preflight.UnfitError)
    assert "no NVIDIA GPU answers" in done.exception.problems[0]
    assert not any("compose" in line and " build " in line for line in host.calls)
