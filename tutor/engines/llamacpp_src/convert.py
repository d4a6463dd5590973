"""Start llama.cpp's own converter, with one thing added: a name for the pre-tokenizers that it cannot recognise.

    python convert.py LLAMACPP MODEL TARGET NAMES

It tells a byte-level BPE by a hash of what the tokenizer makes of one test string, so it refuses every tokenizer
that it has not met. NAMES are llama.cpp's names of the one splitting that tokenizer.json asks for, comma-separated,
and none for SentencePiece: a tokenizer that it knows must be among them, for one that it does not the first is taken.
"""

import importlib
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Convert MODEL to the F16 GGUF file TARGET. Ends with the converter's own traceback, or with one line."""
    llamacpp, model, target, listed = sys.argv[1:]
    names = listed.split(",") if listed else []
    # Before site-packages: the converter, `conversion` and gguf-py of one version belong together.
    sys.path[:0] = [llamacpp, str(Path(llamacpp) / "gguf-py")]
    converter = importlib.import_module("convert_hf_to_gguf")
    text_model = importlib.import_module("conversion.base").TextModel
    recognise = text_model.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            found = str(recognise(self, tokenizer))
        except NotImplementedError:
            if not names:
                raise
            return names[0]
        if found not in names:
            said = names[0] if names else "SentencePiece"
            raise SystemExit(f"the converter knows this tokenizer as {found!r}, tokenizer.json says {said!r}")
        return found

    text_model.get_vocab_base_pre = get_vocab_base_pre
    name = Path(target).name.partition("-")[0]
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", target, "--outtype", "f16", "--model-name", name]
    converter.main()


if __name__ == "__main__":
    main()
