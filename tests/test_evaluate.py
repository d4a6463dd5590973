"""stages/evaluate.py: the loop over prompts with engines in this process, the figures, and a run on fake programs."""

import contextlib
import json
import math
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_typescript import pretend  # noqa: F401 - a fixture

from tutor.engines.answer import Answer, Engine, Finish, Generation
from tutor.engines.llamacpp_build import MARKER, PROGRAMS
from tutor.errors import ArtifactError, ServiceError
from tutor.recipe import Recipe
from tutor.stages.evaluate import (
    RATES,
    ask,
    ask_all,
    compare_table,
    judged,
    perplexity,
    rates,
    read_rows,
    run,
    side_by_side,
    summarise,
    with_code,
)
from tutor.template import Message, render

GREEDY = Generation(max_new_tokens=50, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=7)
SPANISH = (
    " Una interfaz describe la forma de un objeto y sus propiedades.\n\n"
    "```ts\ninterface A { b: string }\n```\n\nÚsala cuando varias funciones la compartan."
)
ENGLISH = " An interface describes the shape of an object and all of its properties, one by one."
PROMPTS = [
    {"instruction": f"¿Qué es {name}?", "category": category, "topic": "t", "code": [], "expect": {"code": True}}
    for name, category in (("a", "definicion"), ("b", "ejemplo"), ("c", "definicion"), ("d", "ejemplo"))
]


def an_answer(text: str = SPANISH, finish: Finish = "stop", tokens: int = 10, speed: float = 20.0) -> Answer:
    return Answer(text, finish, 12, tokens, 0.5, speed)


