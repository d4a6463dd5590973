"""Start llama.cpp's own converter of LoRA adapters, with key-values of ours added.

    python convert_lora.py LLAMACPP SAYS ARGUMENTS...

SAYS is a JSON object of strings, which the file then carries; ARGUMENTS are the converter's own.
"""

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Convert what ARGUMENTS say. Ends with the converter's own traceback or exit code."""
    llamacpp, says, *arguments = sys.argv[1:]
    # Before site-packages: the converter, `conversion` and gguf-py of one version belong together.
    sys.path[:0] = [llamacpp, str(Path(llamacpp) / "gguf-py")]
    text_model = importlib.import_module("conversion.base").TextModel
    prepare_metadata = text_model.prepare_metadata

    def prepare_metadata_and_ours(self: Any, *args: Any, **options: Any) -> None:
        prepare_metadata(self, *args, **options)
        for key, value in json.loads(says).items():
            self.gguf_writer.add_string(key, value)

    text_model.prepare_metadata = prepare_metadata_and_ours
    script = str(Path(llamacpp) / "convert_lora_to_gguf.py")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
