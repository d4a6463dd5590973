"""Start llama.cpp's own converter of LoRA adapters, with key-values of ours added.

    python convert_lora.py LLAMACPP SAYS ARGUMENTS...

SAYS is a JSON object of strings, which the file then carries; ARGUMENTS are the converter's own.
"""

import runpy
import sys
from pathlib import Path

from tutor.engines.llamacpp.src.convert import carrying


def main() -> None:
    """Convert what ARGUMENTS say. Ends with the converter's own traceback or exit code."""
    llamacpp, says, *arguments = sys.argv[1:]
    carrying(llamacpp, says)
    script = str(Path(llamacpp) / "convert_lora_to_gguf.py")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
