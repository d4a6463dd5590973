"""stages/lint*.py and similar.py: every kind of finding with its line, what is no finding, figures, and the page."""

import json
import random
import re
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support.command import ROOT
from support.files import write_rows
from support.small_tokenizer import SENTENCES

from tutor.cli.commands.data import lint_command
from tutor.errors import ArtifactError, DataError, RecipeError
from tutor.stages.data.lint.figures import histogram
from tutor.stages.data.lint.linter import KINDS, NEAR, LintReport, lint
from tutor.stages.data.lint.near_duplicates import Questions, groups_by_key, near_pairs, nearest
from tutor.stages.data.lint.page import lint_page
from tutor.stages.data.lint.rows import LISTED, SAMPLE
from tutor.stages.data.splitting import normalise

ANSWER = "Es un valor que el compilador comprueba antes de ejecutar el programa, y nada más."
WORDS = re.findall(
    r"\w+",
    "interfaz genérico unión enum clase módulo tupla función promesa literal índice alias clave valor mapa conjunto "
    "lista bucle error aviso cadena número objeto método campo rango fecha precio pedido cliente",
)


def row(instruction: str, response: str = "", **other: Any) -> dict[str, Any]:
    return {"instruction": instruction, "response": response or f"{ANSWER} ({instruction})", **other}


def look(folder: Path, rows: list[Any], against: list[Any] | None = None, **options: Any) -> LintReport:
    write_rows(folder / "rows.jsonl", rows)
    if against is not None:
        write_rows(folder / "prompts.jsonl", against)
    held_out = folder / "prompts.jsonl" if against is not None else None
    return lint([folder / "rows.jsonl"], held_out, **{"max_length": 1024, **options})


def found(report: LintReport) -> list[tuple[str, int]]:
    return [(each.kind, each.line) for each in report.findings]


GOOD = [
    row(f"¿Qué es {a} frente a {b}?", category="abc"[n % 3])
    for n, (a, b) in enumerate(zip(WORDS[::2], WORDS[1::2], strict=True))
]


def test_good_rows_have_no_finding(tmp_path: Path) -> None:
    report = look(tmp_path, GOOD, [{"instruction": "¿Para qué sirve el operador de propagación?"}])
    assert (report.findings, report.counts) == ((), {})
    assert report.figures["rows"] == len(GOOD)
    json.dumps(report.as_dict())


@pytest.mark.parametrize(
    ("extra", "kind", "says"),
    [
        ({"instruction": "¿Y la respuesta?"}, "schema", "lacks response"),
        (["no", "object"], "schema", "is a list"),
        (row("¿Cómo?", "Así: <|im_end|> y ya."), "special-token", "<|im_end|>"),
        (row("¿Cómo?", "Pon [INST] delante de todo y nada más, como antes."), "special-token", "[INST]"),
        (row("¿Cómo?", "Al final </s> se acaba el texto que se ha escrito."), "special-token", "</s>"),
        (row("¿Cómo?", f"{ANSWER}\n\n```ts\nlet x = 1;"), "fence", "in response does not close"),
        (row("¿Cómo va?\n~~~\nx", ANSWER), "fence", "in instruction does not close"),
        (row("¿Cómo?", f"{ANSWER} " * 50), "length", "4155 characters; train.max_length is 1024 tokens"),
        (row("  ¿QUE es interfaz frente a genérico ", GOOD[0]["response"]), "duplicate", "repeats line 1"),
        (row("¿Qué es interfaz frente a genérico?", "No dice lo mismo, ni mucho menos."), "contradiction", "line 1"),
        (row("¿Qué es la interfaz frente a genérico?", "Tampoco dice lo mismo."), "near-duplicate", "line 1"),
        (row("¿Para qué sirve un valor?", GOOD[2]["response"]), "same-answer", "line 3"),
        (row("Where is it?", "The compiler checks every value before it runs."), "language", "not Spanish"),
        (row("¿Y este otro?", category=""), "balance", "no category"),
    ],
)  # fmt: skip
def test_each_fault_is_found_on_its_line_and_no_other(tmp_path: Path, extra: Any, kind: str, says: str) -> None:
    if isinstance(extra, dict) and "response" in extra:
        extra = {"category": "a", **extra}
    report = look(tmp_path, [*GOOD, extra])
    assert found(report) == [(kind, len(GOOD) + 1)]
    assert report.counts == {kind: 1}
    assert says in report.findings[0].message
    assert report.findings[0].file == str(tmp_path / "rows.jsonl")


