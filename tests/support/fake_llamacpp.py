"""Programs that stand in for those of a llama.cpp build."""

import json
import sys
from pathlib import Path

from tutor.engines.llamacpp.build import MARKER


def script(build: Path, name: str, text: str) -> None:
    path = build / "bin" / name
    path.write_text(f"#!{sys.executable}\n{text}", "utf-8")
    path.chmod(0o755)
    sizes = {program.name: program.stat().st_size for program in (build / "bin").iterdir()}
    (build / MARKER).write_text(json.dumps({"sizes": sizes}), "utf-8")
