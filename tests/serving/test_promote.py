"""serving/promote.py and serving/build_records.py against a fake server: a worse build never replaces the served one.

What refused it, and the answers that it was compared by, are stored.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.fakes import ollama as fake
from support.fakes.llamacpp_answers import SPANISH
from support.fakes.ollama import FakeOllama
from support.outputs.parity import write_parity
from support.outputs.published import make_stages, write_data

from tutor.artifacts.disk import remove, write_json
from tutor.artifacts.hashing import file_sha256
from tutor.artifacts.layout import BuildFolder
from tutor.artifacts.manifest import require_stage
from tutor.artifacts.stage_folder import writing
from tutor.errors import ArtifactError, GateError, RecipeError, ServiceError
from tutor.pipeline.registry import BY_NAME
from tutor.recipe.settings import OllamaSettings, Recipe
from tutor.serving import promote, publish
from tutor.serving.build_records import update_record
from tutor.stages.evaluate import rates

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


def test_latest_of_another_origin_is_replaced_uncompared(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    put(server, recipe, build, "uno", GOOD)
    theirs = server.models["tutor:latest"]
    server.models = {"tutor:latest": fake.Model({**theirs.body, "license": "x"}, theirs.facts, theirs.blob)}
    server.order = ["tutor:latest"]
    comparison = put(server, recipe, build, "dos", WORSE)["promotion"]["comparison"]
    assert comparison == "tutor:latest, which is in service, was not published by tutor: not compared"


# Answers that are missing, damaged or of other prompts


def with_prompts(server: FakeOllama, recipe: Recipe, build: Path, prompts: Sequence[str] = PROMPTS) -> None:
    """Write the prompts of the data stage, which the server answers well."""

    def reply_to(prompt: str) -> list[tuple[str, float]]:
        is_asked = any(f"Instrucción: {question}\n" in prompt for question in prompts)
        return [(SPANISH, -0.1)] if is_asked else [(piece, -0.1) for piece in server.pieces]

    server.reply_to = reply_to
    write_data(recipe.model_copy(update={"system": "dos"}), build, prompts)


def asked_builds(server: FakeOllama) -> list[str]:
    """The systems of the builds that were asked the fourth question, in order."""
    bodies = [body for body in server.bodies("POST /api/chat") if body["messages"][-1]["content"] == PROMPTS[3]]
    return [str(server.models[body["model"]].body["system"]) for body in bodies]


def lose(kept: Path) -> None:
    kept.unlink()


def cut(kept: Path) -> None:
    kept.write_bytes(kept.read_bytes()[:-40])


def empty(kept: Path) -> None:
    kept.write_text("[]")


def forget(kept: Path) -> None:
    """Leave fewer answers, as a valid file."""
    kept.write_text(json.dumps(rows(GOOD)[:1]))


@pytest.mark.parametrize("damage", [lose, cut, empty, forget])
def test_damaged_answers_of_latest_are_asked_again(
    server: FakeOllama, recipe: Recipe, build: Path, damage: Callable[[Path], None]
) -> None:
    """Seen: a copy that was cut is kept for ever, nothing is compared, and a build that passes nothing is served."""
    first = put(server, recipe, build, "uno", GOOD)
    damage(build / "small/served" / first["build"] / "answers.json")
    with_prompts(server, recipe, build)
    with pytest.raises(GateError, match=r"100 % and 0 % of 24 prompts well.*: worse"):
        put(server, recipe, build, "dos", [False] * 24)
    assert latest(server) == "uno"
    assert asked_builds(server) == ["uno"]
    kept = json.loads((build / "small/served" / first["build"] / "answers.json").read_text("utf-8"))
    assert [row["instruction"] for row in kept] == PROMPTS


def test_damaged_answers_that_cannot_be_asked_again_are_refused(
    server: FakeOllama, recipe: Recipe, build: Path
) -> None:
    first = put(server, recipe, build, "uno", GOOD)
    cut(build / "small/served" / first["build"] / "answers.json")
    with pytest.raises(ArtifactError, match="data is not there") as caught:
        put(server, recipe, build, "dos", WORSE)
    assert (caught.value.code, latest(server)) == (5, "uno")
    forced = put(server, recipe, build, "dos", WORSE, force=True)["promotion"]
    assert forced["overrode"] == [forced["comparison"]]
    assert forced["comparison"].startswith("not compared: ")
    assert latest(server) == "dos"


def test_evaluation_cut_while_it_was_written_is_no_answer(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    put(server, recipe, build, "uno", GOOD)
    changed = trained(recipe, build, "dos", WORSE)
    answers = build / "small/eval/answers.json"
    answers.write_bytes(answers.read_bytes().replace(b"true", b"fals", 1))
    with_prompts(server, recipe, build)
    promote.publish_and_promote(changed, build, host=server.host)
    assert asked_builds(server) == ["dos"]


def test_answers_to_other_prompts_are_asked_again(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    put(server, recipe, build, "uno", GOOD)
    others = [f"¿Y {number}?" for number in range(3)] + PROMPTS[3:4]
    old = build / "small/served" / publish.published_builds(recipe, host=server.host)[0]["build"] / "answers.json"
    with_prompts(server, recipe, build, others)
    record = json.loads((old.parent / "record.json").read_text("utf-8"))
    write_json(old, [row for row in rows(GOOD) if row["instruction"] not in others])
    write_json(old.parent / "record.json", {**record, "answers_sha256": file_sha256(old)})
    result = put(server, recipe, build, "dos", None)
    assert "of 4 prompts" in result["promotion"]["comparison"]
    assert sorted(asked_builds(server)) == ["dos", "uno"]


def test_damaged_record_of_a_build_is_refused(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    first = put(server, recipe, build, "uno", GOOD)
    (build / "small/served" / first["build"] / "record.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"record\.json is damaged.*delete it"):
        put(server, recipe, build, "dos", GOOD)
    assert latest(server) == "uno"


def test_errors_of_latest_are_left_out_of_the_comparison(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    first = put(server, recipe, build, "uno", GOOD)
    kept = build / "small/served" / first["build"] / "answers.json"
    failed = rows([number >= 20 for number in range(24)])
    for row in failed[:20]:
        row["answers"]["tutor"] = {"passed": False, "error": "the engine crashed"}
    write_json(kept, failed)
    update_record(BuildFolder(build, "small"), first["build"], answers_sha256=file_sha256(kept))
    with pytest.raises(GateError, match=r"of 4 prompts.* too few to show a loss; 4 got worse.*; 20 prompts that"):
        put(server, recipe, build, "dos", [False] * 24)
    for row in failed[20:]:
        row["answers"]["tutor"] = {"passed": False, "error": "the engine crashed"}
    write_json(kept, failed)
    update_record(BuildFolder(build, "small"), first["build"], answers_sha256=file_sha256(kept))
    with pytest.raises(GateError, match="has answered none of 24 prompts"):
        put(server, recipe, build, "dos", GOOD)
    assert latest(server) == "uno"


@pytest.mark.parametrize(
    ("n", "after", "worse"), [(4, 0, True), (4, 3, True), (4, 4, False), (1, 0, True), (1, 1, False), (5, 4, False)]
)
def test_loss_in_too_few_prompts_is_refused(n: int, after: int, worse: bool) -> None:  # noqa: FBT001
    prompts = rows(GOOD)[:n]
    early, late = ([{"passed": number < passed, "verdicts": {}} for number in range(n)] for passed in (n, after))
    assert promote._is_worse({"n": n, **rates.changes(prompts, early, late, 1)}) is worse


def test_less_overlap_with_the_references_is_worse() -> None:
    prompts = [{**row, "reference": "Una forma."} for row in rows(GOOD)]
    early, late = ([{"passed": True, "verdicts": {"chrf": base + n}} for n in range(24)] for base in (30.0, 20.0))
    fell, rose = rates.changes(prompts, early, late, 1), rates.changes(prompts, late, early, 1)
    assert (promote._is_worse({"n": 24, **fell}), promote._is_worse({"n": 24, **rose})) == (True, False)
    line = promote._comparison_line("tutor:a", "tutor:b", {"n": 24, **fell})
    assert line.endswith("tutor:a to tutor:b, chrF to its reference: 41.5, then 31.5 (-10.0, -10.0 to -10.0): worse")


def test_change_that_is_no_number_is_worse() -> None:
    change = {"conclusion": "no difference shown", "difference": float("nan")}
    assert promote._is_worse({"n": 4, "all": {"passed": change}})


def test_unevaluated_build_is_evaluated_before_promotion(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    """In the Compose stack the evaluator runs after the publisher."""
    put(server, recipe, build, "uno", GOOD)
    with_prompts(server, recipe, build)
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


# Another version of the server, another build folder


def test_older_build_on_another_server_version_needs_force(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    first, second = (put(server, recipe, build, system, GOOD) for system in ("uno", "dos"))
    server.version = "0.34.0"
    changed = recipe.model_copy(update={"system": "dos"})
    asked = len(server.bodies("POST /api/chat"))
    promote.promote(changed, build, second["build"], host=server.host)
    assert len(server.bodies("POST /api/chat")) > asked, "its record of parity is here: it is compared again"
    asked = len(server.bodies("POST /api/chat"))
    promote.promote(changed, build, second["build"], host=server.host)
    assert len(server.bodies("POST /api/chat")) == asked, "and once"
    with writing(build / "small/gguf", "convert", {}) as (out, _):
        fake.write_gguf(out / "tutor-Q8_0.gguf", size=3000)
    with pytest.raises(GateError, match=r"was checked on version 0\.33\.0-rc2 of .*, which is now 0\.34\.0"):
        promote.promote(changed, build, first["build"], host=server.host)
    assert latest(server) == "dos"
    promote.promote(changed, build, first["build"], host=server.host, force=True)
    assert latest(server) == "uno"


def test_build_of_another_folder_is_promoted_only_by_force(
    server: FakeOllama, recipe: Recipe, build: Path, tmp_path: Path
) -> None:
    published = put(server, recipe, build, "uno", GOOD)["build"]
    make_stages(recipe, tmp_path / "other")
    with pytest.raises(GateError, match=r"was not published from .*: nothing shows its parity"):
        promote.promote(recipe, tmp_path / "other", published, host=server.host)
    forced = promote.promote(recipe, tmp_path / "other", published, host=server.host, force=True)
    assert "nothing shows its parity" in forced["promotion"]["overrode"][0]
