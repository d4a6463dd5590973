"""graders/typescript/scanner.py: suppressions, depth and global effects."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutor.graders.typescript.compiler import (
    MAX_CHARACTERS,
)
from tutor.graders.typescript.scanner import scan


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
def test_suppression_is_found(code: str) -> None:
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
def test_text_like_a_suppression_is_not_reported(code: str) -> None:
    assert scan(code).suppressions == ()


def test_suppression_has_its_line() -> None:
    assert scan("`\n\n`;\nlet x: any;\n// @ts-ignore").suppressions == ((4, "any"), (5, "@ts-ignore"))


def test_global_effects_depth_and_emptiness_are_found() -> None:
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
def test_scan_of_hostile_text_takes_linear_time(piece: str, nested: int) -> None:
    """A scan whose time grows with the square of the length takes minutes here; a linear one less than two seconds."""
    count = 4 * MAX_CHARACTERS // len(piece)
    assert scan(piece * count).depth == nested * count
