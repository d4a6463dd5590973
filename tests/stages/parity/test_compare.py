"""stages/parity/compare.py: the differences of two engines that count, and their figures."""

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from support.outputs.observations import SUBJECTS, TIGHT, observation, scored
from support.outputs.parity import trace

from tutor.engines.trace import EOS_TEXT, Score, Step, Trace, divergence
from tutor.stages.parity.compare import Comparison, Observation, Tolerance, compare_engines
from tutor.stages.parity.gate import SAME_FILE, quantization_tolerance

LOOSE = quantization_tolerance(0.05)
WIDE = Tolerance(kl=9, mean=None, worst=None, margin=0.2)


def checked(
    theirs: Observation, tolerance: Tolerance = TIGHT, ours: Observation | None = None
) -> dict[str, Comparison]:
    return {check.name: check for check in compare_engines([ours or observation()], [theirs], tolerance)}


def failing(theirs: Observation, tolerance: Tolerance = TIGHT, ours: Observation | None = None) -> list[str]:
    return [name for name, check in checked(theirs, tolerance, ours).items() if not check.ok]


def cut_by_a_stop_text() -> Trace:
    """The answer of `trace` that ends after two steps, although its probabilities are equal."""
    first, second, third, *_ = trace().steps
    return Trace((first, second, replace(third, text=EOS_TEXT)), "eos", 1)


def one_step(*candidates: tuple[str, float]) -> Observation:
    """An answer of one token, the best of these candidates, without a given answer."""
    text, logprob = candidates[0]
    return observation(scored=None, trace=Trace((Step(text, logprob, candidates),), None, 3))


def test_equal_observations_have_no_difference() -> None:
    found = checked(observation())
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
        ({"trace": cut_by_a_stop_text()}, "end", "after 2 equal steps: one goes on and one ends"),
    ],
)
def test_each_difference_is_found_and_shown(change: dict[str, Any], check: str, what: str) -> None:
    found = checked(observation(**change))
    assert next(name for name, item in found.items() if not item.ok) == check
    assert re.search(what, found[check].what)


def test_other_token_at_the_end_of_a_given_answer_is_found() -> None:
    found = checked(
        observation(scored=scored(-0.5, -0.3, best=False)), Tolerance(kl=9, mean=None, worst=None, margin=0.2)
    )
    assert [name for name, check in found.items() if not check.ok] == ["end"]
    assert "behind the given answer: one ends and one goes on" in found["end"].what


def test_difference_below_the_tolerance_passes() -> None:
    assert failing(observation(scored=scored(-0.501, -0.302), trace=trace(logprob=-0.105))) == []


def test_other_greedy_token_is_tolerated_only_as_a_near_tie() -> None:
    def differing(margin: float, tolerance: Tolerance = WIDE) -> list[str]:
        ours, theirs = (one_step((a, -0.7), (b, -0.7 - margin)) for a, b in ((" Una", " Un"), (" Un", " Una")))
        return failing(theirs, tolerance, ours)

    assert differing(0.1) == []
    assert differing(0.3) == ["greedy answer"]
    assert differing(0.3, LOOSE) == [], "a quantization may give another answer"


def test_missing_end_is_tolerated_only_as_a_near_tie() -> None:
    def differing(margin: float) -> list[str]:
        ours, theirs = (one_step((a, -0.7), (b, -0.7 - margin)) for a, b in ((EOS_TEXT, " y"), (" y", EOS_TEXT)))
        return failing(theirs, WIDE, ours)

    assert differing(0.1) == []
    assert differing(0.3) == ["end"]


def test_values_that_one_engine_lacks_are_in_no_figure() -> None:
    found = checked(Observation("code", None, None, None, None, None))
    assert {check.figures.get("of", check.figures.get("tokens")) for check in found.values()} == {0}


def test_values_that_the_first_engine_lacks_are_in_no_figure() -> None:
    found = checked(observation(), ours=Observation("code", None, None, 3))
    assert found["tokens"].figures == {"equal": 1, "of": 1}
    assert checked(observation(prompt="x"))["prompt"].figures == {"equal": 0, "of": 1}
    assert checked(observation(), ours=Observation("code"))["tokens"].figures == {"equal": 0, "of": 0}
    assert {found[name].figures.get("of", 0) for name in SUBJECTS if name != "tokens"} == {0}


# Nothing compared


FLAT = tuple((f" {number}", -5.0 - number / 100) for number in range(20))
"""Candidates of a model of random weights: each is about as probable as the next one."""


def test_first_step_is_compared_where_no_token_is_equal() -> None:
    """Seen: 0 of 128 tokens equal between llama.cpp and Ollama with 8B random weights, and no figure at all."""
    other = (FLAT[1], FLAT[0], *FLAT[2:])
    found = checked(one_step(*other), SAME_FILE, one_step(*FLAT))
    assert all(check.ok for check in found.values())
    assert found["greedy answer"].figures["agreed"] == 0
    assert found["log-probabilities"].figures["tokens"] == 1
    assert found["log-probabilities"].figures["kl"] == pytest.approx(0, abs=1e-4)


