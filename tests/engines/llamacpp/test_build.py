"""engines/llamacpp/build.py: the inputs of a build's key, the folder. test_source_build.py makes builds."""

from pathlib import Path

import pytest

from tutor.engines.llamacpp.build import SOURCE, build_folder, build_key, is_built, kernels


def append(path: Path, *lines: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of our sources, from which the key is computed."""
    for name in ("CMakeLists.txt", "score.cpp"):
        (tmp_path / name).write_bytes((SOURCE / name).read_bytes())
    monkeypatch.setattr("tutor.engines.llamacpp.build.SOURCE", tmp_path)
    return tmp_path


def test_comments_do_not_change_the_key(source: Path) -> None:
    before = build_key()
    append(source / "CMakeLists.txt", "# a comment", "#")
    append(source / "score.cpp", "  // a comment", "//")
    assert build_key() == before


@pytest.mark.parametrize(
    ("name", "code"), [("CMakeLists.txt", "set(A 1)"), ("score.cpp", "#include <map>"), ("score.cpp", "int a; // b")]
)
def test_code_changes_the_key(source: Path, name: str, code: str) -> None:
    before = build_key()
    append(source / name, code)
    assert build_key() != before


@pytest.mark.parametrize(("constant", "value"), [("VERSION", "0.0.1"), ("CMAKE_OPTIONS", ()), ("PROGRAMS", ("a",))])
def test_pin_options_and_programs_change_the_key(monkeypatch: pytest.MonkeyPatch, constant: str, value: object) -> None:
    before = build_key()
    monkeypatch.setattr(f"tutor.engines.llamacpp.build.{constant}", value)
    assert build_key() != before


def test_folder_is_from_variable_or_named_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTOR_LLAMACPP", str(tmp_path))
    assert build_folder() == tmp_path
    assert not is_built(tmp_path)
    monkeypatch.delenv("TUTOR_LLAMACPP")
    assert build_folder().name.startswith(build_key())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx avx2 fma f16c avx_vnni", ()),
        ("avx2 avx512f avx512_vnni", ()),
        ("avx512f avx512bw avx512cd avx512dq avx512vl", ("AVX512",)),
        (
            "avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni avx512_bf16",
            ("AVX512", "AVX512_VNNI", "AVX512_BF16"),
        ),
    ],
)
def test_kernels_are_those_that_the_processor_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, expected: tuple[str, ...]
) -> None:
    """A cache on another processor is not used there: the folder has another name, under the key of every stage."""
    key = build_key()
    monkeypatch.delenv("TUTOR_LLAMACPP", raising=False)
    monkeypatch.setattr("tutor.engines.llamacpp.build.CPUINFO", tmp_path / "cpuinfo")
    assert kernels() == ()
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbogomips\t: 5192.24\n", "utf-8")
    assert kernels() == expected
    assert build_folder().name == "-".join((key, *expected)).lower()
    assert build_key() == key
    monkeypatch.setenv("TUTOR_LLAMACPP", str(tmp_path))
    assert kernels() == ()
