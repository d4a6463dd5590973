"""What the workflows of .github/ guarantee: pinned actions, limits, no rights, cache keys that name files."""

import re

import pytest
import yaml
from support.fuzzing.examples import COUNT, SEED
from support.processes.command import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_is_pinned_bounded_and_read_only(path):
    text = path.read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 180
        assert "permissions" not in job
    used = re.findall(r"uses: (\S+)(.*)", text)
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action)
        assert re.fullmatch(r"  # v\d+\.\d+\.\d+", comment)
    assert "secrets." not in text
    assert "pull_request_target" not in text


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_runs_only_make_and_docker_version(path):
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        for step in job["steps"]:
            for line in step.get("run", "").splitlines():
                assert line.startswith(("make ", "docker version"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_cache_keys_name_files_that_exist(path):
    """A pattern without a file hashes to nothing, and the key would never change."""
    for named in re.findall(r"hashFiles\((.*?)\)", path.read_text()):
        patterns = re.findall(r"'(.+?)'", named)
        assert patterns
        for pattern in patterns:
            assert list(ROOT.glob(pattern)), pattern


def test_a_scheduled_workflow_audits_the_pins():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text())
    assert workflow[True]["schedule"]  # YAML reads `on` as true
    assert any(step.get("run") == "make audit" for step in workflow["jobs"]["audit"]["steps"])


def test_a_scheduled_workflow_runs_the_fuzz_tests_with_new_seeds():
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text())["jobs"]["fuzz"]
    assert int(job["env"][COUNT]) > 1
    assert "github.run_number" in job["env"][SEED]
    assert job["steps"][-1]["run"] == "make test PYTEST=tests/fuzz"


def test_a_scheduled_workflow_keeps_the_matrix_of_families():
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text())["jobs"]["matrix"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make up", "make matrix"]  # compared with a real Ollama
    kept = steps[-1]
    assert (kept["if"], kept["with"]["path"]) == ("always()", "build/matrix/matrix.*")