def test_flat_candidates_of_another_model_are_a_difference() -> None:
    """The margins are near ties, but neither side chose a candidate of the other."""
    theirs = one_step(*((f" x{text}", logprob) for text, logprob in FLAT))
    assert failing(theirs, SAME_FILE, one_step(*FLAT)) == ["greedy answer"]
    assert failing(theirs, LOOSE, one_step(*FLAT)) == ["log-probabilities"], "its answers may differ"


def test_candidate_far_below_the_best_is_no_tie() -> None:
    far = ((" a", -1.0), (" b", -1.05), (" c", -3.0))
    ours, theirs = one_step(*far), one_step((" c", -1.0), (" b", -1.05), (" a", -3.0))
    assert "greedy answer" in failing(theirs, SAME_FILE, ours)


@pytest.mark.parametrize("tolerance", [TIGHT, LOOSE, SAME_FILE])
def test_comparison_of_no_weights_is_a_difference(tolerance: Tolerance) -> None:
    silent = observation(scored=None, trace=None)
    assert failing(silent, tolerance) == ["log-probabilities"]
    (check,) = (check for check in checked(silent, tolerance).values() if not check.ok)
    assert (check.what, check.figures) == ("nothing could be compared", {"tokens": 0})
    found = compare_engines([observation()], [silent], tolerance, answers=False)
    assert [item.name for item in found if not item.ok] == [], "a server that answers nothing to compare"


def test_comparison_of_no_prompts_is_a_difference() -> None:
    assert failing(observation(prompt=None, ids=None, tokens=None)) == ["tokens"]
    assert failing(observation(prompt=None)) == failing(observation(ids=None, tokens=None)) == []


def test_comparison_of_no_conversation_is_a_difference() -> None:
    assert [item.name for item in compare_engines([], [], TIGHT) if not item.ok] == ["tokens", "log-probabilities"]


def test_equal_answers_show_the_weights_without_probabilities() -> None:
    silent = Trace(tuple(replace(step, logprob=None, top=()) for step in trace().steps), "eos", 3)
    assert failing(observation(scored=None, trace=silent), SAME_FILE) == []
    other = replace(silent, steps=(replace(silent.steps[0], text=" Otra"),))
    assert failing(observation(scored=None, trace=other), SAME_FILE, observation(scored=None, trace=silent)) == [
        "greedy answer"
    ]


def test_divergence_must_be_known_where_it_alone_is_limited() -> None:
    steps = tuple(replace(step, top=()) for step in trace().steps)
    plain = observation(scored=None, trace=Trace(steps, "length", 3))
    other = observation(scored=None, trace=Trace((*steps[:-1], Step(" y", -0.1)), "length", 3))
    assert failing(plain, SAME_FILE, plain) == [], "their mean and worst difference is limited, too"
    assert failing(other, LOOSE, plain) == ["log-probabilities"]


# Numbers that are none


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tolerance", [TIGHT, LOOSE, SAME_FILE])
@pytest.mark.parametrize("place", ["given answer", "its candidates", "step", "candidates"])
def test_number_that_is_not_finite_is_a_difference(value: float, tolerance: Tolerance, place: str) -> None:
    last, *_ = trace().steps
    other = {
        "given answer": {"scored": scored(-0.5, value)},
        "its candidates": {"scored": Score((-0.5, -0.3), (((0, -0.5), (99, value)), ((1, -0.3), (99, -2.3))))},
        "step": {"trace": Trace((replace(last, logprob=value),), None, 3)},
        "candidates": {"trace": Trace((replace(last, top=((last.text, -0.1), ("", value))),), None, 3)},
    }[place]
    for sides in ((observation(), observation(**other)), (observation(**other), observation())):
        found = {check.name: check for check in compare_engines(sides[:1], sides[1:], tolerance)}
        assert not found["log-probabilities"].ok
        json.dumps(found["log-probabilities"].figures, allow_nan=False)


def test_end_with_a_margin_that_is_no_number_is_a_difference() -> None:
    ends, goes_on = scored(-0.5, -0.3), scored(-0.5, -0.3, best=False)
    broken = replace(goes_on, top=(goes_on.top[0], ((99, math.nan), goes_on.top[1][1])))
    ours, theirs = observation(scored=ends), observation(scored=broken)
    assert "end" in failing(theirs, WIDE, ours)
    assert "end" in failing(ours, WIDE, theirs)


