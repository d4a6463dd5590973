"""The parity gate: what counts as a difference, which hand-off is named for it, and that nothing passes unsaid."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.parity_folders import trace, write_parity
from support.published import SYSTEM, make_stages

from tutor.artifacts.manifest import find_damage, read_manifest
from tutor.cli import summary
from tutor.engines.trace import END, Score, Step, Trace, divergence
from tutor.errors import GateError
from tutor.pipeline import runner as pipeline
from tutor.pipeline.registry import BY_NAME
from tutor.prompt import render
from tutor.recipe.quantizations import KINDS
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import BUDGETS, OllamaSettings, ParitySettings, Recipe
from tutor.stages.parity.compare import SUBJECTS, Comparison, Observation, Tolerance, compare_engines
from tutor.stages.parity.conversations import CODE, EMOJI, SPECIALS, Conversation, conversations
from tutor.stages.parity.gate import HandOff, hand_off, parity_table, quantization_tolerance, refusal
from tutor.stages.parity.record import from_record, to_record

TIGHT = Tolerance(kl=1e-3, mean=0.01, worst=0.1, lead=0.2)
LOOSE = quantization_tolerance(0.05)


def scored(*logprobs: float, best: bool = True) -> Score:
    """A given answer of these log-probabilities; `best`: its last id, EOS, is the most probable one."""
    places = [((index, value), (99, value - 2.0)) for index, value in enumerate(logprobs)]
    if not best:
        places[-1] = ((99, logprobs[-1] + 2.0), (len(logprobs) - 1, logprobs[-1]))
    return Score(logprobs, tuple(places))


def seen(**changes: Any) -> Observation:
    return replace(
        Observation("code", "Instrucción: x\nRespuesta:", (1, 5, 6), 3, scored(-0.5, -0.3), trace()), **changes
    )


def checked(
    theirs: Observation, tolerance: Tolerance = TIGHT, ours: Observation | None = None
) -> dict[str, Comparison]:
    return {check.name: check for check in compare_engines([ours or seen()], [theirs], tolerance)}


def failing(theirs: Observation, tolerance: Tolerance = TIGHT, ours: Observation | None = None) -> list[str]:
    return [name for name, check in checked(theirs, tolerance, ours).items() if not check.ok]


# What is compared


def test_an_engine_does_not_differ_from_itself_in_anything() -> None:
    found = checked(seen())
    assert tuple(found) == SUBJECTS
    assert all(check.ok and not check.what for check in found.values())
    assert found["log-probabilities"].figures == {"tokens": 9, "change": 0, "mean": 0, "worst": 0, "kl": 0}


@pytest.mark.parametrize(
    ("change", "check", "what"),
    [
        ({"prompt": "Instrucción: x\nRespuesta: "}, "prompt", r"«code»: .*Respuesta:' and .*Respuesta: '"),
        ({"prompt": "\n\nInstrucción: x\nRespuesta:"}, "prompt", r"'Instr.*' and '\\n\\nInstr"),
        ({"ids": (1, 1, 5, 6)}, "tokens", r"the second has 1 more in front \(a BOS\?\)"),
        ({"ids": (5, 6)}, "tokens", r"the second lacks the 1 in front \(a BOS\?\)"),
        ({"ids": (1, 7, 6)}, "tokens", r"from token 2 on \[5, 6\] and \[7, 6\]"),
        ({"ids": (1, 5)}, "tokens", r"from token 3 on \[6\] and \[\]"),
        ({"ids": None, "tokens": 4}, "tokens", "3 tokens and 4"),
        (
            {"scored": scored(-0.5, -2.5)},
            "log-probabilities",
            "worst at «code», token 2 of the given answer: -0.30 and",
        ),
        ({"trace": trace(logprob=-1.1)}, "log-probabilities", r"«code», step 1 \(' Una'\): -0.10 and -1.10"),
        ({"trace": trace((" Un", "a"))}, "greedy answer", "after 0 equal steps ' Una', preferred by 3.00, and ' Un'"),
        ({"trace": trace((" Una", " interfaz"))}, "end", "after 2 equal steps: one goes on and one ends"),
    ],
)
def test_each_difference_is_found_where_it_is_and_shown(change: dict[str, Any], check: str, what: str) -> None:
    found = checked(seen(**change))
    assert next(name for name, item in found.items() if not item.ok) == check
    assert re.search(what, found[check].what)


def test_a_given_answer_s_end_that_another_token_takes_is_found_where_only_ends_are_judged() -> None:
    found = checked(seen(scored=scored(-0.5, -0.3, best=False)), Tolerance(kl=9, mean=None, worst=None, lead=0.2))
    assert [name for name, check in found.items() if not check.ok] == ["end"]
    assert "behind the given answer: one ends and one goes on" in found["end"].what


def test_differences_below_the_noise_are_none() -> None:
    assert failing(seen(scored=scored(-0.501, -0.302), trace=trace(logprob=-0.105))) == []


def test_another_best_token_is_tolerated_only_where_two_were_equally_good() -> None:
    def near(lead: float) -> Observation:
        step = Step(" Un", -0.7, ((" Un", -0.7), (" Una", -0.7 - lead)))
        return seen(trace=Trace((step,), None, 3))

    assert failing(near(0.1)) == []
    assert failing(near(1.5)) == ["greedy answer"]
    assert failing(near(1.5), LOOSE) == [], "a quantization may answer otherwise"


def test_an_end_is_tolerated_to_be_missing_only_where_it_was_a_toss_up() -> None:
    def ending(lead: float) -> Observation:
        return seen(trace=Trace((Step(END, -0.7, ((END, -0.7), (" y", -0.7 - lead))),), "stop", 3))

    other = seen(trace=Trace((Step(" y", -0.7, ((" y", -0.7), (END, -0.8))),), None, 3))
    assert failing(other, ours=ending(0.1)) == []
    far = replace(other, trace=Trace((Step(" y", -0.7, ((" y", -0.7), ("", -3.8))),), None, 3))
    assert "end" in failing(far, ours=ending(1.5))


def test_what_an_engine_does_not_say_is_in_no_figure() -> None:
    found = checked(Observation("code", None, None, None, None, None))
    assert all(check.ok for check in found.values())
    assert {check.figures.get("of", check.figures.get("tokens")) for check in found.values()} == {0}


def test_what_the_first_engine_does_not_say_is_in_no_figure() -> None:
    found = checked(seen(), ours=Observation("code", None, None, 3))
    assert all(check.ok for check in found.values())
    assert found["tokens"].figures == {"equal": 1, "of": 1}
    assert checked(seen(prompt="x"))["prompt"].figures == {"equal": 0, "of": 1}
    assert checked(seen(), ours=Observation("code"))["tokens"].figures == {"equal": 0, "of": 0}
    assert {found[name].figures.get("of", 0) for name in SUBJECTS if name != "tokens"} == {0}


def test_a_kl_divergence_over_the_budget_is_a_difference() -> None:
    """The answer's own tokens have the same probability: only what else could stand there differs."""
    other = scored(-0.5, -0.3)
    other = replace(other, top=(((0, -0.5), (98, -1.2)), other.top[1]))
    ours, theirs = seen(trace=None), seen(trace=None, scored=other)
    kl = divergence(dict(scored(-0.5, -0.3).top[0]), dict(other.top[0])) / 2
    figures = checked(theirs, ours=ours)["log-probabilities"].figures
    assert figures == {"tokens": 2, "change": 0, "mean": 0, "worst": 0, "kl": round(kl, 6)}
    assert failing(theirs, quantization_tolerance(1.01 * kl), ours) == []
    assert failing(theirs, quantization_tolerance(0.99 * kl), ours) == ["log-probabilities"]


