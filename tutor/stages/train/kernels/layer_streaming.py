"""Decoder layers that wait in RAM: each weight is copied to the device for the moment it is used in.

In: a PEFT model on the CPU. Out: the same, computing on a device. accelerate's offload cannot train an adapter: PEFT
makes the adapters of an offloaded layer on the meta device, without numbers. Needs gradient checkpointing, without
which autograd keeps every copy until the backward pass.
"""

from typing import Any

import torch
from bitsandbytes.nn import Params4bit


def stream_layers(model: Any, resident: int, device: torch.device) -> int:
    """Put all but the frozen weights of the layers from `resident` on onto `device`; how many layers stream."""
    base = model.get_base_model()
    layers = list(base.model.layers)
    for module in (base.model.embed_tokens, base.model.norm, base.model.rotary_emb, base.lm_head, *layers[:resident]):
        module.to(device)
    for layer in layers[resident:]:
        for owner in layer.modules():
            _stream(owner, device)
    # accelerate moves a whole model unless its parts are said to be placed, and asks a quantized one where it is.
    base.hf_device_map = {"model": device, "lm_head": device}
    return len(layers) - resident


def _stream(owner: torch.nn.Module, device: torch.device) -> None:
    """Let a module's own frozen weights be on the device during its forward pass alone.

    Hooks of a decoder layer do not run when checkpointing computes it again; those of the modules inside do.
    """
    waiting = {}
    for name, parameter in owner.named_parameters(recurse=False):
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device)
        else:
            waiting[name] = _held(parameter, device)
    if not waiting:
        return

    def fetch(module: torch.nn.Module, _: Any) -> None:
        for name, parameter in waiting.items():
            setattr(module, name, _copied(parameter, device))

    def release(module: torch.nn.Module, *_: Any) -> None:
        for name, parameter in waiting.items():
            setattr(module, name, parameter)

    owner.register_forward_pre_hook(fetch)
    # Always: the second pass of checkpointing ends in the middle, by an exception.
    owner.register_forward_hook(release, always_call=True)


def _held(parameter: torch.nn.Parameter, device: torch.device) -> torch.nn.Parameter:
    """The parameter as it waits: page-locked for a GPU, its 4-bit scales (a thirtieth of it) on the device for good."""
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
