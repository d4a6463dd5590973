"""Token ids of a text by llama.cpp's own tokenizer, for a GGUF that may hold a vocabulary alone.

In: a GGUF and a text. Out: ids, with the special tokens that the file's tokenizer adds. Loads no weights.
"""

import json
import subprocess
from pathlib import Path

from tutor.engines.llamacpp.process import Command, clean_environment, killed_with_parent, program_error, programs
from tutor.errors import ArtifactError


def tokenize(gguf: Path, text: str) -> list[int]:
    """Return the ids of a text. Raises ArtifactError when the file's vocabulary does not load."""
    program = programs("llama-tokenize").tokenize
    command: Command = [program, "-m", gguf, "--stdin", "--ids", "--no-escape", "--log-disable"]
    done = subprocess.run(
        killed_with_parent(command),
        input=text.encode(),
        capture_output=True,
        env=clean_environment(),
        check=False,
    )
    if done.returncode:
        output = (done.stdout + done.stderr).decode("utf-8", "replace")
        raise program_error(f"cannot tokenize with {gguf}", done.returncode, output)
    try:
        return [int(id_) for id_ in json.loads(done.stdout)]
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{program} printed no list of ids: {error}", "make llamacpp") from None