def test_a_change_of_log_probabilities_is_a_mean_with_its_sign() -> None:
    found = checked(seen(trace=None, scored=scored(-0.9, -0.1)), ours=seen(trace=None))["log-probabilities"]
    assert [found.figures[name] for name in ("change", "mean", "worst")] == [-0.1, 0.3, 0.4]


def test_greedy_figures_count_equal_steps_and_whole_answers() -> None:
    whole = trace((" a", " b", " c"))
    for theirs, wanted in (
        (whole, {"agreed": 4, "steps": 4, "equal": 1, "of": 1}),
        (trace((" a", " x", " c")), {"agreed": 1, "steps": 4, "equal": 0, "of": 1}),
        (Trace(whole.steps[:2], None, 3), {"agreed": 2, "steps": 4, "equal": 0, "of": 1}),
    ):
        assert checked(seen(trace=theirs), ours=seen(trace=whole))["greedy answer"].figures == wanted
    shorter = checked(seen(trace=whole), ours=seen(trace=Trace(whole.steps[:2], None, 3)))
    assert shorter["greedy answer"].figures == {"agreed": 2, "steps": 2, "equal": 0, "of": 1}


def test_after_the_first_other_step_no_probability_is_compared() -> None:
    theirs = seen(scored=None, trace=trace((" a", " x", " c"), logprob=-0.1))
    ours = seen(scored=None, trace=trace((" a", " b", " c"), logprob=-0.1))
    assert checked(theirs, ours=ours)["log-probabilities"].figures["tokens"] == 1


