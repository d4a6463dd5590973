"""Valid, wrong and hostile recipes. Covers tutor/recipe/settings.py and quantizations.py too: both act when read."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.processes.command import ROOT

from tutor.errors import RecipeError
from tutor.recipe.reading import RETIRED, read_recipe
from tutor.recipe.settings import Recipe, Settings


@pytest.fixture
def refused(tmp_path: Path) -> Any:
    """Read a recipe that must be refused; return the message without the path before it."""

    def read(text: str | bytes, name: str = "r.toml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(RecipeError) as caught:
            read_recipe(path)
        assert caught.value.code == 2
        assert str(path) in caught.value.message
        return str(caught.value).replace(f"{path}", "").strip(": ")

    return read


@pytest.mark.parametrize(
    "name", ["data/tutor.toml", "data/recommended.toml", "data/demo.toml", "tests/support/tiny.toml"]
)
def test_recipe_of_the_checkout_is_valid_and_its_files_exist(name):
    recipe = read_recipe(ROOT / name)
    assert recipe.resolve(recipe.data.train).is_file()
    assert recipe.resolve(recipe.data.eval).is_file()
    assert recipe.name == Path(name).stem


def test_recipe_without_settings_has_the_specified_numbers(tmp_path):
    (tmp_path / "r.toml").touch()
    recipe = read_recipe(tmp_path / "r.toml")
    train, generate = recipe.train, recipe.generate
    assert (train.rank, train.alpha, train.dropout, train.quantization) == (8, 16, 0.1, "nf4")
    assert train.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (train.batch_size, train.accumulation, train.epochs) == (1, 10, 6)
    assert (train.logging_steps, train.save_steps) == (50, 500)
    assert (generate.max_new_tokens, generate.temperature) == (515, 0.003)
    assert (generate.top_p, generate.repetition_penalty) == (0.85, 1.15)


def test_recipe_of_the_8b_equals_the_defaults():
    """data/tutor.toml documents the defaults: a changed default must change the file too."""
    written = read_recipe(ROOT / "data" / "tutor.toml").model_dump()
    default = Recipe().model_dump()
    written.pop("evaluate"), default.pop("evaluate")  # names files of the checkout
    written["data"].pop("eval"), default["data"].pop("eval")
    assert written == default


# K01, K08: names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sede = 1", "unknown setting sede; did you mean seed? known: base, convert, data"),
        ("[train]\nepoch = 1", "unknown setting train.epoch; did you mean epochs? known: accumulation, alpha"),
        ("[trian]\nrank = 1", "unknown setting trian; did you mean train?"),
        ("[train]\nzzz = 1\nyyy = 2", "unknown setting train.yyy; known:"),
        (
            "path = '/etc/passwd'",
            "unknown setting path; did you mean parity? known: base, convert, data, evaluate, generate, merge",
        ),
    ],
)
def test_read_recipe_with_unknown_setting_names_its_neighbours(refused, text, expected):
    assert expected in refused(text)


@pytest.mark.parametrize("name", RETIRED)
def test_read_recipe_with_retired_name_names_the_replacement(refused, name):
    message = refused(f"[train]\n{name} = 1")
    assert message == f"unknown setting train.{name}; {RETIRED[name]}"
    assert refused(f"{name} = 1") == f"unknown setting {name}; {RETIRED[name]}"


def test_retired_names_have_replacements_that_exist():
    for text in RETIRED.values():
        if text.startswith("it is called"):
            section, _, name = text.split()[3].partition(".")
            assert name in type(getattr(Recipe(), section)).model_fields


# K02, K03: values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed = -1", "seed is -1: Input should be greater than or equal to 0"),
        ("seed = '1'", "seed is '1': Input should be a valid integer"),
        ("seed = true", "seed is True: Input should be a valid integer"),
        ("system = 5", "system is 5: Input should be a valid string"),
        ("data = 5", "data is 5: Input should be a valid"),
        ("train = []", "train is list: Input should be a valid"),
        ("[train]\nlearning_rate = -1e-4", "train.learning_rate is -0.0001: Input should be greater than 0"),
        ("[train]\nlearning_rate = inf", "train.learning_rate is inf"),
        ("[train]\ndropout = nan", "train.dropout is nan"),
        ("[train]\nrank = 0", "train.rank is 0"),
        ("[train]\nrank = 8.0", "train.rank is 8.0"),
        ("[train]\ntarget_modules = []", "train.target_modules is list"),
        ("[train]\ntarget_modules = ['q_proj', 'lm_head']", "train.target_modules.1 is 'lm_head': lm_head cannot be"),
        ("system = 'Eres un tutor.<|im_end|>'", "system is 'Eres un tutor.<|im_end|>': holds <|im_end|>, which a"),
        ("[train]\nprecision = 'fp8'", "train.precision is 'fp8': Input should be 'auto', 'bf16', 'fp16' or 'fp32'"),
        (
            "[train]\nquantization = 'int4'",
            "train.quantization is 'int4': Input should be 'auto', 'nf4', 'int8' or 'none'",
        ),
        ("[train]\nmax_memory = { gpu = '6 gigs' }", "train.max_memory.gpu is '6 gigs': give a number and MB, MiB"),
        ("[train]\nmax_memory = { disk = '6GB' }", "unknown setting train.max_memory.disk; known: cpu, gpu"),
        ("[train]\nmax_memory.gpu = '6GiB'\nquantization = 'int8'", "train.max_memory cannot stream int8 weights"),
        ("[train]\nmax_memory.gpu = '6GiB'\ngradient_checkpointing = false", "needs gradient checkpointing"),
        ("[train]\ngradient_checkpointing = 1", "train.gradient_checkpointing"),
        ("[train]\npatience = 3\nevaluations_per_epoch = 0", "train.patience counts evaluations"),
        ("[train]\npatience = 3\nkeep = 'last'", "train.patience ends a training before its schedule does"),
        ("[convert]\nquantizations = ['Q4']", "convert.quantizations.0 is 'Q4'"),
        ("[convert]\nquantizations = ['Q2_0']", "cannot be read back"),
        ("[convert]\nquantizations = ['BF16']", "is no quantization, and a 16-bit file is always made"),
        ("[convert]\nquantizations = ['q4_k', 'Q4_K_M', 'Q5_K_M', 'Q8_0']", "names one twice: Q4_K_M, Q4_K_M"),
        (
            "[merge]\nbase = 'nf4'\n[train]\nquantization = 'none'",
            "merge.base is 'nf4' and train.quantization is 'none'; set merge.base to original",
        ),
        ("[ollama]\nquantization = 'Q4'", "ollama.quantization is 'Q4'; converted are Q4_K_M, Q5_K_M, Q8_0, F16"),
        ("[ollama]\nmodel = 'us.er/tutor'", "ollama.model is 'us.er/tutor'"),
        ("[ollama]\nmodel = 'deepseek-r1'", "ollama.model is 'deepseek-r1'"),
        ("[generate]\nmax_new_tokens = 4096", "max_new_tokens (4096) leaves no tokens for a prompt"),
        ("[data]\ntrain = ' '", "data.train is ' ': is empty"),
        ("[data]\nheld_out = 1.0", "data.held_out is 1.0"),
        ("[parity]\nbudgets = {Q8_0 = inf}", "parity.budgets.Q8_0 is inf"),
        ("[parity]\nbudgets = {Q8_0 = nan}", "parity.budgets.Q8_0 is nan"),
        ("[parity]\nbudgets = {Q8_0 = 11}", "parity.budgets.Q8_0 is 11"),
    ],
)
def test_read_recipe_with_wrong_value_names_the_setting(refused, text, expected):
    assert expected in refused(text)


def numbers(model: type[Settings], where: str = "") -> Iterator[tuple[str, str]]:
    """Table and name of each setting that is one number."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from numbers(field.annotation, f"{where}.{name}".strip("."))
        elif field.annotation in (int, float) or name in ("pass_tokens", "max_new_tokens"):
            yield where, name


