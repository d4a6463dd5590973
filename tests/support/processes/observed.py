"""Run tutor and record, per process, the rows of its micro-batches and the files that it writes; signal it at a step.

In: the variables NOTES (path) and END (JSON). Out: NOTES.RANK, one JSON object per line. Does not check the notes.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def noting(plain: Callable[..., Any], note: Callable[[dict[str, Any]], object]) -> Callable[..., Any]:
    """Wrap the trainer's compute_loss so that it passes its step, rows and tokens to `note`."""
    from tutor.stages.train.kernels.packed_attention import split_rows

    def compute_loss(self: Any, model: Any, inputs: Any, **given: Any) -> Any:
        note(
            {"step": self.state.global_step + 1, "rows": split_rows(inputs), "tokens": int(given["num_items_in_batch"])}
        )
        return plain(self, model, inputs, **given)

    return compute_loss


def main() -> None:
    """Run tutor as its console script does. END: {rank, step, signal, to: self or parent}."""
    from tutor.cli import main as cli
    from tutor.cli.progress import quiet_libraries

    rank = int(os.environ.get("RANK", "0"))
    end = json.loads(os.environ["END"])
    notes = os.open(f"{os.environ['NOTES']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(what: dict[str, Any]) -> None:
        os.write(notes, json.dumps(what).encode() + b"\n")
        if (what.get("step"), rank) == (end.get("step"), end.get("rank")):
            os.kill(os.getppid() if end["to"] == "parent" else os.getpid(), end["signal"])

    def on_event(event: str, given: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(given[0], str) and given[2] & (os.O_WRONLY | os.O_RDWR)
        if opened or event in ("os.remove", "os.rename", "os.rmdir"):
            note({"wrote": str(Path(given[0]).absolute())})

    quiet_libraries()
    from tutor.stages.train import trainer

    trainer.Trainer.compute_loss = noting(trainer.Trainer.compute_loss, note)  # type: ignore[method-assign]
    sys.addaudithook(on_event)
    cli.main()


if __name__ == "__main__":
    main()