def test_every_kind_has_its_words() -> None:
    assert {"schema", "leak", "near-leak", "unknown-key"} < set(KINDS)


def test_rows_that_are_not_usable_do_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD[0])
    path.write_text(f"{good}\nno es JSON\n\n{good}\n{{\n", "utf-8")
    report = lint([path], max_length=1024)
    assert found(report) == [("schema", 2), ("schema", 5), ("duplicate", 4)]
    assert report.files == {str(path): {"rows": 4, "unusable": 2, "blank_lines": 1}}


def test_an_empty_file_and_a_file_that_is_none_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert found(lint([tmp_path / "empty.jsonl"], max_length=1024)) == [("schema", 0)]
    with pytest.raises(RecipeError, match="cannot be opened"):
        lint([tmp_path / "none.jsonl"], max_length=1024)
    (tmp_path / "wide.jsonl").write_text("{}", "utf-16")
    with pytest.raises(DataError, match="UTF-16"):
        lint([tmp_path / "wide.jsonl"], max_length=1024)


def test_unknown_keys_are_told_once(tmp_path: Path) -> None:
    report = look(tmp_path, [{**each, "author": "x"} for each in GOOD])
    assert [(each.kind, each.line, each.message) for each in report.findings] == [
        ("unknown-key", 0, f"author in {len(GOOD)} rows")
    ]


def test_leaks_into_the_prompts_are_found_exact_and_near(tmp_path: Path) -> None:
    prompts = [{"instruction": "Otra cosa que nadie pregunta"}, {"instruction": "¿que es ENUM frente a unión"}]
    near = {"instruction": "¿Qué es un módulo, frente a una clase?"}
    rows = [*GOOD, row("¿Qué es unión frente a enum?", category="a"), row("¿Qué es enum frente a unión?", category="a")]
    report = look(tmp_path, [*rows, row("¿Qué es módulo frente a una clase?", category="a")], [*prompts, near])
    leaks = [each for each in report.findings if "leak" in each.kind]
    assert [(each.kind, each.line) for each in leaks] == [("leak", len(rows)), ("near-leak", len(rows) + 1)]
    assert leaks[0].message == f"is also {tmp_path / 'prompts.jsonl'}:2"
    assert report.figures["nearest"]["highest"] == 1.0
    assert report.figures["nearest"]["closest"][0]["prompt"] == 2


def test_prompts_are_looked_through_too_but_not_counted_as_rows(tmp_path: Path) -> None:
    report = look(tmp_path, GOOD, [{"instruction": "¿Y esto?"}, {"instruction": "¿y ESTO?"}, {"expect": {}}])
    assert [(each.kind, each.file, each.line) for each in report.findings] == [
        ("schema", str(tmp_path / "prompts.jsonl"), 3),
        ("duplicate", str(tmp_path / "prompts.jsonl"), 2),
    ]
    assert report.figures["rows"] == len(GOOD)


