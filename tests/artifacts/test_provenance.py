"""The code of a stage is found by its imports; its hash changes with what the code does, not with words or paths."""

import ast
import contextlib
import importlib.metadata
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tutor.artifacts import provenance
from tutor.artifacts.layout import STAGE_FOLDERS
from tutor.artifacts.provenance import PACKAGE, Provenance, SourceTree
from tutor.artifacts.source import read_source
from tutor.pipeline.runner import LLAMACPP_BUILD
from tutor.serving import adapter
from tutor.serving.evaluation import compare

ROOT = PACKAGE.parent
STAGES = list(STAGE_FOLDERS)

ASSETS = {
    "modelfile": "Modelfile.j2",
    "convert": "engines/llamacpp/src/convert.py",
    "evaluate": "graders/typescript/src/package-lock.json",
    "report": "formats/page.css",
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of Modelfile.j2 and tutor/: its files are read once for all tests."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy2(ROOT / "Modelfile.j2", folder)
    return Path(shutil.copytree(PACKAGE, folder / "tutor", ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture
def package(copied: Path) -> Iterator[Path]:
    """The copy, whose files a test may change and move."""
    before = {path: path.read_bytes() for path in copied.parent.rglob("*") if path.is_file()}
    yield copied
    for path in sorted(copied.rglob("*"), reverse=True):  # the content of a folder before the folder
        if path.is_dir():
            with contextlib.suppress(OSError):
                path.rmdir()  # where it is empty
        elif path not in before:
            path.unlink()
    for path, content in before.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != content:
            path.write_bytes(content)


def found(package: Path, stage: str) -> Provenance:
    return SourceTree(package=package).provenance(f"stages/{stage}/stage.py")


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text("utf-8")
    assert before in text
    path.write_text(text.replace(before, after, 1), "utf-8")


def reword(path: Path) -> None:
    """Another text for each docstring, a comment behind each line that may end in one, and blank lines between."""
    text = path.read_text("utf-8")
    lines = text.split("\n")
    strings = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    inside = {line for node in ast.walk(ast.parse(text)) for line in _inner_lines(node)}
    lines = [f"{line}  # more" if line.endswith(":") and at not in inside else line for at, line in enumerate(lines, 1)]
    for node in sorted(strings, key=lambda node: -node.lineno):
        lines[node.lineno - 1 : node.end_lineno] = [f'{" " * node.col_offset}"""Other words."""', "", "# A comment."]
    path.write_text("# First.\n\n" + "\n".join(lines), "utf-8")


def _inner_lines(node: ast.AST) -> Iterator[int]:
    """Lines of a string or expression of several lines."""
    if isinstance(node, ast.Constant | ast.JoinedStr) and node.end_lineno and node.end_lineno > node.lineno:
        yield from range(node.lineno, node.end_lineno + 1)


def every(package: Path) -> dict[str, str]:
    return {stage: found(package, stage).code for stage in STAGES}


# What a stage depends on


@pytest.mark.parametrize("stage", STAGES)
def test_provenance_holds_a_stage_and_the_modules_it_imports(stage: str) -> None:
    """The modules that the files of the stage's package import, found by a second, simple method."""
    sources = found(PACKAGE, stage).sources
    assert f"stages/{stage}/stage.py" in sources
    for name in [name for name in sources if name.startswith(f"stages/{stage}/") and name.endswith(".py")]:
        tree = ast.parse((PACKAGE / name).read_text("utf-8"))
        hidden = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and id(node) not in hidden:
                path = node.module.removeprefix("tutor.").replace(".", "/")
                left_out = any(f"{path}.py" == left or path.startswith(left) for left in provenance.LEFT_OUT)
                if node.module.startswith("tutor.") and (PACKAGE / f"{path}.py").is_file() and not left_out:
                    assert f"{path}.py" in sources


def test_assets_are_each_found_by_a_module_that_names_them() -> None:
    """An asset or script that no module names in a string would make nothing stale."""
    trees = [found(PACKAGE, stage).sources for stage in STAGES]
    trees.append(SourceTree().provenance("stages/data/lint/page.py", left_out=()).sources)
    trees.append(SourceTree().provenance("engines/llamacpp/adapter.py", left_out=()).sources)
    known = {name for sources in trees for name in sources}
    assets = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and (path.suffix != ".py" or path.parent.name == "src")
    }
    assert {name for name in assets if not name.endswith("__init__.py")} <= known


def test_provenance_holds_assets_of_the_stages_that_use_them() -> None:
    for stage, asset in ASSETS.items():
        assert asset in found(PACKAGE, stage).sources
    assert "stages/report/page.html.j2" in found(PACKAGE, "report").sources
    assert "formats/page.css" not in found(PACKAGE, "data").sources


def test_provenance_leaves_out_what_other_key_fields_hold() -> None:
    """The llama.cpp build is a separate key field, in the stages that start its programs."""
    reached = {stage for stage in STAGES if LLAMACPP_BUILD in found(PACKAGE, stage).left_out}
    assert reached == {"base", "convert", "ladder", "parity", "forgetting", "evaluate"}
    assert not any(name.startswith(("recipe/", "artifacts/")) for name in found(PACKAGE, "train").sources)


@pytest.mark.parametrize(
    ("stage", "packages"),
    [
        ("data", {"pydantic", "markdown-it-py"}),
        ("base", {"transformers", "tokenizers", "torch", "gguf"}),
        ("train", {"torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "matplotlib"}),
        ("merge", {"torch", "transformers", "safetensors", "bitsandbytes"}),
        ("convert", {"gguf", "numpy", "safetensors"}),
        ("parity", {"torch", "transformers", "peft", "bitsandbytes"}),
        ("modelfile", {"jinja2"}),
        ("forgetting", {"transformers", "tokenizers"}),
        ("evaluate", {"markdown-it-py", "lingua-language-detector"}),
        ("report", {"jinja2", "lingua-language-detector", "transformers"}),
    ],
)
def test_provenance_holds_the_version_of_each_imported_package(stage: str, packages: set[str]) -> None:
    versions = found(PACKAGE, stage).packages
    assert packages <= set(versions)
    assert not provenance.NO_EFFECT & set(versions)


@pytest.mark.parametrize(
    ("command", "sources"),
    [
        (
            compare,
            {"serving/models.py", "stages/evaluate/stage.py", "engines/hf/loading.py", "engines/ollama/engine.py"},
        ),
        (
            adapter,
            {
                "engines/llamacpp/src/convert_lora.py",
                "stages/convert/lineage.py",
                "Modelfile.j2",
                "prompt/tutor_format.py",
            },
        ),
    ],
)
def test_provenance_of_a_command_holds_its_dependencies(command: ModuleType, sources: set[str]) -> None:
    assert command.__file__ is not None
    code = SourceTree().provenance(Path(command.__file__), left_out=command.LEFT_OUT).sources
    assert {Path(command.__file__).relative_to(PACKAGE).as_posix(), *sources} <= set(code)
    assert not any(name.startswith(("pipeline/", "cli/", "serving/publish")) for name in code)


@pytest.mark.parametrize("stage", ["data", "modelfile"])
def test_provenance_of_a_stage_without_a_tokenizer_has_no_torch(stage: str) -> None:
    """A machine without the training packages must find these stages up to date."""
    assert not {"torch", "transformers", "safetensors"} & set(found(PACKAGE, stage).packages)


def test_distributions_hold_the_packages_that_are_imported() -> None:
    """A wrong name would always count as not installed."""
    by_import = importlib.metadata.packages_distributions()
    for path in PACKAGE.rglob("*.py"):
        for name in read_source(path).imports:
            top = name.partition(".")[0]
            named = provenance.DISTRIBUTIONS.get(top, top)
            normal = {re.sub(r"[-_.]+", "-", holder).lower() for holder in by_import.get(top, ())}
            assert not normal or re.sub(r"[-_.]+", "-", named).lower() in normal, f"{path}: {top}"


# What makes it stale


@pytest.mark.parametrize("stage", STAGES)
def test_code_of_a_stage_changes_with_one_byte_of_its_module(package: Path, stage: str) -> None:
    before = every(package)
    path = package / "stages" / stage / "stage.py"
    edit(path, "\ndef run(", "\nADDED = 1\n\n\ndef run(")
    changed = {name for name, code in every(package).items() if code != before[name]}
    assert changed == {stage}


@pytest.mark.parametrize("stage", STAGES)
def test_code_of_a_stage_changes_with_a_module_that_it_imports(package: Path, stage: str) -> None:
    sources = [name for name in found(package, stage).sources if name.endswith(".py") and not name.endswith("stage.py")]
    assert sources
    before = found(package, stage)
    for name in sources:
        path = package / name
        path.write_text(f"{path.read_text('utf-8')}\nADDED = 1\n", "utf-8")
    after = found(package, stage)
    assert {name for name in sources if after.sources[name] == before.sources[name]} == set()
    assert after.code != before.code


@pytest.mark.parametrize("stage", STAGES)
def test_code_of_a_stage_changes_with_each_of_its_assets(package: Path, stage: str) -> None:
    names = [name for name in found(package, stage).sources if not name.endswith(".py")]
    assert names or stage not in {"modelfile", "evaluate", "report"}
    for name in names:
        before = found(package, stage)
        path = package / name if (package / name).exists() else package.parent / name
        path.write_bytes(path.read_bytes() + b" ")
        assert found(package, stage).code != before.code, name
        path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("stage", STAGES)
def test_code_of_a_stage_stays_when_only_words_change(package: Path, stage: str) -> None:
    before = found(package, stage)
    for name in before.sources:
        if name.endswith(".py"):
            reword(package / name)
    after = found(package, stage)
    assert after.sources == before.sources
    assert after.code == before.code


@pytest.mark.parametrize("stage", STAGES)
def test_code_of_a_stage_stays_when_its_modules_move(package: Path, stage: str) -> None:
    before = found(package, stage)
    (package / "stages" / stage).rename(package / "stages" / "elsewhere")
    (package / "prompt").rename(package / "stages" / "a_prompt")
    for path in package.rglob("*.py"):
        text = path.read_text("utf-8").replace("tutor.prompt.", "tutor.stages.a_prompt.")
        path.write_text(text.replace(f"tutor.stages.{stage}", "tutor.stages.elsewhere"), "utf-8")
    after = SourceTree(package=package).provenance("stages/elsewhere/stage.py")
    assert after.code == before.code
    assert list(after.sources) != list(before.sources)


def test_code_changes_when_a_name_comes_from_another_module(tmp_path: Path) -> None:
    """Both modules are reached before and after, and no file's own content differs."""
    package = tmp_path / "tutor"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, value in (("one", 1), ("two", 2)):
        (package / f"{name}.py").write_text(f"VALUE = {value}\n")
    (package / "user.py").write_text("from tutor.one import VALUE\nfrom tutor import two, one\n")
    before = SourceTree(package=package).provenance("user.py")
    (package / "user.py").write_text("from tutor import one, two\nfrom tutor.two import VALUE\n")
    after = SourceTree(package=package).provenance("user.py")
    assert after.sources == before.sources
    assert after.code != before.code


@pytest.mark.parametrize("stage", STAGES)
def test_fields_of_a_stage_change_with_the_version_of_a_package(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    before = found(PACKAGE, stage).fields
    for name in found(PACKAGE, stage).packages:
        versions = {name: "0.0.1"}
        with monkeypatch.context() as patch:
            patch.setattr(provenance, "installed_version", lambda package, v=versions: v.get(package, "9"))
            other = found(PACKAGE, stage).fields
        assert other[f"version.{name}"] == "0.0.1" != before[f"version.{name}"]
        assert other["code"] == before["code"]


def test_code_of_a_stage_is_equal_in_checkout_and_wheel(package: Path) -> None:
    checkout = every(package)
    for name in provenance.SHIPPED:
        (package.parent / name).rename(package / name)
    assert every(package) == checkout


def test_shipped_files_are_those_that_the_wheel_holds() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]
    shipped = build["targets"]["wheel"]["force-include"]
    assert shipped == {name: f"tutor/{name}" for name in provenance.SHIPPED}
