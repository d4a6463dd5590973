"""What scripts/sweep.py measures: settings in groups, and their order. In: nothing. Out: constants. Trains nothing."""

from collections.abc import Mapping
from typing import Any

SEEDS = (1, 2, 3)
RATES = (5e-4, 1e-3, 2e-3)
"""Learning rates of every setting; beyond the lowest and the highest, half and double as far as the loss falls."""
LIMITS = (2e-5, 2e-2)
"""Lowest and highest learning rate that is tried."""
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PRIVATE = ("lr_scheduler_type", "neftune_noise_alpha")
"""Arguments of transformers that a cell may set, and a recipe cannot."""

Setting = Mapping[str, Any]
"""Values of [train] that differ from the recipe's, and those of PRIVATE."""

REFERENCE: Setting = {
    "target_modules": "all-linear", "rank": 16, "alpha": 32, "epochs": 2, "lr_scheduler_type": "cosine",
}  # fmt: skip
SCHEDULES: dict[str, Setting] = {
    f"{epochs} epoch{'s' * (epochs > 1)}, {kind}": {
        **REFERENCE,
        "epochs": epochs,
        "lr_scheduler_type": kind,
        "evaluations_per_epoch": int(epochs > 2),  # is an adapter on the way better than the last?
    }
    for kind in ("cosine", "linear")
    for epochs in (2, 1, 3, 6)
}
SHAPES: dict[str, Setting] = {
    f"{name}, rank {rank}": {**REFERENCE, "target_modules": modules, "rank": rank, "alpha": 2 * rank}
    for name, modules in (("all linear layers", "all-linear"), ("attention", ATTENTION))
    for rank in (16, 8, 32)
}
VARIANTS: dict[str, Setting] = {
    "LoRA": REFERENCE,
    "rsLoRA": {**REFERENCE, "variant": "rslora"},
    "NEFTune, alpha 5": {**REFERENCE, "neftune_noise_alpha": 5.0},
}
GROUPS: dict[str, dict[str, Setting]] = {
    "Epochs and schedule": SCHEDULES,
    "Target modules and rank": SHAPES,
    "Variants": VARIANTS,
}
"""The tables; the first setting of each is the one that others are compared with."""

PLAN: tuple[tuple[bool, Setting], ...] = (
    (True, REFERENCE),
    (True, SHAPES["attention, rank 8"]),
    (False, SCHEDULES["1 epoch, cosine"]),
    (False, SCHEDULES["3 epochs, cosine"]),
    (False, SCHEDULES["2 epochs, linear"]),
    (True, SHAPES["all linear layers, rank 8"]),
    (True, SHAPES["attention, rank 16"]),
    (False, SCHEDULES["6 epochs, cosine"]),
    (False, VARIANTS["NEFTune, alpha 5"]),
    (True, VARIANTS["rsLoRA"]),
    *((True, setting) for group in GROUPS.values() for setting in group.values()),
)
"""What is measured, in this order: at its own best rate (True), or at the best rate of REFERENCE (False)."""