def test_a_step_without_a_probability_is_compared_as_text_alone() -> None:
    silent = seen(scored=None, trace=Trace((*trace().steps[:-1], Step(END, None)), "stop", 3))
    for ours, theirs in ((silent, seen(scored=None)), (seen(scored=None), silent)):
        found = checked(theirs, ours=ours)
        assert all(check.ok for check in found.values())
        assert found["log-probabilities"].figures["tokens"] == 6


def test_a_given_answers_end_is_tolerated_only_as_a_toss_up() -> None:
    def ending(lead: float) -> Observation:
        places = scored(-0.9, -0.8, -0.7).top[:2]
        return seen(trace=None, scored=Score((-0.9, -0.8, -0.7), (*places, ((99, lead - 0.7), (2, -0.7)))))

    ours, wide = seen(trace=None, scored=scored(-0.9, -0.8, -0.7)), Tolerance(kl=9, mean=None, worst=None, lead=0.2)
    assert failing(ending(0.1), wide, ours) == []
    assert failing(ending(0.3), wide, ours) == ["end"]
    assert failing(ending(0.3), quantization_tolerance(9), ours) == [], "a quantization may end elsewhere"
    for other in (trace((" Una", " interfaz")), Trace(trace().steps[:-1], None, 3)):
        assert failing(seen(trace=other), quantization_tolerance(9)) == []


def test_ends_are_counted_behind_given_and_greedy_answers() -> None:
    assert checked(seen())["end"].figures == {"equal": 2, "of": 2}
    assert checked(seen(scored=scored(-0.5, -0.3, best=False)))["end"].figures == {"equal": 1, "of": 2}
    assert checked(seen(trace=trace((" Una", " interfaz"))))["end"].figures == {"equal": 1, "of": 2}


def test_a_step_of_unknown_lead_is_judged_by_the_other_ones() -> None:
    silent = seen(trace=Trace((Step(" Un", None),), None, 3))
    for lead, wanted in ((0.1, []), (1.5, ["greedy answer"])):
        step = Step(" Una", -0.7, ((" Una", -0.7), (" Un", -0.7 - lead)))
        known = seen(trace=Trace((step,), None, 3))
        assert failing(silent, ours=known) == failing(known, ours=silent) == wanted


def test_probabilities_that_are_no_numbers_are_no_agreement() -> None:
    assert "log-probabilities" in failing(seen(scored=scored(math.nan, -0.3)))


def test_an_answer_read_as_other_tokens_is_a_difference_of_tokens_and_no_crash() -> None:
    assert failing(seen(ids=(1, 5), scored=scored(-0.5, -0.3, -0.1)))[0] == "tokens"