def test_repeats_are_found_across_files_and_name_the_other(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", GOOD[:3])
    write_rows(tmp_path / "b.jsonl", GOOD[2:4])
    (finding,) = lint([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], max_length=1024).findings
    assert (finding.file, finding.line) == (str(tmp_path / "b.jsonl"), 1)
    assert finding.message == f"repeats {tmp_path / 'a.jsonl'}:3"


def test_one_file_cannot_be_on_both_sides(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(RecipeError, match="both"):
        lint([tmp_path / "a.jsonl"], tmp_path / "a.jsonl", max_length=1024)


def test_a_file_of_prompts_is_known_by_its_expectations(tmp_path: Path) -> None:
    assert look(tmp_path, [{"instruction": "¿Y?", "expect": {"code": False}}, {"instruction": "¿Cómo?"}]).findings == ()


def test_a_set_in_another_language_is_not_reported_row_by_row(tmp_path: Path) -> None:
    answer = "The compiler checks the {0} before the program runs, and nothing else happens to the {0}."
    rows = [row(f"What is {word}?", answer.format(word)) for word in WORDS]
    report = look(tmp_path, rows)
    assert report.findings == ()
    assert report.figures["language"]["spanish"] == 0
    assert report.figures["language"]["judged"] == len(rows)


def test_rows_without_prose_are_not_judged(tmp_path: Path) -> None:
    report = look(tmp_path, [*GOOD, row("`x`", "```ts\nlet x = 1;\n```", category="a")])
    assert report.findings == ()
    assert report.figures["language"] == {"rows": len(GOOD) + 1, "judged": len(GOOD), "spanish": len(GOOD)}


def test_a_category_with_few_rows_is_found(tmp_path: Path) -> None:
    rows = [{**each, "category": "a"} for each in GOOD[:-1]] + [{**GOOD[-1], "category": "b"}]
    (finding,) = look(tmp_path, rows).findings
    assert (finding.kind, finding.line) == ("balance", 0)
    assert finding.message == f"category 'b': 1 of {len(GOOD)} rows, an equal share is {len(GOOD) // 2}"


def test_groups_are_counted_by_category_and_topic(tmp_path: Path) -> None:
    rows = [{**GOOD[0], "topic": "x"}, {**GOOD[1], "topic": "y"}, {**GOOD[3], "topic": "x"}]
    groups = look(tmp_path, rows).figures["groups"]
    assert groups == {"categories": ["a", "b"], "topics": ["x", "y"], "rows": [[2, 0], [0, 1]]}


def test_many_findings_are_all_counted_and_some_kept(tmp_path: Path) -> None:
    report = look(tmp_path, [GOOD[0]] * (LISTED + 51))
    assert report.counts == {"duplicate": LISTED + 50}
    assert len(report.findings) == LISTED


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A tokenizer.json that makes a token of every byte."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(SENTENCES, tokenizers.trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet))
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_tokens_are_counted_as_training_has_them(tmp_path: Path, tokenizer_file: Path) -> None:
    report = look(tmp_path, [row("¿Qué?", "abc")], tokenizer=tokenizer_file, system="Tú")
    text = "Tú\n\nInstrucción: ¿Qué?\nRespuesta: abc"
    assert report.figures["lengths"]["max"] == len(text.encode()) + len(["<eos>"])
    assert report.figures["lengths"]["unit"] == "tokens"


@pytest.mark.parametrize("characters", [700, 2100, 9000])
def test_a_row_over_the_limit_is_found_once_however_long_it_is(
    tmp_path: Path, tokenizer_file: Path, characters: int
) -> None:
    rows = [row("¿Qué?", "x" * characters), row("¿Y qué?", "y" * 100)]
    report = look(tmp_path, rows, max_length=600, tokenizer=tokenizer_file)
    lengths = [each for each in report.findings if each.kind == "length"]
    assert [each.line for each in lengths] == [1]
    assert lengths[0].message.endswith("tokens; train.max_length is 600")
    assert report.figures["lengths"]["over"] == 1


def test_a_damaged_tokenizer_names_the_stage_that_makes_it(tmp_path: Path, tokenizer_file: Path) -> None:
    tokenizer_file.write_text('{"version":', "utf-8")
    with pytest.raises(ArtifactError, match=r"damaged.*tutor base"):
        look(tmp_path, GOOD, tokenizer=tokenizer_file)


@pytest.mark.slow
def test_what_is_kept_of_a_row_does_not_grow_with_its_texts(tmp_path: Path) -> None:
    def peak(characters: int) -> int:
        rows = (row(f"¿Qué es {i} {WORDS[i % 30]}?", f"{i} " + "x" * characters) for i in range(SAMPLE + 2000))
        write_rows(tmp_path / "rows.jsonl", list(rows))
        tracemalloc.start()
        lint([tmp_path / "rows.jsonl"], max_length=10**6)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    short, long = peak(100), peak(2100)
    assert long - short < 2000 * (SAMPLE + 1000), "the texts of the sample, and of no other row"


def test_the_sample_is_the_same_every_time(tmp_path: Path) -> None:
    rows = [row(f"¿Qué es {i} {WORDS[i % 30]}?") for i in range(SAMPLE + 500)]
    first, second = (look(tmp_path, rows).figures["language"] for _ in range(2))
    assert first == second
    assert first["rows"] == SAMPLE


# --- similar


def questions(texts: list[str]) -> Questions:
    made = Questions()
    for text in texts:
        made.add(normalise(text))
    return made


def similarity(one: str, other: str) -> float:
    first, second = (
        set(text.split()) | set(zip(text.split(), text.split()[1:], strict=False)) for text in (one, other)
    )
    return len(first & second) / len(first | second)


SHORT = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=8).map(" ".join)


@given(st.lists(SHORT, min_size=1, max_size=6), st.lists(SHORT, min_size=1, max_size=6), st.floats(0.05, 1))
def test_the_nearest_is_what_comparing_all_finds(asked: list[str], others: list[str], least: float) -> None:
    made = questions([*asked, *others])
    count = len(asked)
    result = nearest(made, range(count), range(count, len(made)), least)
    for number, text in enumerate(asked):
        best = max(similarity(text, other) for other in others)
        assert result.get(number, (0, 0.0))[1] == pytest.approx(best if best >= least else 0.0)


def test_nearly_all_pairs_that_are_alike_are_found() -> None:
    chance = random.Random(1)
    texts = []
    for _ in range(300):
        words = chance.sample(WORDS, 12)
        texts += [" ".join(words), " ".join([*words[:11], "distinto"])]
    pairs = near_pairs(questions(texts), range(len(texts)), NEAR)
    assert len([number for number, (other, _) in pairs.items() if {number, other} == {number | 1, number & ~1}]) > 285
    assert all(
        similarity(texts[number], texts[other]) == pytest.approx(value) for number, (other, value) in pairs.items()
    )


def test_questions_about_different_things_are_not_alike() -> None:
    texts = [f"¿Qué es una {word} en TypeScript?" for word in WORDS]
    assert near_pairs(questions(texts), range(len(texts)), NEAR) == {}


def test_groups_are_of_equal_keys_in_order() -> None:
    from array import array

    keys = array("Q", [5, 1, 5, 2, 1, 5])
    assert list(groups_by_key(keys, range(6))) == [[0, 2, 5], [1, 4]]
    assert list(groups_by_key(keys, [4, 5, 0])) == [[5, 0]]


# --- figures and page


@given(st.lists(st.integers(0, 10**6), max_size=50))
def test_a_histogram_counts_everything_once_in_few_round_bars(values: list[int]) -> None:
    bars = histogram(values)
    assert sum(bar["rows"] for bar in bars) == len(values)
    assert len(bars) <= 13
    assert all(bar["rows"] == sum(bar["start"] <= value < bar["end"] for value in values) for bar in bars)


class Page(HTMLParser):
    """The tags of a page that are still open, the names of all, and its text."""

    VOID = ("meta", "link", "br", "rect", "line")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag not in self.VOID or tag == "rect":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_findings_and_figures_and_is_well_formed(tmp_path: Path) -> None:
    report = look(tmp_path, [*GOOD, GOOD[0]], [{"instruction": "¿Qué es una tupla frente a una función?"}])
    shown = Page(lint_page(report))
    assert shown.open == []
    assert f"repeats line {1}" in shown.text
    assert GOOD[0]["instruction"] in shown.text
    assert "rows to train on" in shown.text
    assert "¿Qué es una tupla frente a una función?" in shown.text


def test_the_page_marks_the_bars_of_rows_over_the_limit(tmp_path: Path) -> None:
    report = look(tmp_path, GOOD)
    lengths = report.figures["lengths"]
    last = lengths["bars"][-1]["start"]
    for limit, marked in ((None, 0), (last, 0), (last - 1, 1)):
        lengths["limit"] = limit
        assert lint_page(report).count('fill="var(--over)"') == marked


def test_the_page_needs_nothing_else_and_runs_nothing(tmp_path: Path) -> None:
    html = lint_page(look(tmp_path, GOOD))
    shown = Page(html)
    assert not shown.names & {"script", "link", "img", "iframe", "object"}
    assert not {name for name in shown.attributes if name.startswith("on")} | shown.attributes & {"src", "href"}
    assert "url(" not in html
    assert "@import" not in html


def test_whatever_a_row_holds_is_shown_as_text(tmp_path: Path) -> None:
    evil = '</script><script>alert(1)</script><img src=x onerror="x"> {{ 7*7 }} \u202e\u0007\x1b[31m'
    rows = [row(evil, ANSWER, category=evil, topic="x"), row(evil, f"{ANSWER} Y más.", category=evil, topic="x")]
    html = lint_page(look(tmp_path, [*rows, *GOOD], [{"instruction": evil}]))
    assert "<script" not in html
    assert "<img" not in html
    assert "{{ 7*7 }}" in html
    assert not {"\u202e", "\u0007", "\x1b"} & set(html)


def test_a_page_of_nothing_is_a_page(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert Page(lint_page(lint([tmp_path / "empty.jsonl"], max_length=1024))).open == []


# --- the command


def command(*arguments: str | Path) -> Any:
    return CliRunner().invoke(lint_command, [str(argument) for argument in arguments])


def test_findings_stand_on_stdout_by_line_and_are_no_failure_unless_strict(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [*GOOD, GOOD[0]])
    done = command(tmp_path / "rows.jsonl")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == f"{tmp_path / 'rows.jsonl'}:{len(GOOD) + 1}: duplicate: repeats line 1"
    assert done.stdout.splitlines()[-1] == "  findings: 1 duplicate"
    strict = command(tmp_path / "rows.jsonl", "--strict")
    assert (strict.exit_code, strict.stdout) == (DataError.code, done.stdout)
    assert strict.stderr.startswith("Error: 1 findings")


def test_json_is_one_document_even_when_strict(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [*GOOD, GOOD[0]])
    done = command(tmp_path / "rows.jsonl", "--strict", "--json")
    assert json.loads(done.stdout)["counts"] == {"duplicate": 1}
    assert done.exit_code == DataError.code


def test_without_files_the_recipes_rows_are_held_against_its_prompts(recipe_file: Path, tmp_path: Path) -> None:
    done = command("-r", recipe_file, "-b", tmp_path / "build", "--html", tmp_path / "page.html", "--json")
    report = json.loads(done.stdout)
    assert list(report["files"]) == [str(tmp_path / "tutor.jsonl"), str(tmp_path / "eval.jsonl")]
    assert report["figures"]["nearest"]["prompts"] == 3
    assert report["figures"]["lengths"]["unit"] == "characters"
    assert Page((tmp_path / "page.html").read_text("utf-8")).open == []


def test_lengths_are_in_the_bases_tokens_where_that_stage_has_run(
    recipe_file: Path, tmp_path: Path, tokenizer_file: Path
) -> None:
    base = tmp_path / "build" / "small" / "base"
    (base / "model").mkdir(parents=True)
    tokenizer_file.rename(base / "model" / "tokenizer.json")
    facts = {"source": "tiny", "model": "model", "weights": "", "vocabulary": 256, "add_bos": False, "bos": None}
    (base / "base.json").write_text(json.dumps({**facts, "eos": 0, "pad": None, "pre_tokenizer": ""}), "utf-8")
    done = command("-r", recipe_file, "-b", tmp_path / "build", "--json")
    assert json.loads(done.stdout)["figures"]["lengths"]["unit"] == "tokens"


def test_a_page_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", GOOD)
    done = command(tmp_path / "rows.jsonl", "--html", tmp_path / "none" / "page.html")
    assert isinstance(done.exception, RecipeError)


def test_our_own_set_has_no_finding() -> None:
    report = lint([ROOT / "data" / "tutor.jsonl"], ROOT / "data" / "eval.jsonl", max_length=1024)
    assert report.findings == ()
    assert report.figures["rows"] == 278
    assert report.figures["nearest"]["highest"] < NEAR
