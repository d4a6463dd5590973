"""Start llama.cpp's own converter, with two things added: a name for the pre-tokenizers that it cannot recognise,
and key-values of ours.

    python convert.py LLAMACPP MODEL TARGET NAMES SAYS

It tells a byte-level BPE by a hash of what the tokenizer makes of one test string, so it refuses every tokenizer
that it has not met. NAMES are llama.cpp's names of the one splitting that tokenizer.json asks for, comma-separated,
and none for SentencePiece: a tokenizer that it knows must be among them, for one that it does not the first is taken.
SAYS is a JSON object of strings, which the file then carries.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def carrying(llamacpp: str, says: str) -> Any:
    """llama.cpp's class of text models, whose files get the strings of the JSON object `says` as key-values."""
    # Before site-packages: the converter, `conversion` and gguf-py of one version belong together.
    sys.path[:0] = [llamacpp, str(Path(llamacpp) / "gguf-py")]
    text_model = importlib.import_module("conversion.base").TextModel
    prepare_metadata = text_model.prepare_metadata

    def prepare_metadata_and_ours(self: Any, *args: Any, **options: Any) -> None:
        prepare_metadata(self, *args, **options)
        for key, value in json.loads(says).items():
            self.gguf_writer.add_string(key, value)

    text_model.prepare_metadata = prepare_metadata_and_ours
    return text_model


def main() -> None:
    """Convert MODEL to the F16 GGUF file TARGET. Ends with the converter's own traceback, or with one line."""
    llamacpp, model, target, listed, says = sys.argv[1:]
    names = listed.split(",") if listed else []
    text_model = carrying(llamacpp, says)
    converter = importlib.import_module("convert_hf_to_gguf")
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
