"""Imported once by the server that `support.command.forked` forks from: what the stages import, as quiet as `tutor`."""

from tutor.progress import quiet_libraries

quiet_libraries()  # before they are imported, as the command line does

from tutor import cli  # noqa: E402
from tutor.stages import base, merge, parity, train  # noqa: E402

__all__ = ["base", "cli", "merge", "parity", "train"]
