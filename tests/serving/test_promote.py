"""serving/promote.py against a fake server: a worse build never replaces the served one, and the reason is stored."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.fakes import ollama as fake
from support.fakes.ollama import FakeOllama
from support.outputs.parity import write_parity
from support.outputs.published import make_stages

from tutor.artifacts.disk import remove, write_json
from tutor.artifacts.manifest import require_stage
from tutor.artifacts.stage_folder import writing
from tutor.errors import GateError, RecipeError, ServiceError
from tutor.pipeline.registry import BY_NAME
from tutor.recipe.settings import OllamaSettings, Recipe
from tutor.serving import promote, publish

PROMPTS = [f"¿Qué es {number}?" for number in range(24)]
GOOD = [True] * 24
WORSE = [number >= 8 for number in range(24)]
LITTLE = [number >= 1 for number in range(24)]


def trained(recipe: Recipe, build: Path, system: str, passed: Sequence[bool] | None) -> Recipe:
    """Make another build of the recipe, evaluated with these verdicts (None: not evaluated)."""
    changed = recipe.model_copy(update={"system": system})
    remove(build / "small/eval")
    make_stages(changed, build)
    if passed is not None:
        gguf = require_stage(build / "small/gguf", "convert")
        fields = BY_NAME["evaluate"].recipe_fields(changed)
        with writing(build / "small/eval", "evaluate", {**fields, "input.convert": gguf.fingerprint}) as (
            out,
            _,
        ):
            write_json(out / "answers.json", rows(passed))
    return changed


def rows(passed: Sequence[bool]) -> list[dict[str, Any]]:
    return [
        {
            "instruction": prompt,
            "category": "tipos",
            "answers": {"tutor": {"passed": good, "text": "x", "verdicts": {"stopped": good}}},
        }
        for prompt, good in zip(PROMPTS, passed, strict=True)
    ]


@pytest.fixture
def build(tmp_path: Path) -> Path:
    return tmp_path / "build"


def put(server: FakeOllama, recipe: Recipe, build: Path, system: str, passed: Sequence[bool] | None, **how: Any) -> Any:
    return promote.publish_and_promote(trained(recipe, build, system, passed), build, host=server.host, **how)


def latest(server: FakeOllama) -> str:
    return str(server.models["tutor:latest"].body["system"])


def test_first_build_is_served_and_its_answers_are_stored(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    result = put(server, recipe, build, "uno", GOOD)
    assert result["promotion"]["comparison"] == "no build was in service before: not compared"
    kept = build / "small/served" / result["build"]
    assert json.loads((kept / "answers.json").read_text("utf-8")) == rows(GOOD)
    assert json.loads((build / "small/model/published.json").read_text("utf-8")) == result
    assert "refused" not in publish.compare_published(
        recipe.model_copy(update={"system": "uno"}), build, host=server.host
    ), "published.json names what is served"


def test_model_with_host_and_namespace_is_promoted(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    named = recipe.model_copy(update={"ollama": OllamaSettings(model="h:5000/team/tutor", quantization="Q8_0")})
    first, second = put(server, named, build, "uno", GOOD), put(server, named, build, "dos", GOOD)
    assert second["tag"] == f"h:5000/team/tutor:{second['build']}"
    assert second["promotion"]["instead_of"] == first["build"]
    assert "24 prompts" in second["promotion"]["comparison"]
    assert server.models["h:5000/team/tutor:latest"].body["system"] == "dos"


def test_worse_build_is_refused_with_its_worse_questions(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    first = put(server, recipe, build, "uno", GOOD)
    with pytest.raises(
        GateError, match=r"100 % and 67 % of 24 prompts .*: worse; 8 got worse: «¿Qué es 0\?»"
    ) as caught:
        put(server, recipe, build, "dos", WORSE)
    assert latest(server) == "uno"
    (second,) = [row["build"] for row in publish.published_builds(recipe, host=server.host) if not row["latest"]]
    assert caught.value.code == 8
    assert f"tutor promote {second} --force" in str(caught.value)
    compared = json.loads((build / "small/served" / second / "compared.json").read_text("utf-8"))
    assert (compared["before"], compared["after"], len(compared["worse"])) == (first["build"], second, 8)
    changed = recipe.model_copy(update={"system": "dos"})
    for published in (None, second):
        with pytest.raises(GateError, match="8 got worse"):
            promote.promote(changed, build, published, host=server.host)
    assert latest(server) == "uno"


def test_forced_promotion_records_what_it_overrode(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    first = put(server, recipe, build, "uno", GOOD)
    second = put(server, recipe, build, "dos", WORSE, force=True)
    assert latest(server) == "dos"
    record = json.loads((build / "small/served" / second["build"] / "record.json").read_text("utf-8"))
    (promotion,) = record["promotions"]
    assert promotion["forced"] is True
    assert promotion["instead_of"] == first["build"]
    assert "8 got worse" in promotion["overrode"][0]
    assert any("Forced despite" in line for line in publish.published_lines(second))


@pytest.mark.parametrize("passed", [GOOD, LITTLE], ids=["as good", "no difference shown"])
def test_build_without_a_significant_loss_is_served(
    server: FakeOllama, recipe: Recipe, build: Path, passed: list[bool]
) -> None:
    put(server, recipe, build, "uno", GOOD)
    assert "no difference shown" in put(server, recipe, build, "dos", passed)["promotion"]["comparison"]
    assert latest(server) == "dos"


def test_latest_without_stored_answers_is_replaced_uncompared(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    put(server, recipe, build, "uno", None)
    comparison = put(server, recipe, build, "dos", WORSE)["promotion"]["comparison"]
    assert "no answers of tutor:" in comparison
    assert latest(server) == "dos"


def test_latest_of_another_origin_is_replaced_uncompared(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    put(server, recipe, build, "uno", GOOD)
    theirs = server.models["tutor:latest"]
    server.models = {"tutor:latest": fake.Model({**theirs.body, "license": "x"}, theirs.facts, theirs.blob)}
    server.order = ["tutor:latest"]
    assert "no answers of tutor:latest" in put(server, recipe, build, "dos", WORSE)["promotion"]["comparison"]


def test_unevaluated_build_is_evaluated_before_promotion(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    """In the Compose stack the evaluator runs after the publisher."""
    put(server, recipe, build, "uno", GOOD)
    with writing(build / "small/data", "data", {}) as (out, _):
        lines = [json.dumps({"instruction": prompt, "category": "tipos"}) + "\n" for prompt in PROMPTS]
        (out / "prompts.jsonl").write_text("".join(lines), "utf-8")
        (out / "train.jsonl").write_text(json.dumps({"instruction": "¿?", "response": "Sí."}) + "\n", "utf-8")
    comparison = put(server, recipe, build, "dos", None, force=True)["promotion"]["comparison"]
    assert "of 24 prompts" in comparison
    asked = [body["model"] for body in server.bodies("POST /api/chat") if body["messages"][-1]["content"] == PROMPTS[3]]
    assert asked == [
        row["model"] + ":" + row["build"] for row in publish.published_builds(recipe, host=server.host)[:1]
    ]


def test_latest_is_unchanged_when_tagging_fails(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    put(server, recipe, build, "uno", GOOD)
    server.script("POST /api/copy", fake.status(500, '{"error": "no space left on device"}'))
    with pytest.raises(ServiceError, match="no space left"):
        put(server, recipe, build, "dos", GOOD)
    assert latest(server) == "uno"
    rows = publish.published_builds(recipe, host=server.host)
    assert [row["latest"] for row in rows] == [False, True], "the new build stays on the server: tutor promote"


def test_failed_parity_gate_is_promoted_only_by_force(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    changed = trained(recipe, build, "uno", GOOD)
    published = promote.publish_and_promote(changed, build, host=server.host)["build"]
    write_parity(changed, build, refused={"message": "F16 -> Q8_0 (quantize) diverges in its end: x", "hint": "y"})
    with pytest.raises(GateError, match="diverges in its end"):
        promote.promote(changed, build, published, host=server.host)
    forced = promote.promote(changed, build, published, host=server.host, force=True)
    assert "diverges in its end" in forced["promotion"]["overrode"][0]


def test_tag_with_another_digest_is_not_promoted(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    result = put(server, recipe, build, "uno", GOOD)
    put(server, recipe, build, "dos", GOOD)
    theirs = server.models[result["tag"]]
    server.models[result["tag"]] = fake.Model({**theirs.body, "license": "x"}, theirs.facts, theirs.blob)
    with pytest.raises(GateError, match="diverges in its model: its digest is"):
        promote.promote(recipe, build, result["build"], host=server.host)


def test_older_build_is_promoted_through_the_same_gate(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    first = put(server, recipe, build, "uno", WORSE)
    second = put(server, recipe, build, "dos", GOOD)
    assert ": better" in second["promotion"]["comparison"]
    with pytest.raises(GateError, match="8 got worse"):
        promote.promote(recipe, build, first["build"], host=server.host)
    with pytest.raises(RecipeError, match="0 builds of tutor begin with 'x'"):
        promote.promote(recipe, build, "x", host=server.host)


def test_same_build_is_published_and_compared_once(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    first = put(server, recipe, build, "uno", GOOD)
    again = put(server, recipe, build, "uno", GOOD)
    assert again["published"] is False
    kept = json.loads((build / "small/model/published.json").read_text("utf-8"))
    assert (kept["build"], kept["digest"]) == (first["build"], first["digest"]), "rendered again, it is known again"
