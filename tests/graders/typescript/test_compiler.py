"""graders/typescript/compiler.py, with a fake and (marked typescript) the real compiler."""

import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.fakes.typescript import runs

from tutor.formats.markdown import Block
from tutor.graders.typescript.compiler import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    MORE_SECONDS_A_BLOCK,
    Verdict,
    _without_network,
    grade_blocks,
)


def outcomes(*codes: str, **options: Any) -> list[str]:
    return [verdict.outcome for verdict in grade_blocks([Block(code) for code in codes], **options)]


# A fake compiler


def test_blocks_get_their_outcomes_in_two_runs(fake_compiler: Path) -> None:
    assert outcomes("a;", "TS2322", "TS1005", "", "let x: any;") == [
        "pass",
        "type_error",
        "syntax_error",
        "no_code",
        "suppressed",
    ]
    parsing, checking = runs(fake_compiler)
    assert "--noCheck" in parsing
    assert parsing.count(".ts") == 3
    assert checking.count(".ts") == 2, "a text that does not parse would keep the compiler from checking the others"


def test_diagnostic_has_line_in_block_and_printable_message(fake_compiler: Path) -> None:
    block = Block("a;\nTS2322\n", before="b;\nTS2304\n")
    assert [(each.code, each.line, each.message) for each in grade_blocks([block])[0].diagnostics] == [
        ("TS2304", 0, "said [31m of TS2304"),
        ("TS2322", 2, "said [31m of TS2322"),
    ]


@pytest.mark.slow
def test_hanging_compiler_times_out_for_its_block_alone(fake_compiler: Path) -> None:
    assert outcomes("a;", "TS2322", "HANG", "b;", seconds=3) == ["pass", "type_error", "timeout", "pass"]
    hung = int((fake_compiler / "hanging").read_text())
    assert not Path(f"/proc/{hung}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["CRASH", "GREEDY", "CHATTY", "MISCONFIGURED"])
def test_broken_compiler_is_grader_error_for_its_block_alone(fake_compiler: Path, fault: str) -> None:
    assert outcomes("a;", fault, "TS2322", memory_mb=1024) == ["pass", "grader_error", "type_error"]


def test_too_deep_or_too_long_block_is_not_compiled(fake_compiler: Path) -> None:
    deep = MAX_DEPTH + 1
    assert outcomes("[" * deep + "]" * deep, "a" * (MAX_CHARACTERS + 1)) == ["timeout", "grader_error"]
    assert runs(fake_compiler) == []


def test_global_or_long_block_is_compiled_alone(fake_compiler: Path) -> None:
    outcomes("a;", "declare global { }", "b;", "x;" * 5000)
    assert sorted(line.count(".ts") for line in runs(fake_compiler) if "--noCheck" not in line) == [1, 1, 2]


def test_suppression_in_quoted_block_is_allowed(fake_compiler: Path) -> None:
    assert [each.outcome for each in grade_blocks([Block("let x: any;", quoted=True)])] == ["pass"]


def test_compiler_gets_no_variables_of_the_user(fake_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    outcomes("a;")
    seen = set((fake_compiler / "environment").read_text("utf-8").splitlines())
    assert seen <= {"PATH", "HOME", "GOMEMLIMIT", "LC_CTYPE", "PWD"}


def test_file_names_are_random_and_options_isolate(fake_compiler: Path) -> None:
    outcomes("a;")
    outcomes("a;")
    names = [re.findall(r"\S+\.ts", line)[0] for line in runs(fake_compiler)]
    assert len(set(names)) == len(names)
    assert all(
        "--noResolve" in line and "--ignoreConfig" in line and "--noEmit" in line for line in runs(fake_compiler)
    )


def test_compiler_has_no_network(fake_compiler: Path) -> None:
    if not _without_network():
        pytest.skip("this user may not make a network namespace (unshare)")
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert outcomes(f"CONNECT {server.getsockname()[1]}") == ["pass"]
    assert not (fake_compiler / "connected").exists()


def test_lone_surrogate_is_compiled(fake_compiler: Path) -> None:
    assert outcomes("'\ud800'; a") == ["pass"]


# The real compiler


def compilers(program: Path, scratch: Path) -> list[int]:
    """Return the processes that run this program in a folder below `scratch`, without those of other test workers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "exe").resolve() == program.resolve() and (process / "cwd").readlink().is_relative_to(
                scratch
            ):
                found.append(int(process.name))
        except OSError:  # the process has ended, or belongs to another user
            continue
    return found


def verdicts(*codes: str, seconds: float = 10) -> list[Verdict]:
    return grade_blocks([Block(code) for code in codes], seconds=seconds)


@pytest.mark.typescript
def test_outcomes_and_codes_of_real_compiler(compiler: Path) -> None:
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
def test_blocks_do_not_see_each_other(compiler: Path) -> None:
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
def test_block_cannot_read_files_of_the_machine(compiler: Path, tmp_path: Path) -> None:
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
def test_tsconfig_in_parent_folder_is_ignored(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_hostile_code_gets_verdict_and_leaves_no_process(
    compiler: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert all(seconds <= 5 + 2 * MORE_SECONDS_A_BLOCK for seconds in deadlines)
    assert not compilers(compiler, tmp_path)
    assert all(each.message.isprintable() for each in found[0].diagnostics)
