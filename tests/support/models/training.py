"""Rows, settings and measurements for trainings of the tiny Llama."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support.models.tiny_models import recipe

torch = pytest.importorskip("torch")
import pytest
from transformers import TrainerCallback

torch = pytest.importorskip("torch")
from tutor.prompt.encoding import Encoded

ROWS = [
    {"instruction": f"¿Qué es {what}?", "response": f"Es {what} de TypeScript: sirve para {use}."}
    for what, use in [
        ("una interfaz", "describir objetos"),
        ("un genérico", "reutilizar código con tipos"),
        ("una tupla", "guardar pares"),
        ("un enum", "nombrar valores"),
        ("una clase", "agrupar datos y métodos"),
        ("un módulo", "separar archivos"),
        ("un alias", "dar nombre a un tipo"),
        ("una unión", "aceptar varios tipos"),
        ("un literal", "fijar un valor"),
        ("una promesa", "esperar un resultado"),
        ("un decorador", "anotar clases"),
        ("un guardia", "estrechar un tipo"),
    ]
]


HELD_OUT = [
    {"instruction": f"¿Qué es {what}?", "response": f"Es {what} de TypeScript: sirve para {use}."}
    for what, use in [("un iterador", "recorrer listas"), ("una enumeración", "nombrar valores y describir objetos")]
]


def settings(**changes: Any) -> Any:
    """Return the train section of a recipe: two steps of two rows per epoch unless changed."""
    short = {"batch_size": 2, "accumulation": 2, "epochs": 1, "logging_steps": 1, "learning_rate": 5e-3}
    return recipe(Path("r.toml"), train={**short, **changes}).train


def moved(model: Any) -> Any:
    """Return the model with a changed adapter: with the initial B of zeros, A has no gradients."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def apart(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Return the largest difference, relative to the largest gradient."""
    assert found.keys() == wanted.keys() != set()
    largest = max(value.abs().max().item() for value in wanted.values())
    return max((found[name] - wanted[name]).abs().max().item() for name in wanted) / largest


class FirstGradient(TrainerCallback):  # type: ignore[misc]
    """Records the gradients of the first optimizer step, and ends the training."""

    def __init__(self) -> None:
        self.gradients: dict[str, Any] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = kwargs["model"].named_parameters()
        self.gradients = {name: weight.grad.clone() for name, weight in parameters if weight.grad is not None}
        control.should_training_stop = True


SOURCE = "path:una-base"


def gradients(model: Any, rows: Sequence[Encoded]) -> dict[str, Any]:
    """Return the gradients of the mean loss of all supervised tokens, computed without a library."""
    model.zero_grad()
    total = sum(sum(row.mask) for row in rows)
    for row in rows:
        ids = torch.tensor([row.ids])
        logits = model(input_ids=ids).logits[0, row.n_prompt - 1 : -1].float()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, row.n_prompt :], reduction="sum")
        (losses / total).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def history(losses: Sequence[float | None], **held_out: float) -> list[dict[str, Any]]:
    """Return one entry per step; `at5=1.0` is a held-out loss of 1.0 at step 5."""
    entries: list[dict[str, Any]] = [
        {"step": step, "epoch": step / 10, "loss": loss, "learning_rate": 1e-4, "grad_norm": 1.0}
        for step, loss in enumerate(losses, 1)
    ]
    for name, value in held_out.items():
        entries[int(name.removeprefix("at")) - 1]["held_out_loss"] = value
    return entries
