"""Start llama.cpp's own converter of LoRA adapters with additional key-values.

    python convert_lora.py LLAMACPP METADATA ARGUMENTS...

METADATA is a JSON object of strings to write into the file; ARGUMENTS are the converter's own.
"""

import json
import runpy
import sys
from pathlib import Path

from tutor.engines.llamacpp.src.convert import text_model


def main() -> None:
    """Run the converter with ARGUMENTS. Ends with the converter's own traceback or exit code."""
    llamacpp, metadata, *arguments = sys.argv[1:]
    text_model(llamacpp, lambda: json.loads(metadata))
    script = str(Path(llamacpp) / "convert_lora_to_gguf.py")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