def test_kl_divergence_over_the_budget_is_a_difference() -> None:
    """The probabilities of the answer's own tokens are equal: only those of other candidates differ."""
    other = scored(-0.5, -0.3)
    other = replace(other, top=(((0, -0.5), (98, -1.2)), other.top[1]))
    ours, theirs = observation(trace=None), observation(trace=None, scored=other)
    kl = divergence(dict(scored(-0.5, -0.3).top[0]), dict(other.top[0])) / 2
    figures = checked(theirs, ours=ours)["log-probabilities"].figures
    assert figures == {"tokens": 2, "change": 0, "mean": 0, "worst": 0, "kl": round(kl, 6)}
    assert failing(theirs, quantization_tolerance(1.01 * kl), ours) == []
    assert failing(theirs, quantization_tolerance(0.99 * kl), ours) == ["log-probabilities"]


def test_change_of_log_probabilities_is_a_signed_mean() -> None:
    found = checked(observation(trace=None, scored=scored(-0.9, -0.1)), ours=observation(trace=None))[
        "log-probabilities"
    ]
    assert [found.figures[name] for name in ("change", "mean", "worst")] == [-0.1, 0.3, 0.4]


def test_greedy_figures_count_equal_steps_and_answers() -> None:
    whole = trace((" a", " b", " c"))
    for theirs, wanted in (
        (whole, {"agreed": 4, "steps": 4, "equal": 1, "of": 1}),
        (trace((" a", " x", " c")), {"agreed": 1, "steps": 4, "equal": 0, "of": 1}),
        (Trace(whole.steps[:2], None, 3), {"agreed": 2, "steps": 4, "equal": 0, "of": 1}),
    ):
        assert checked(observation(trace=theirs), ours=observation(trace=whole))["greedy answer"].figures == wanted
    shorter = checked(observation(trace=whole), ours=observation(trace=Trace(whole.steps[:2], None, 3)))
    assert shorter["greedy answer"].figures == {"agreed": 2, "steps": 2, "equal": 0, "of": 1}


def test_steps_after_the_first_difference_are_not_compared() -> None:
    theirs = observation(scored=None, trace=trace((" a", " x", " c"), logprob=-0.1))
    ours = observation(scored=None, trace=trace((" a", " b", " c"), logprob=-0.1))
    assert checked(theirs, ours=ours)["log-probabilities"].figures["tokens"] == 1


def test_step_without_probability_is_compared_as_text() -> None:
    silent = observation(scored=None, trace=Trace((*trace().steps[:-1], Step(EOS_TEXT, None)), "eos", 3))
    for ours, theirs in ((silent, observation(scored=None)), (observation(scored=None), silent)):
        found = checked(theirs, ours=ours)
        assert all(check.ok for check in found.values())
        assert found["log-probabilities"].figures["tokens"] == 6


def test_end_of_a_given_answer_is_tolerated_only_as_near_tie() -> None:
    def ending(margin: float) -> Observation:
        places = scored(-0.9, -0.8, -0.7).top[:2]
        return observation(trace=None, scored=Score((-0.9, -0.8, -0.7), (*places, ((99, margin - 0.7), (2, -0.7)))))

    ours, wide = (
        observation(trace=None, scored=scored(-0.9, -0.8, -0.7)),
        Tolerance(kl=9, mean=None, worst=None, margin=0.2),
    )
    assert failing(ending(0.1), wide, ours) == []
    assert failing(ending(0.3), wide, ours) == ["end"]
    assert failing(ending(0.3), quantization_tolerance(9), ours) == [], "a quantization may end elsewhere"
    for other in (trace((" Una", " interfaz")), Trace(trace().steps[:-1], None, 3)):
        assert failing(observation(trace=other), quantization_tolerance(9)) == []


def test_ends_of_given_and_greedy_answers_are_counted() -> None:
    assert checked(observation())["end"].figures == {"equal": 2, "of": 2}
    assert checked(observation(scored=scored(-0.5, -0.3, best=False)))["end"].figures == {"equal": 1, "of": 2}
    assert checked(observation(trace=trace((" Una", " interfaz"))))["end"].figures == {"equal": 1, "of": 2}


def test_step_of_unknown_margin_uses_the_other_margin() -> None:
    silent = observation(trace=Trace((Step(" Un", None),), None, 3))
    for margin, wanted in ((0.1, []), (1.5, ["greedy answer"])):
        step = Step(" Una", -0.7, ((" Una", -0.7), (" Un", -0.7 - margin)))
        known = observation(trace=Trace((step,), None, 3))
        assert failing(silent, ours=known) == failing(known, ours=silent) == wanted


def test_answer_of_other_length_is_a_difference_of_tokens() -> None:
    assert failing(observation(ids=(1, 5), scored=scored(-0.5, -0.3, -0.1)))[0] == "tokens"


def test_step_of_several_tokens_is_compared_as_text() -> None:
    ours = observation(trace=Trace((Step("👩", -9.0, tokens=3), Step(" a", -0.1)), "length", 3))
    theirs = observation(trace=Trace((Step("👩", -0.2), Step(" a", -0.1)), "length", 3))
    assert failing(theirs, ours=ours) == []
