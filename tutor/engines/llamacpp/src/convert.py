"""Start llama.cpp's own converter with two changes: a name for unknown pre-tokenizers, and additional key-values.

    python convert.py LLAMACPP MODEL TARGET NAMES METADATA

The converter identifies a byte-level BPE by a hash of one test string's tokens and refuses every unknown hash. NAMES
are llama.cpp's names, separated by commas, of the pre-tokenizer in tokenizer.json; none for SentencePiece. The name
that the converter identifies must be one of them; an unknown tokenizer gets the first. METADATA is a JSON object of
strings to write into the file.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def text_model(llamacpp: str, metadata: str) -> Any:
    """llama.cpp's class of text models, changed to write the strings of the JSON object `metadata` as key-values."""
    # First in sys.path: the converter, `conversion` and gguf-py of one version belong together.
    sys.path[:0] = [llamacpp, str(Path(llamacpp) / "gguf-py")]
    model = importlib.import_module("conversion.base").TextModel
    prepare_metadata = model.prepare_metadata

    def prepare_all_metadata(self: Any, *args: Any, **options: Any) -> None:
        prepare_metadata(self, *args, **options)
        for key, value in json.loads(metadata).items():
            self.gguf_writer.add_string(key, value)

    model.prepare_metadata = prepare_all_metadata
    return model


def main() -> None:
    """Convert MODEL to the F16 GGUF file TARGET. Ends with the converter's own traceback, or with one line."""
    llamacpp, model, target, listed, metadata = sys.argv[1:]
    names = listed.split(",") if listed else []
    model_class = text_model(llamacpp, metadata)
    converter = importlib.import_module("convert_hf_to_gguf")
    recognise = model_class.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            found = str(recognise(self, tokenizer))
        except NotImplementedError:
            if not names:
                raise
            return names[0]
        if found not in names:
            expected = names[0] if names else "SentencePiece"
            raise SystemExit(f"the converter identifies this tokenizer as {found!r}, tokenizer.json has {expected!r}")
        return found

    model_class.get_vocab_base_pre = get_vocab_base_pre
    name = Path(target).name.partition("-")[0]
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", target, "--outtype", "f16", "--model-name", name]
    converter.main()


if __name__ == "__main__":
    main()