def test_steps_of_several_tokens_are_compared_as_text_alone() -> None:
    ours = seen(trace=Trace((Step("👩", -9.0, tokens=3), Step(" a", -0.1)), "length", 3))
    theirs = seen(trace=Trace((Step("👩", -0.2), Step(" a", -0.1)), "length", 3))
    assert failing(theirs, ours=ours) == []


# The verdict


def over(kind: Any, other: Observation | None = None, **names: str) -> HandOff:
    sides = ([seen()], [other or seen()])
    return hand_off(kind, (names.get("ours", "a"), names.get("theirs", "b")), sides, TIGHT)


def test_the_first_hand_off_is_named_with_its_first_difference_and_the_likeliest_cause() -> None:
    bad = seen(ids=(5, 6), scored=scored(-3.0, -4.0))
    chain = [over("merge"), over("convert", bad, ours="merged", theirs="F16"), over("quantize", bad)]
    said = refusal(chain)
    assert said is not None
    assert said["message"].startswith("merged -> F16 (convert) diverges in its tokens: «code»: the second lacks the 1")
    assert "add_bos_token" in said["hint"]
    assert refusal([over("merge"), over("convert")]) is None


@pytest.mark.parametrize("kind", ["merge", "convert", "quantize", "publish"])
@pytest.mark.parametrize("check", SUBJECTS)
def test_every_difference_of_every_hand_off_has_a_cause(kind: Any, check: str) -> None:
    said = refusal([HandOff(kind, "a", "b", (Comparison(check, ok=False, figures={}, what="x"),), TIGHT)])
    assert said is not None
    assert said["hint"].startswith("most likely: ")


def test_a_pair_that_was_not_compared_is_said_and_not_green() -> None:
    missing = HandOff("merge", "base + adapter", "merged", missing="16 GB are needed, 3 GB are free")
    assert missing.state == "not checked"
    text = "\n".join(
        parity_table([missing.record(), over("convert").record(), over("quantize", seen(prompt="x")).record()])
    )
    assert "base + adapter -> merged    not checked: 16 GB are needed" in text
    assert text.count("<- diverges") == 1


def test_a_record_gives_back_what_later_comparisons_need() -> None:
    first = seen(scored=None)
    assert from_record(json.loads(json.dumps(to_record(first, candidates=True)))) == first
    short = json.loads(json.dumps(to_record(seen(), candidates=False)))
    assert "top" not in short["trace"]["steps"][0]
    assert short["logprobs"] == [-0.5, -0.3]


# The conversations


def fits(prompt: str) -> bool:
    return len(prompt) <= 2000


def test_the_set_holds_what_breaks_and_every_prompt_can_be_rendered() -> None:
    found = {item.name: item for item in conversations([("¿Qué?", "Eso.")], "Eres «tutor».", fits)}
    assert {"held-out 1", "accents", "code", "emoji", "special tokens", "several turns", "empty system"} <= set(found)
    assert ("\t" in CODE, "`" in CODE, "\u200d" in EMOJI, "<｜User｜>" in SPECIALS) == (True,) * 4
    assert found["empty system"].messages[0] == {"role": "system", "content": ""}
    assert "Eres" not in found["empty system"].prompt
    assert sum(message["role"] == "user" for message in found["several turns"].messages) == 3
    assert found["answered"].prompt == render(found["held-out 1"].messages) + " Eso."
    assert found["held-out 1"].answer == "Eso."


def test_the_long_one_just_fits_and_is_answered_by_ollama_alone() -> None:
    long = conversations([], "", fits)[-1]
    assert (long.name, long.reach) == ("long", "published")
    assert 1850 < len(long.prompt) <= 2000


def test_what_does_not_fit_into_the_context_is_read_and_not_answered() -> None:
    found = {item.name: item.reach for item in conversations([], "", lambda prompt: len(prompt) < 90)}
    assert found["special tokens"] == "nowhere"
    assert found["empty system"] == "served"
    assert "long" not in found


def test_the_set_is_the_same_every_time() -> None:
    rows = [("¿a?", "b"), ("¿c?", "d")]
    one, two = (conversations(rows, "s", fits) for _ in range(2))
    assert one == two
    assert isinstance(one[0], Conversation)


