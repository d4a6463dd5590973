"""recipe/ollama_names.py: the names that Ollama accepts, their tags, and names of one model."""

import pytest

from tutor.recipe.ollama_names import NAME, canonical, is_base_name, split_tag


@pytest.mark.parametrize(
    "name",
    [
        "tutor",
        "user/tutor",
        "host/ns/tutor",
        "host:5000/ns/m.o-d_el",
        "registry.example.com/a-b/c.d",
        "_x",
        "9/9",
        "m" * 75,
    ],
)
def test_name_with_host_and_namespace_is_accepted(name: str) -> None:
    assert is_base_name(name)
    assert NAME.fullmatch(f"{name}:0a1b2c3d4e5f")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "/tutor",
            "user/",
            "a//b",
            "a/b/c/d",
            "us.er/tutor",
            "us:er/tutor",
            "-x",
            ".x",
            "user/-x",
            "tutor:",
            "ñ/tutor",
        ),
        *("a b", "tutor\n", "tutor:tag", "user/tutor:tag", "user/tutor@sha256", "http://host/ns/tutor", "m" * 76),
        *("n" * 81 + "/m", "h" * 351 + "/n/m", "deepseek-r1", "user/DeepSeek-R1"),
    ],
)
def test_name_that_ollama_or_tutor_cannot_take_is_refused(name: str) -> None:
    assert not is_base_name(name)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("tutor", ("tutor", "")),
        ("tutor:a", ("tutor", "a")),
        ("user/tutor:a", ("user/tutor", "a")),
        ("host:5000/ns/tutor", ("host:5000/ns/tutor", "")),
        ("host:5000/ns/tutor:a", ("host:5000/ns/tutor", "a")),
    ],
)
def test_tag_is_split_from_a_name(name: str, parts: tuple[str, str]) -> None:
    assert split_tag(name) == parts


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("tutor", "Tutor:latest", True),
        ("library/tutor:a", "tutor:A", True),
        ("registry.ollama.ai/user/tutor", "user/tutor:latest", True),
        ("user/tutor", "tutor", False),
        ("host/user/tutor", "user/tutor", False),
        ("tutor:a", "tutor:b", False),
    ],
)
def test_names_of_one_model_are_equal_in_canonical_form(one: str, other: str, *, equal: bool) -> None:
    assert (canonical(one) == canonical(other)) is equal