@dataclass
class Fake:
    """Answers in Spanish, unless the script has an error for a question; `dead` from the n-th request on."""

    faults: dict[str, str] = field(default_factory=dict)
    dead_from: int | None = None
    name: str = "fake"
    asked: list[tuple[str, Generation]] = field(default_factory=list)

    def answer(
        self, messages: Sequence[Message], generation: Generation, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        self.asked.append((render(messages), generation))
        if self.dead_from is not None and len(self.asked) >= self.dead_from:
            raise ServiceError("connection refused")
        if fault := self.faults.get(messages[-1]["content"]):
            raise ServiceError(fault)
        return an_answer()


def starter(*engines: Engine) -> Callable[[], contextlib.AbstractContextManager[Engine]]:
    """Gives the engines one after the other, as a server that is started again."""
    left = list(engines)

    @contextlib.contextmanager
    def start() -> Iterator[Engine]:
        yield left.pop(0)

    return start


def test_every_prompt_is_asked_once_in_order_after_one_warm_up() -> None:
    engine = Fake()
    records = ask(engine, PROMPTS, GREEDY, "Eres un tutor.", "tutor")
    assert len(records) == 4
    assert [prompt for prompt, _ in engine.asked[1:]] == [
        f"Eres un tutor.\n\nInstrucción: {prompt['instruction']}\nRespuesta:" for prompt in PROMPTS
    ]
    assert engine.asked[0][1].max_new_tokens == 1
    assert {generation for _, generation in engine.asked[1:]} == {GREEDY}


def test_a_prompt_that_fails_is_a_record_and_the_rest_is_asked() -> None:
    engine = Fake(faults={"¿Qué es b?": "the prompt is too long"})
    records = ask(engine, PROMPTS, GREEDY, "", "tutor")
    assert records[1] == {"error": "the prompt is too long"}
    assert ["verdicts" in record for record in records] == [True, False, True, True]


def test_a_dead_engine_is_started_again_at_the_prompt_it_died_on() -> None:
    first, second = Fake(dead_from=4), Fake()
    records = ask_all(starter(first, second), PROMPTS, GREEDY, "", "tutor")
    assert ["verdicts" in record for record in records] == [True] * 4
    assert [prompt[13:23] for prompt, _ in second.asked[1:]] == ["¿Qué es c?", "¿Qué es d?"]


def test_an_engine_that_dies_again_ends_the_run() -> None:
    with pytest.raises(ServiceError, match="died 2 times, the last time at prompt 3 of 4"):
        ask_all(starter(Fake(dead_from=3), Fake(dead_from=3)), PROMPTS, GREEDY, "", "tutor")


def test_an_engine_that_never_answers_ends_the_run_at_once() -> None:
    with pytest.raises(ServiceError, match="refused"):
        ask_all(starter(Fake(dead_from=1)), PROMPTS, GREEDY, "", "tutor")


def test_an_answer_is_kept_as_it_came_with_its_verdicts() -> None:
    record = judged(an_answer(ENGLISH, finish="length"))
    assert record["text"] == ENGLISH
    assert {name for name in RATES if not record["verdicts"][name]} == {"stopped", "code_block", "spanish"}
    json.dumps(record, allow_nan=False)


def test_rates_count_an_error_as_no_pass() -> None:
    counted = rates([judged(an_answer()), judged(an_answer(ENGLISH)), {"error": "x"}])
    assert (counted["n"], counted["errors"]) == (3, 1)
    assert counted["spanish"] == {"n": 1, "share": 0.3333}
    assert counted["answered"] == {"n": 2, "share": 0.6667}


def test_no_prompts_are_no_division() -> None:
    assert rates([])["spanish"] == {"n": 0, "share": 0.0}
    assert summarise([], [])["tokens_per_second"] is None


def test_a_summary_is_by_category_with_the_median_speed() -> None:
    speeds = (10.0, 30.0, 50.0)
    records = [judged(an_answer(speed=speed)) for speed in speeds] + [judged(an_answer(tokens=1, speed=9999.0))]
    summary = summarise(PROMPTS, records)
    assert {name: part["n"] for name, part in summary["categories"].items()} == {"definicion": 2, "ejemplo": 2}
    assert summary["all"]["n"] == 4
    assert summary["tokens_per_second"] == 30.0


def test_answers_stand_side_by_side_with_their_prompt() -> None:
    rows = side_by_side(PROMPTS[:1], {"base": [{"error": "x"}], "tutor": [{"text": "y"}]})
    assert rows == [{**PROMPTS[0], "answers": {"base": {"error": "x"}, "tutor": {"text": "y"}}}]


def test_perplexity_is_weighted_by_token() -> None:
    result = perplexity([[-1.0], [-2.0, -2.0, -2.0]])
    assert (result["loss"], result["tokens"]) == (1.75, 4)
    assert result["perplexity"] == pytest.approx(math.exp(1.75))


@given(st.lists(st.lists(st.floats(-30, 0), min_size=1, max_size=5), min_size=1, max_size=5))
def test_perplexity_does_not_depend_on_how_tokens_are_grouped(rows: list[list[float]]) -> None:
    assert perplexity(rows)["loss"] == pytest.approx(
        perplexity([[value for row in rows for value in row]])["loss"], abs=1e-12
    )


@pytest.mark.parametrize("rows", [[[math.nan]], [[-math.inf, -1.0]], [[-800.0]], []])
def test_a_loss_that_is_no_number_is_an_error(rows: list[list[float]]) -> None:
    with pytest.raises(ArtifactError, match="held-out loss"):
        perplexity(rows)


def test_rows_are_lines_and_nothing_else_is_a_line_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a\u2028b"}\n{"instruction": "c"}\n', "utf-8")
    assert [row["instruction"] for row in read_rows(path)] == ["a\u2028b", "c"]
    path.write_text('{"instruction": ', "utf-8")
    with pytest.raises(ArtifactError, match=r"rows\.jsonl"):
        read_rows(path)


def test_the_closing_table_compares_the_models() -> None:
    models = {
        name: {"file": f"{name}-Q8_0", **summarise(PROMPTS, [judged(an_answer(text))] * 4)}
        for name, text in (("base", ENGLISH), ("tutor", SPANISH))
    }
    scores = {"base-Q8_0": perplexity([[-2.0]]), "tutor-Q8_0": perplexity([[-1.0]])}
    table = compare_table({"models": models, "perplexity": scores})
    assert table[0] == ("", "base", "tutor")
    assert ("in Spanish", "0 % (0/4)", "100 % (4/4)") in table
    assert ("held-out perplexity", "7.39", "2.72") in table
    assert ("tokens/s", "20.0", "20.0") in table


SERVER = """
import json, os, socketserver, sys
from http.server import BaseHTTPRequestHandler
flags = dict(zip(sys.argv[1:], sys.argv[2:]))
model = json.load(open(flags["-m"]))
class Handler(BaseHTTPRequestHandler):
    def address_string(self): return "test"
    def log_message(self, *_): pass
    def send(self, kind, body):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self): self.send("application/json", b"{}")
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(model["asked"], "a") as file: file.write(json.dumps(request) + "\\n")
        if model["dies_on"] and model["dies_on"] in request["prompt"]:
            if not os.path.exists(model["asked"] + ".died"):
                open(model["asked"] + ".died", "w").close()
                os._exit(3)
        event = {"content": model["says"], "stop": True, "stop_type": "eos", "tokens_evaluated": 9,
                 "tokens_predicted": 21, "timings": {"predicted_per_second": 40.0}}
        self.send("text/event-stream", b"data: " + json.dumps(event).encode() + b"\\n\\n")
socketserver.UnixStreamServer(flags["--host"], Handler).serve_forever()
"""
SCORER = """
import json, sys
model = json.load(open(sys.argv[1]))
for line in sys.stdin:
    n, *ids = map(int, line.split())
    answer = ids[n:]
    with open(model["asked"], "a") as file: file.write(json.dumps({"scored": ids, "prompt": n}) + "\\n")
    print(json.dumps({"logprobs": [model["logprob"]] * len(answer), "top": [[[0, -1.0]]] * len(answer)}))
"""


@pytest.fixture
def llamacpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build folder whose server and scorer are small programs that do what the "GGUF" (JSON here) says."""
    binaries = tmp_path / "llamacpp" / "bin"
    binaries.mkdir(parents=True)
    for name in PROGRAMS:
        body = {"llama-server": SERVER, "tutor-score": SCORER}.get(name, "")
        path = binaries / name
        path.write_text(f"#!{sys.executable}\n{body}", "utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    sizes = {name: (binaries / name).stat().st_size for name in PROGRAMS}
    (binaries.parent / MARKER).write_text(json.dumps({"sizes": sizes}), "utf-8")
    monkeypatch.setenv("TUTOR_LLAMACPP", str(binaries.parent))


def write_base(folder: Path) -> None:
    """A base folder with a byte tokenizer: EOS is 256, no BOS."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    (folder / "model").mkdir(parents=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={sign: i for i, sign in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens([tokenizers.AddedToken("<fin>", normalized=False, special=True)])
    core.save(str(folder / "model" / "tokenizer.json"))
    labels = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<fin>"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(labels), "utf-8")
    facts = {"source": "tiny", "model": "model", "weights": "0", "vocabulary": 257, "add_bos": False, "bos": None}
    (folder / "base.json").write_text(json.dumps({**facts, "eos": 256, "pad": None, "pre_tokenizer": "x"}), "utf-8")


def write_inputs(root: Path, **tutor: str) -> dict[str, Path]:
    """The folders that the stage reads; `tutor` changes what the tutor's GGUF does."""
    inputs = {name: root / name for name in ("data", "base", "convert")}
    for name in ("data", "convert"):
        inputs[name].mkdir()
    rows = [{**prompt, "response": "Sí."} for prompt in PROMPTS[:2]]
    for name, lines in (("prompts", PROMPTS), ("held_out", rows)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (inputs["data"] / f"{name}.jsonl").write_text(text, "utf-8")
    write_base(inputs["base"])
    base = {"says": ENGLISH, "logprob": -2.0, "asked": str(root / "base.asked"), "dies_on": ""}
    tuned = {**base, "says": SPANISH, "logprob": -1.0, "asked": str(root / "tutor.asked"), **tutor}
    for name, model in (("base-Q4_K_M", base), ("tutor-Q4_K_M", tuned), ("tutor-F16", tuned)):
        (inputs["convert"] / f"{name}.gguf").write_text(json.dumps(model), "utf-8")
    return inputs


def asked(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.usefixtures("llamacpp")
def test_a_run_asks_judges_and_scores_every_model(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    out = tmp_path / "eval.partial"
    out.mkdir()
    summary = run(Recipe(seed=5), inputs, out)
    assert sorted(path.name for path in out.iterdir()) == ["answers.json", "perplexity.json"]
    answers = json.loads((out / "answers.json").read_text("utf-8"))
    assert [entry["instruction"] for entry in answers] == [prompt["instruction"] for prompt in PROMPTS]
    assert answers[0]["answers"]["tutor"]["text"] == SPANISH
    assert answers[0]["answers"]["base"]["verdicts"]["spanish"] is False
    perplexities = json.loads((out / "perplexity.json").read_text("utf-8"))
    assert {name: value["loss"] for name, value in perplexities.items()} == {
        "base-Q4_K_M": 2.0,
        "tutor-F16": 1.0,
        "tutor-Q4_K_M": 1.0,
    }
    assert summary["models"]["tutor"]["all"]["spanish"] == {"n": 4, "share": 1.0}
    assert summary["models"]["base"]["all"]["spanish"] == {"n": 0, "share": 0.0}
    assert summary["models"]["tutor"]["tokens_per_second"] == 40.0
    json.dumps(summary, allow_nan=False)
    assert compare_table(summary)[0] == ("", "base", "tutor")


@pytest.mark.usefixtures("llamacpp")
def test_a_run_is_greedy_with_the_seed_and_scores_the_answer_behind_its_blank_with_eos(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    run(Recipe(seed=5), inputs, tmp_path / "data")
    requests = [line for line in asked(tmp_path / "tutor.asked") if "prompt" in line and "scored" not in line]
    assert all((line["temperature"], line["seed"]) == (0.0, 5) for line in requests)
    assert [line["n_predict"] for line in requests] == [1, 515, 515, 515, 515]
    scored = [line for line in asked(tmp_path / "tutor.asked") if "scored" in line]
    for line in scored[:2]:
        ids, n = line["scored"], line["prompt"]
        assert isinstance(ids, list)
        assert ids[-1] == 256
        assert len(ids) - n == len(" Sí.".encode()) + 1


@pytest.mark.usefixtures("llamacpp")
def test_a_server_that_dies_once_costs_no_answer(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, dies_on="¿Qué es c?")
    out = tmp_path / "eval.partial"
    out.mkdir()
    summary = run(Recipe(), inputs, out)
    assert (tmp_path / "tutor.asked.died").exists()
    assert summary["models"]["tutor"]["all"]["errors"] == 0
    assert summary["models"]["tutor"]["all"]["stopped"]["n"] == 4


@pytest.mark.usefixtures("llamacpp")
def test_without_a_base_gguf_only_the_tutor_is_asked(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    (inputs["convert"] / "base-Q4_K_M.gguf").unlink()
    with pytest.raises(ArtifactError, match=r"base-Q4_K_M\.gguf is missing; run: tutor convert"):
        run(Recipe(), inputs, tmp_path / "data")
    recipe = Recipe.model_validate({"convert": {"base": False}})
    assert list(run(recipe, inputs, tmp_path / "data")["models"]) == ["tutor"]


def test_code_verdicts_are_counted_where_prompts_expect_something(pretend: Path) -> None:  # noqa: F811
    asked = [{"instruction": "¿?", "category": "a", "expect": {"include": [["tupla"]]}}] * 3
    texts = (" Una tupla.\n```ts\na;\n```", " ```ts\nTS2322\n```")
    records = [judged(Answer(text, "stop", 5, 3, 1.0, 9.0)) for text in texts] + [{"error": "died"}]
    found = with_code(asked, records)
    rates = summarise(asked, found)["all"]
    assert (rates["compiles"], rates["expected"]) == ({"n": 1, "share": 0.3333}, {"n": 1, "share": 0.3333})
    assert found[1]["code"]["blocks"][0]["diagnostics"][0]["code"] == "TS2322"
    assert found[2] == records[2]


def test_prompts_that_expect_nothing_leave_the_records_alone() -> None:
    records = [judged(Answer(" Sí.", "stop", 5, 3, 1.0, 9.0))]
    assert with_code([{"instruction": "¿?", "category": "a"}], records) == records
    assert "compiles" not in summarise([{"instruction": "¿?", "category": "a"}], records)["all"]
