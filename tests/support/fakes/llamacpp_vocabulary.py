"""A llama.cpp build in place of the real one: its converter and its tokenizer return what they made of one model."""

import json
from pathlib import Path

from support.fakes.llamacpp import script

CLASSES = """
class ModelBase:
    @staticmethod
    def load_hparams(folder, is_mistral_format):
        return {}

class TextModel(ModelBase):
    def prepare_metadata(self, vocab_only):
        pass

    def get_vocab_base_pre(self, tokenizer):
        pass
"""

METADATA = """
class Metadata:
    @staticmethod
    def apply_metadata_heuristic(metadata, *_):
        return metadata
"""

SPECIAL_VOCAB = """
class SpecialVocab:
    def __init__(self):
        self.ids = {}

    def _set_special_token(self, kind, id_):
        if isinstance(id_, int) and id_ < 0:
            raise ValueError(f"invalid value for special token type {kind}: {id_}")
        self.ids[kind] = id_

    def add_to_gguf(self, *arguments, **options):
        pass
"""

CONVERTER = """
import shutil, sys

def main():
    assert "--vocab-only" in sys.argv
    shutil.copy(r"{gguf}", sys.argv[sys.argv.index("--outfile") + 1])
"""


def write_gguf_package(build: Path) -> Path:
    """Write the parts of llama.cpp's gguf-py that our starter changes; return the package's __init__.py."""
    package = build / "gguf-py" / "gguf"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(METADATA, "utf-8")
    (package / "vocab.py").write_text(SPECIAL_VOCAB, "utf-8")
    return package / "__init__.py"


def write_build(folder: Path, gguf: Path, ids: list[int]) -> Path:
    """Write a build that converts every vocabulary to `gguf` and every text to `ids`; return its folder."""
    (folder / "bin").mkdir(parents=True)
    script(folder, "llama-tokenize", f"import sys; sys.stdin.buffer.read(); print({json.dumps(ids)})\n")
    (folder / "conversion").mkdir()
    write_gguf_package(folder)
    (folder / "conversion" / "base.py").write_text(CLASSES, "utf-8")
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER.format(gguf=gguf), "utf-8")
    return folder
