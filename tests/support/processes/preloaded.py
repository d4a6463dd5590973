"""Imports that `command.forked` preloads once in its server: those of the stages, as quiet as `tutor`."""

from tutor.cli.progress import quiet_libraries

quiet_libraries()  # before they are imported, as the command line does

from tutor.cli import main as cli
from tutor.stages.base import stage as base
from tutor.stages.merge import stage as merge
from tutor.stages.parity import stage as parity
from tutor.stages.train import stage as train

__all__ = ["base", "cli", "merge", "parity", "train"]
