"""Trackers of experiments that transformers reports a training to: their names, and the packages that they need.

In: names of train.report_to. Out: the names, or an error with the command that installs a missing package. Imports no
tracker and sends nothing.
"""

import importlib.util
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator

from tutor.errors import HostError

TRACKERS = {
    "azure_ml": ("azureml", "azureml-sdk"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dagshub": ("dagshub", "dagshub mlflow"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}
"""Module and packages of each tracker, by transformers' name of it."""


def refuse_missing_trackers(names: Sequence[str]) -> None:
    """Raise HostError for a tracker whose package is not installed."""
    for name in names:
        module, packages = TRACKERS[name]
        if importlib.util.find_spec(module) is None:
            raise HostError(
                f"train.report_to names {name}, and its package is not installed",
                f"pip install {packages}, or remove it from train.report_to",
            )


def _tracker(name: str) -> str:
    if name == "tensorboard":
        raise ValueError("is always written, into adapter.log/tensorboard: leave it out")
    if name not in TRACKERS:
        raise ValueError(f"is no tracker that transformers knows; known: {', '.join(TRACKERS)}")
    return name


TrackerName = Annotated[str, AfterValidator(_tracker)]
"""Name of a tracker, as transformers calls it."""
