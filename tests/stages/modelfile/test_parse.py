"""stages/modelfile/parse.py: Modelfiles as Ollama's own parser reads or refuses them."""

import pytest

from tutor.errors import ArtifactError
from tutor.stages.modelfile.parse import parse


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('di "hola" ya', 'di "hola" ya'),
        ('"di "hola" ya"', 'di "hola" ya'),
        ('"hola" dijo\nPARAMETER stop "</s>"', 'hola" dijo\nPARAMETER stop "</s>'),
        ('"""a "b"\nc"""', 'a "b"\nc'),
        ('"""dijo "hola""""', 'dijo "hola"'),
        ('"""\na\n"""', "\na\n"),
        ('"""  a  """', "  a  "),
        ("  a  ", "a"),
        ('""', ""),
        ('""""""', ""),
        ("hola # x", "hola # x"),
        ("'a'", "'a'"),
        (r'"a\nb"', r"a\nb"),
        ("a\u00a0b\u200dc\u2028d\u3000e\x07", "abcde"),
        ('"""a\r\nb"""', "a\r\nb"),
        ("▁｜ñ👩🏽\ufe0f", "▁｜ñ👩🏽\ufe0f"),
    ],
)
def test_value_is_parsed_as_by_ollama(written, read):
    assert parse(f"FROM x\nSYSTEM {written}\n").system == read


@pytest.mark.parametrize("written", ['"hola" dijo', '"a "b"\nc"', '"""a"""\nb"""', '"""a"""  \nb"""', '"""""', '"'])
def test_value_with_unclosed_quotes_raises_artifact_error(written):
    with pytest.raises(ArtifactError):
        parse(f"FROM x\nSYSTEM {written}\n")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SYSTEM x",
        "FROM",
        "FROMx y",
        'FROM x\nSYSTEM\n"""y"""',
        "FROM x\nNOTHING y",
        "FROM x\nMESSAGE User hola",
        "FROM x\nMESSAGE  user hola",
        "FROM x\nPARAMETER num_ctx",
        "FROM x\nPARAMETER  num_ctx 1",
        "FROM x\nPARAMETER NUM_CTX 1",
        "FROM x\nPARAMETER num_ctx 4096.0",
        "FROM x\nPARAMETER num_ctx 9223372036854775808",
        "FROM x\nPARAMETER seed 1 # x",
        "FROM x\nPARAMETER temperature cold",
        "FROM x\nPARAMETER temperature 3.5e38",
        "FROM x\nPARAMETER use_mmap yes",
        "FROM x\nPARAMETER tfs_z 1",
    ],
)
def test_malformed_file_raises_artifact_error(text):
    with pytest.raises(ArtifactError):
        parse(text)


def test_repeated_instruction_replaces_or_extends():
    parsed = parse(
        "\ufeff # a comment\rfrom a.gguf\r\nFROM b.gguf\nSystem uno\nSYSTEM dos\nTEMPLATE x\n\u00a0TEMPLATE y\n"
        'PARAMETER stop </s>\nPARAMETER seed 1\nPARAMETER\tstop "b c"\nPARAMETER seed -2\nPARAMETER top_p .5e-1\n'
        "PARAMETER use_mmap F\nLICENSE a\nLICENSE b\nMESSAGE user q: r\nADAPTER l.gguf\nPARSER p\nPARAMETER mirostat 1"
    )
    assert parsed.models == ("a.gguf", "b.gguf")
    assert parsed.adapters == ("l.gguf",)
    assert (parsed.system, parsed.template) == ("dos", "y")
    assert parsed.parameters == {"stop": ["</s>", "b c"], "seed": -2, "top_p": 0.05, "use_mmap": False}
    assert parsed.license == ("a", "b")
    assert parsed.messages == (("user", "q: r"),)
    assert set(parsed.others) == {"parser", "mirostat"}