@pytest.mark.parametrize(("table", "name"), list(numbers(Recipe)))
@pytest.mark.parametrize("value", ["9223372036854775807", "-1", "inf", "nan"])
def test_read_recipe_bounds_every_number(refused, table, name, value):
    heading = f"[{table}]\n" if table else ""
    assert refused(f"{heading}{name} = {value}").startswith(f"{table}.{name}".strip("."))


def test_read_recipe_takes_whole_numbers_for_fractions(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("[train]\ndropout = 0\n[generate]\ntop_p = 1\ntemperature = 0\n")
    assert read_recipe(path).train.dropout == 0


def test_read_recipe_reports_all_problems_up_to_a_limit(refused):
    message = refused("seed = -1\nsystem = 5\n[train]\nrank = 0")
    assert all(name in message for name in ("seed", "system", "train.rank"))
    many = refused("".join(f"a{number} = 1\n" for number in range(999)))
    assert many.endswith("and 994 more")
    assert len(many) < 1000


# K04: damaged or hostile TOML


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = " + "[" * 60_000, "recursion"),
        ("a = " + "{a=" * 9_000 + "1" + "}" * 9_000, "recursion"),
        ("seed = " + "9" * 5_000, "4300 digits"),
        ("seed = 0x" + "f" * 5_000, "seed is a number of 20000 bits"),
        ("[train]\nalpha = 0x" + "f" * 5_000, "train.alpha is a number of 20000 bits"),
        ("system = 1\nseed = '" + "x" * 60_000 + "'", "xxx..."),
        ("a" * 60_000 + " = 1", "aaa..."),
        ("[" + "a." * 3_000 + "b]", "unknown setting a"),
        ("seed = 1\nseed = 2", "Cannot overwrite a value"),
        ("seed = ", "Invalid value"),
        ('system = "\\ud800"', "not a Unicode scalar value"),
        (b"system = '\xff'", "is not UTF-8 (byte 10)"),
        ("x" * 70_000, "more than 65536 bytes"),
    ],
)
def test_read_recipe_of_hostile_toml_raises_one_short_line(refused, text, expected):
    message = refused(text)
    assert expected in message
    assert len(message) < 400
    assert "\n" not in message