# The recipe


def test_a_budget_in_the_recipe_changes_that_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[parity]\nprompts = 1\nbudgets = {Q8_0 = 0.001}\n")
    found = read_recipe(path).parity
    assert found.budgets == {**BUDGETS, "Q8_0": 0.001}
    assert ParitySettings().budgets == BUDGETS


def test_every_quantization_has_a_budget_and_a_coarser_one_no_smaller() -> None:
    assert set(BUDGETS) == set(KINDS)
    assert list(BUDGETS.values()) == sorted(BUDGETS.values()), "they stand from the finest to the coarsest"
    assert max(BUDGETS.values()) < 4, "another model of the same shape is further off"


@pytest.mark.parametrize("text", ["budgets = {Q9 = 0.1}", "budgets = {Q8_0 = 0}", "prompts = -1"])
def test_a_budget_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    from tutor.errors import RecipeError

    path = tmp_path / "a.toml"
    path.write_text(f"[parity]\n{text}\n")
    with pytest.raises(RecipeError, match="parity"):
        read_recipe(path)


# Memory


def test_a_model_that_does_not_fit_in_fp32_is_asked_in_bf16_and_one_that_does_not_fit_at_all_is_not() -> None:
    pytest.importorskip("torch")
    from tutor.stages.parity.stage import transformers_precision

    giga = 1 << 30
    assert [transformers_precision(16 * giga, free * giga) for free in (40, 33, 32, 17, 16, 0)] == [
        "fp32",
        "fp32",
        "bf16",
        "bf16",
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("limit", "expected"), [("max\n", 5000 * 1024), ("4096000\n", 4096000 - 96000), (None, 5000 * 1024)]
)
def test_free_memory_is_the_machine_s_or_less_in_a_container(tmp_path: Path, limit: str | None, expected: int) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("a GPU's memory is asked of its driver")
    from tutor.machine.device import loading_memory

    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    meminfo = "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 5000 kB\nSwapFree: 700 kB\n"
    (tmp_path / "proc/meminfo").write_text(meminfo)
    if limit:
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/memory.max").write_text(limit)
        (tmp_path / "sys/fs/cgroup/memory.current").write_text("96000\n")
    assert loading_memory(tmp_path).available == expected


# The pipeline

NO = {"message": "F16 -> Q8_0 (quantize) diverges in its tokens: «code»", "hint": "most likely: x"}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "small.toml"
    path.write_text("")
    return Recipe(system=SYSTEM, ollama=OllamaSettings(quantization="Q8_0"), path=path)


@pytest.fixture
def build(recipe: Recipe, tmp_path: Path) -> Path:
    make_stages(recipe, tmp_path / "build")
    return tmp_path / "build"


def test_a_gate_that_said_no_says_it_again_and_keeps_its_folder(recipe: Recipe, build: Path) -> None:
    made = write_parity(recipe, build, refused=NO)
    for _ in range(2):
        with pytest.raises(GateError, match=r"F16 -> Q8_0 .* diverges in its tokens.*most likely") as caught:
            pipeline.pass_gate(made)
    assert caught.value.code == 8
    assert find_damage(made) == []


def test_a_refused_stage_is_neither_up_to_date_nor_made_again(recipe: Recipe, build: Path) -> None:
    manifest = read_manifest(write_parity(recipe, build, refused=NO))
    assert manifest is not None
    state = pipeline.State(BY_NAME["parity"], build / "small/parity", manifest, manifest.fields, ())
    assert state.condition == "refused"
    assert state.condition in pipeline.MADE
    assert pipeline.differences(state) == [NO["message"]]
    assert replace(state, fields={}).condition == "stale", "another input is another question"


def test_the_summary_shows_the_hand_offs(recipe: Recipe) -> None:
    stages = {"parity": {"hand_offs": [over("merge").record()]}}
    found = summary.summary_lines({"stages": stages, "examples": []}, "x.toml")
    assert any("a -> b" in line and "6/7" not in line for line in found)
