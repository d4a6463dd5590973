"""Keep decoder layers in RAM and copy each weight to the device only while it is used.

In: a PEFT model on the CPU. Out: the model, computing on a device. Needs gradient checkpointing: without it, autograd
keeps every copy until the backward pass. Does not use accelerate's offload, which cannot train an adapter: PEFT creates
the adapters of an offloaded layer on the meta device, without values.
"""

from collections.abc import Set
from typing import Any

import torch
from bitsandbytes.nn import Params4bit


def stream_layers(model: Any, resident: int, device: torch.device) -> int:
    """Move the model to `device` except the frozen weights of the layers after the first `resident` ones.

    Returns the number of layers that stay in RAM.
    """
    base = model.get_base_model()
    waiting = list(base.get_decoder().layers)[resident:]
    _move(base, set(waiting), device)
    for layer in waiting:
        for owner in layer.modules():
            _stream(owner, device)
    # With a device map of several parts, accelerate does not move the model, and finds the device of a quantized one.
    base.hf_device_map = {name: device for name, _ in base.named_children()}
    return len(waiting)


def _move(module: torch.nn.Module, waiting: Set[torch.nn.Module], device: torch.device) -> None:
    """Move a module to the device, except the layers inside it that wait."""
    if waiting.isdisjoint(module.modules()):
        module.to(device)
    elif module not in waiting:
        for child in module.children():
            _move(child, waiting, device)


def _stream(owner: torch.nn.Module, device: torch.device) -> None:
    """Put a module's own frozen weights on the device during its forward pass only.

    The hooks are on the modules inside a layer: those of the layer do not run when checkpointing recomputes it.
    """
    in_ram = {}
    for name, parameter in owner.named_parameters(recurse=False):
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device)
        else:
            in_ram[name] = _pinned(parameter, device)
    if not in_ram:
        return

    def fetch(module: torch.nn.Module, _: Any) -> None:
        for name, parameter in in_ram.items():
            setattr(module, name, _copied(parameter, device))

    def release(module: torch.nn.Module, *_: Any) -> None:
        for name, parameter in in_ram.items():
            setattr(module, name, parameter)

    owner.register_forward_pre_hook(fetch)
    # always_call: checkpointing ends its recomputation by an exception.
    owner.register_forward_hook(release, always_call=True)


def _pinned(parameter: torch.nn.Parameter, device: torch.device) -> torch.nn.Parameter:
    """Return the parameter page-locked for a GPU, its 4-bit scales (1/30 of its size) moved to the device."""
    if device.type == "cuda":
        parameter.data = parameter.data.pin_memory()
    if isinstance(parameter, Params4bit):
        parameter.quant_state.to(device)
    return parameter


def _copied(parameter: torch.nn.Parameter, device: torch.device) -> torch.nn.Parameter:
    data = parameter.data.to(device, non_blocking=True, copy=True)
    if not isinstance(parameter, Params4bit):
        return torch.nn.Parameter(data, requires_grad=False)
    return Params4bit(  # type: ignore[no-any-return]
        data,
        requires_grad=False,
        quant_state=parameter.quant_state,
        blocksize=parameter.blocksize,
        compress_statistics=parameter.compress_statistics,
        quant_type=parameter.quant_type,
        quant_storage=parameter.quant_storage,
        bnb_quantized=True,
    )