@given(st.text() | st.binary())
def test_read_recipe_of_any_bytes_parses_or_raises_recipe_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    with contextlib.suppress(RecipeError):
        assert read_recipe(path).train.rank == 8


def test_read_recipe_takes_windows_byte_order_mark_and_line_ends(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 7\r\n[train]\r\nrank = 4\r\n")
    recipe = read_recipe(path)
    assert (recipe.seed, recipe.train.rank) == (7, 4)


# K06: paths


def test_resolve_is_relative_to_the_recipe_folder(tmp_path, monkeypatch):
    home = tmp_path / "casa de ñandú"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    path = home / "mi receta.toml"
    path.write_text("[data]\ntrain = '../filas.jsonl'\neval = '~/otras.jsonl'\n")
    recipe = read_recipe(path)
    assert recipe.resolve(recipe.data.train) == tmp_path / "filas.jsonl"
    assert recipe.resolve(recipe.data.eval) == home / "otras.jsonl"
    assert recipe.name == "mi receta"


@pytest.mark.parametrize("value", ["~nobody-has-this-name/rows.jsonl", "a\0b", "loop/rows.jsonl"])
def test_resolve_of_an_impossible_path_raises_recipe_error(tmp_path, value):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = tmp_path / "r.toml"
    path.write_text(f"[data]\ntrain = {json.dumps(value)}\n")
    recipe = read_recipe(path)
    with pytest.raises(RecipeError, match="is no path"):
        recipe.resolve(recipe.data.train)


def test_read_recipe_with_a_path_too_long_raises(refused):
    assert "has 5000 characters; a path has at most 4096" in refused(f"[data]\ntrain = '{'a' * 5000}'")


def test_read_recipe_of_a_pipe_or_folder_raises_without_opening(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")  # opening it would wait for ever
    (tmp_path / "dangling.toml").symlink_to(tmp_path / "gone")
    for path, expected in (
        (tmp_path, "is a folder, not a recipe"),
        (tmp_path / "pipe.toml", "is a pipe or a device"),
        (Path("/dev/zero"), "is a pipe or a device"),
        (tmp_path / "none.toml", "No such file"),
        (tmp_path / "dangling.toml", "No such file"),
        (tmp_path / ("a" * 300), "File name too long"),
    ):
        with pytest.raises(RecipeError, match=expected):
            read_recipe(path)


@pytest.mark.parametrize("name", ["..toml", "...toml"])
def test_read_recipe_of_a_file_without_a_stem_raises(refused, name):
    assert "has no name" in refused("", name)


def test_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().train.rank = 9


def test_read_recipe_takes_every_name_of_a_quantization(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("[convert]\nquantizations = ['q4_k', 'IQ4_nl']\n[ollama]\nquantization = 'Q4_K'")
    recipe = read_recipe(path)
    assert (recipe.convert.quantizations, recipe.ollama.quantization) == (["Q4_K_M", "IQ4_NL"], "Q4_K_M")
    path.write_text("[ollama]\nquantization = 'Auto'")
    assert read_recipe(path).ollama.quantization == "auto"
