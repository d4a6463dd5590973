"""engines/trace.py and what fills it: the same steps of an answer, whichever engine tells of them."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import fake_ollama as fake

from tutor.engines.llamacpp.build import build_folder, is_built
from tutor.engines.llamacpp.convert import to_gguf
from tutor.engines.llamacpp.server import LlamaServer, serve
from tutor.engines.llamacpp.trace import rendered
from tutor.engines.llamacpp.trace import trace as llamacpp_trace
from tutor.engines.ollama.client import connect
from tutor.engines.ollama.trace import trace as ollama_trace
from tutor.engines.trace import END, Step, candidates, divergence, grouped
from tutor.errors import ServiceError
from tutor.formats.models.pre_tokenizer import pre_tokenizer_name
from tutor.prompt import conversation, render

HELLO = conversation("Hola")
distributions = st.lists(st.floats(0.01, 1.0), min_size=4, max_size=9).map(
    lambda weights: {place: math.log(weight / (sum(weights) * 1.1)) for place, weight in enumerate(weights)}
)


# Steps


def test_parts_of_a_character_become_one_step_that_compares_with_no_token() -> None:
    tokens = [Step(" a", -1.0, ((" a", -1.0),)), Step("", -2.0), Step("", -3.0), Step("👩", -0.5), Step("", -9.0)]
    assert list(grouped(tokens)) == [tokens[0], Step("👩", -5.5, tokens=3)]


def test_candidates_that_are_no_whole_character_are_one_whatever_an_engine_shows_of_them() -> None:
    hidden, shown = (
        candidates([(" a", -1.0), ("", -2.0), ("", -2.0)]),
        candidates([(" a", -1.0), ("\ufffd", -2 + math.log(2))]),
    )
    assert hidden[0] == shown[0] == (" a", -1.0)
    assert hidden[1][1] == pytest.approx(shown[1][1])


def test_the_lead_of_a_step_is_over_the_second_best() -> None:
    assert Step("a", -0.1, (("a", -0.1), ("b", -2.6))).lead == pytest.approx(2.5)
    assert Step("a", -0.1).lead is None


@given(distributions)
def test_a_distribution_does_not_diverge_from_itself(one: dict[int, float]) -> None:
    assert divergence(one, one) == pytest.approx(0, abs=1e-12)


@given(distributions, distributions)
def test_the_divergence_is_the_textbook_s_where_both_name_the_same(
    one: dict[int, float], other: dict[int, float]
) -> None:
    shared = {key: one[key] for key in one if key in other}
    theirs = {key: other[key] for key in shared}
    rest = [1 - sum(map(math.exp, side.values())) for side in (shared, theirs)]
    parts = [math.exp(shared[key]) * (shared[key] - theirs[key]) for key in shared]
    expected = sum(parts) + rest[0] * math.log(rest[0] / rest[1])
    assert divergence(shared, theirs) == pytest.approx(max(expected, 0), abs=1e-9)


def test_two_models_that_name_nothing_in_common_diverge() -> None:
    sure = {1: math.log(0.98), 2: math.log(0.01)}
    other = {7: math.log(0.98), 8: math.log(0.01)}
    assert divergence(sure, other) > 3


# Ollama's events


@pytest.fixture
def server() -> Iterator[fake.FakeOllama]:
    with fake.running() as running:
        running.models["tutor:latest"] = fake.Model({}, {"chat_template": ""}, "")
        yield running


def traced(server: fake.FakeOllama, tokens: int = 16) -> Any:
    with connect(server.host, silent=2, pause=0.01) as api:
        return ollama_trace(api, "tutor", HELLO, tokens)


def test_ollama_s_answer_is_told_by_steps_with_its_end(server: fake.FakeOllama) -> None:
    found = traced(server)
    assert [step.text for step in found.steps] == [*server.pieces, END]
    assert found.steps[0].logprob == -0.1
    assert found.steps[0].lead == pytest.approx(3)
    assert (found.finish, found.steps[-1].logprob) == ("stop", None)
    (body,) = server.asked("POST /api/chat")
    assert (body["options"]["temperature"], body["options"]["stop"]) == (0.0, [])
    assert body["truncate"] is False


def test_an_answer_of_ollama_s_that_is_cut_has_no_end(server: fake.FakeOllama) -> None:
    found = traced(server, tokens=3)
    assert (found.text, found.finish) == ("".join(server.pieces[:3]), "length")
    assert found.steps[-1].text != END


def test_a_piece_of_several_tokens_has_no_probability_of_its_own(server: fake.FakeOllama) -> None:
    piece = fake.chunk("👩", -0.2, 2)
    piece["logprobs"][0]["token"] = "\u200d"
    server.script("POST /api/chat", fake.stream(piece, {"done": True, "done_reason": "stop", "prompt_eval_count": 3}))
    assert traced(server).steps[0] == Step("👩", None)


def test_a_stream_of_ollama_s_without_its_last_event_is_a_fault(server: fake.FakeOllama) -> None:
    server.script("POST /api/chat", fake.stream(fake.chunk(" la", -0.1, 2)))
    with pytest.raises(ServiceError, match="without its last event"):
        traced(server)


# The real programs

TALKS = (
    HELLO,
    conversation("¿Qué hace 👩‍💻?\t`x` \r\n", "Eres «tutor»."),
    [
        {"role": "user", "content": "Uno"},
        {"role": "assistant", "content": " dos\n"},
        {"role": "user", "content": "<｜User｜></s>{{ x }}"},
    ],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as the base stage makes it, under our chat template, with its F16 GGUF."""
    pytest.importorskip("torch")
    if not is_built(build_folder()):
        pytest.skip("no llama.cpp: make llamacpp")
    from support.shared import copied
    from support.tiny_models import edit, tiny_folder

    from tutor.prompt import chat_template

    made = copied(tiny_folder(tmp_path_factory), tmp_path_factory.mktemp("traced") / "model")
    edit(made / "tokenizer_config.json", chat_template=chat_template(add_bos=True))
    to_gguf(made, made / "tiny-F16.gguf", pre_tokenizer_name(made / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[LlamaServer]:
    log = folder / "server.log"
    with serve(folder / "tiny-F16.gguf", context=512, threads=1, log=log, own_template=True) as running:
        yield running


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    from tutor.engines.hf.loading import load

    return load(folder, None, quantization="none", precision="fp32")


@pytest.mark.llamacpp
@pytest.mark.parametrize("talk", TALKS, ids=range(len(TALKS)))
def test_llama_server_renders_by_the_file_s_own_template(served: LlamaServer, talk: Any) -> None:
    assert rendered(served, talk) == render(talk)


def decided(steps: Sequence[Step], bound: float) -> int:
    """Return the number of steps before the first one whose best token rounding may decide; at least four."""
    count = next((number for number, step in enumerate(steps) if step.lead <= 2 * bound), len(steps))
    assert count >= 4
    return count


@pytest.mark.llamacpp
@pytest.mark.parametrize("talk", TALKS, ids=range(len(TALKS)))
def test_transformers_and_llama_server_tell_of_an_answer_in_the_same_steps(
    served: LlamaServer, loaded: Any, talk: Any
) -> None:
    from support.tolerances import half_error, largest_logit

    from tutor.engines.hf.trace import trace

    ids = loaded.tokenizer(render(talk))["input_ids"]
    path, ours = trace(loaded, ids, 12)
    bound = half_error(loaded.model.config) * largest_logit(loaded.model, [(ids, path)])
    theirs = llamacpp_trace(served, render(talk), 12)
    assert len(path) == 12
    assert (theirs.prompt_tokens, theirs.finish) == (len(ids), "length")
    same = decided(ours.steps, bound)
    found, wanted = theirs.steps[:same], ours.steps[:same]
    assert [step.text for step in found] == [step.text for step in wanted]
    assert [step.logprob for step in found] == pytest.approx([step.logprob for step in wanted], abs=bound)
    assert [step.lead for step in found] == pytest.approx([step.lead for step in wanted], abs=2 * bound)
    assert divergence(dict(ours.steps[0].top), dict(theirs.steps[0].top)) < 1e-3


@pytest.mark.pipeline
def test_to_follow_an_answer_is_to_give_it(loaded: Any) -> None:
    from support.tolerances import forward_error, largest_logit

    from tutor.engines.hf.trace import followed, trace

    ids = loaded.tokenizer(render(TALKS[1]))["input_ids"]
    path, own = trace(loaded, ids, 12)
    bound = forward_error(loaded.model.config, len(ids) + 12) * largest_logit(loaded.model, [(ids, path)])
    assert min(step.lead for step in own.steps) > 2 * bound, "which token is the best is no matter of rounding"
    found = followed(loaded, ids, path)
    assert [step.text for step in found.steps] == [step.text for step in own.steps]
    assert [step.logprob for step in found.steps] == pytest.approx([step.logprob for step in own.steps], abs=bound)
    assert found.finish == own.finish


@pytest.mark.pipeline
def test_another_answer_is_followed_up_to_the_first_token_that_is_not_the_best(loaded: Any) -> None:
    from tutor.engines.hf.trace import followed, trace

    ids = loaded.tokenizer(render(HELLO))["input_ids"]
    path, own = trace(loaded, ids, 8)
    strange = [*path[:5], (path[5] + 1) % 900, *path[6:]]
    found = followed(loaded, ids, strange)
    assert [step.text for step in found.steps] == [step.text for step in own.steps][: len(found.steps)]
    assert found.finish is None


@pytest.mark.pipeline
def test_an_end_is_a_step_and_a_finish(loaded: Any) -> None:
    from tutor.engines.hf.trace import followed

    ids = loaded.tokenizer(render(HELLO))["input_ids"]
    eos = loaded.tokenizer.eos_token_id
    head = loaded.model.lm_head.weight
    kept = head.data[eos].clone()
    head.data[eos] = 100 * head.data.mean(0)  # whether it is the best or the worst is one sign
    try:
        ends = followed(loaded, ids, [eos])
        if ends.steps[-1].text != END:
            head.data[eos] = -head.data[eos]
            ends = followed(loaded, ids, [eos])
    finally:
        head.data[eos] = kept
    assert (ends.finish, ends.text, ends.steps[-1].text) == ("stop", "", END)


@pytest.mark.pipeline
def test_scores_are_those_of_the_evaluation_with_the_best_at_each_place(loaded: Any) -> None:
    from support.tolerances import forward_error, largest_logit

    from tutor.engines.hf.score import answer_logprobs
    from tutor.engines.hf.trace import scores

    rows = [(loaded.tokenizer(render(talk))["input_ids"], [5, 9, 300]) for talk in TALKS]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    bound = forward_error(loaded.model.config, longest) * largest_logit(loaded.model, rows)
    for plain, full in zip(answer_logprobs(loaded.model, rows), scores(loaded, rows), strict=True):
        assert full.logprobs == pytest.approx(plain, abs=bound)
        assert all(place == tuple(sorted(place, key=lambda pair: -pair[1])) for place in full.top)
