"""Decoder layers on the CPU as two functions each, with their own backward pass: attention, and MLP.

In: a PEFT model that trains LoRA adapters of a frozen base. Out: the model, whose layers keep 40 % less for the
backward pass and read main memory less often: no copies of casts, rotations and heads; norms and activations are
computed again instead of kept. Does not run on a GPU, and leaves layers with other arithmetic than a Llama's (norms of
queries and keys, four norms, layers without positions) and adapters with other arithmetic than LoRA's as they are.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor
from torch.nn.functional import silu

from tutor.formats.architectures import architecture_of
from tutor.stages.train.kernels.causal_attention import Heads, attend, attend_backward
from tutor.stages.train.kernels.lora_linear import LoraLinear
from tutor.stages.train.kernels.packed_attention import LENGTHS, needs_mask


def fuse_layers(model: Any, dtype: torch.dtype, *, unpack: bool) -> int:
    """Replace the forward pass of the layers of a PEFT model on the CPU that computes in `dtype`; return their number.

    `unpack`: keep the values of 4-bit weights in `dtype`. Layers with another activation, int8 weights or DoRA stay.
    """
    decoder = model.get_base_model().get_decoder()
    if not architecture_of(decoder.config.model_type, "the base").plain_layers:
        return 0
    layers = [layer for layer in decoder.layers if _is_plain(layer)]
    fused = {
        plain: type(f"Fused{plain.__name__}", (FusedLayer, plain), {}) for plain in {type(each) for each in layers}
    }
    for layer in layers:
        layer.parts = LayerParts(layer, dtype, unpack=unpack)
        layer.__class__ = fused[type(layer)]
    return len(layers)


class LayerParts:
    """The parts of one decoder layer as the functions below need them."""

    def __init__(self, layer: Any, dtype: torch.dtype, *, unpack: bool) -> None:
        attention, mlp, config = layer.self_attn, layer.mlp, layer.self_attn.config
        names = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
        self.attention, self.mlp = (
            [LoraLinear(getattr(owner, name), dtype, unpack=unpack) for name in part]
            for owner, part in zip((attention, mlp), names, strict=True)
        )
        self.norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.heads = Heads(
            config.num_attention_heads, config.num_key_value_heads, attention.head_dim, attention.scaling
        )


def _is_plain(layer: Any) -> bool:
    config = layer.self_attn.config
    if getattr(config, "attention_dropout", 0.0) or config.hidden_act != "silu":
        return False
    return not any(isinstance(part, Linear8bitLt) or getattr(part, "lora_variant", None) for part in layer.modules())


class FusedLayer(torch.nn.Module):
    """A decoder layer of two functions; it computes padded batches, windows and generation as transformers does."""

    parts: LayerParts

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the layer's output for transformers' arguments."""
        batch, tokens, width = hidden_states.shape
        lengths = kwargs.get(LENGTHS) or (tokens,) * batch
        masked = attention_mask is not None and needs_mask(attention_mask, lengths)
        if masked or past_key_values is not None or position_embeddings is None:
            given = {"attention_mask": attention_mask, "past_key_values": past_key_values, **kwargs}
            return super().forward(hidden_states, position_embeddings=position_embeddings, **given)  # type: ignore[no-any-return]
        half = self.parts.heads.size // 2
        cosine, sine = (
            angles.expand(batch, -1, -1).reshape(batch * tokens, -1)[:, :half] for angles in position_embeddings
        )
        flat = hidden_states.reshape(-1, width)
        flat = AttentionHalf.apply(flat, self.parts, lengths, cosine, sine, *_matrices(self.parts.attention))
        flat = MlpHalf.apply(flat, self.parts, *_matrices(self.parts.mlp))
        return flat.view(batch, tokens, width)  # type: ignore[no-any-return]


class AttentionHalf(torch.autograd.Function):
    """x + o(attention(rotate(q, k), v)) of the normalized x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: LayerParts, lengths: Any, cosine: Tensor, sine: Tensor, *matrices: Tensor
    ) -> Tensor:
        """Return [tokens, hidden]; `matrices` are the adapters' of q, k, v and o."""
        *linears, output = parts.attention
        *own, last = _by_layer(parts.attention, matrices)
        normed, scale = rms_norm(x, parts.norms[0])
        (q, kept_q), (k, kept_k), (v, kept_v) = (
            linear.forward(normed, two) for linear, two in zip(linears, own, strict=True)
        )
        for states in (q, k):
            rotate(states, cosine, sine)
        attended, sums = attend((q, k, v), lengths, parts.heads)
        out, kept_o = output.forward(attended, last, onto=x)
        _save(ctx, (x, scale, q, k, v, attended, cosine, sine), sums, kept_q, kept_k, kept_v, kept_o, matrices)
        ctx.parts, ctx.lengths = parts, lengths
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients of x and of the adapters."""
        parts, (gradient,) = ctx.parts, gradients
        (x, scale, q, k, v, attended, cosine, sine), sums, *kept, matrices = _saved(ctx)
        *linears, output = parts.attention
        *own, last = _by_layer(parts.attention, matrices)
        grown, of_output = output.backward(gradient, attended, last, kept.pop())
        of_qkv = attend_backward(grown, (q, k, v), (attended, sums), ctx.lengths, parts.heads)
        for states in of_qkv[:2]:
            rotate(states, cosine, -sine)
        normed = normalized(x, scale, parts.norms[0])
        needed = ctx.needs_input_grad[0]
        grown, found = _sum_backward(linears, of_qkv, normed, own, kept, needs_input=needed)
        if grown is not None:
            grown = rms_norm_backward(grown, x, scale, parts.norms[0], gradient)
        return grown, None, None, None, None, *found, *of_output


class MlpHalf(torch.autograd.Function):
    """x + down(silu(gate) * up) of the normalized x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: LayerParts, *matrices: Tensor) -> Tensor:
        """Return [tokens, hidden]; `matrices` are the adapters' of gate, up and down."""
        *linears, down = parts.mlp
        *own, last = _by_layer(parts.mlp, matrices)
        normed, scale = rms_norm(x, parts.norms[1])
        (gate, kept_gate), (up, kept_up) = (
            linear.forward(normed, two) for linear, two in zip(linears, own, strict=True)
        )
        out, kept_down = down.forward(silu(gate).mul_(up), last, onto=x)
        _save(ctx, (x, scale, gate, up), kept_gate, kept_up, kept_down, matrices)
        ctx.parts = parts
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients of x and of the adapters."""
        parts, (gradient,) = ctx.parts, gradients
        (x, scale, gate, up), *kept, matrices = _saved(ctx)
        *linears, down = parts.mlp
        *own, last = _by_layer(parts.mlp, matrices)
        active = silu(gate)
        grown, of_down = down.backward(gradient, active * up if down.layer else active, last, kept.pop())
        of_up = active.mul_(grown)
        of_gate = torch.ops.aten.silu_backward(grown.mul_(up), gate)
        normed = normalized(x, scale, parts.norms[1])
        grown, found = _sum_backward(linears, (of_gate, of_up), normed, own, kept)
        return rms_norm_backward(grown, x, scale, parts.norms[1], gradient), None, *found, *of_down


def _matrices(linears: Sequence[LoraLinear]) -> list[Tensor]:
    return [matrix for linear in linears for matrix in linear.matrices()]


def _by_layer(linears: Sequence[LoraLinear], matrices: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Return the matrices of each layer: two, or none."""
    rest = iter(matrices)
    return [[next(rest), next(rest)] if linear.layer is not None else [] for linear in linears]


def _sum_backward(
    linears: Sequence[LoraLinear],
    gradients: Sequence[Tensor],
    x: Tensor,
    matrices: Sequence[Sequence[Tensor]],
    kept: Sequence[Sequence[Tensor]],
    *,
    needs_input: bool = True,
) -> tuple[Any, list[Tensor]]:
    """Return the gradients of the input that the layers share, and of all their matrices."""
    grown, found = None, []
    for linear, gradient, two, own in zip(linears, gradients, matrices, kept, strict=True):
        grown, matrices_found = linear.backward(gradient, x, two, own, onto=grown, needs_input=needs_input)
        found += matrices_found
    return grown, found


def _save(ctx: Any, *groups: Sequence[Tensor]) -> None:
    ctx.counts = [len(group) for group in groups]
    ctx.save_for_backward(*(tensor for group in groups for tensor in group))


def _saved(ctx: Any) -> list[Any]:
    """Return the saved tensors in their groups."""
    rest = iter(ctx.saved_tensors)
    return [list(islice(rest, count)) for count in ctx.counts]


def rms_norm(x: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """Return the normalized x, and what its rows were multiplied by, in fp32."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    scale = squares.square_().div_(x.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    return normalized(x, scale, norm), scale


def normalized(x: Tensor, scale: Tensor, norm: Any) -> Tensor:
    """Return x, its rows multiplied by `scale` and its columns by the norm's weights."""
    return (x * scale).to(x.dtype).mul_(norm.weight)


def rms_norm_backward(gradient: Tensor, x: Tensor, scale: Tensor, norm: Any, residual: Tensor) -> Tensor:
    """Return the gradient of x, plus that of the residual way; `gradient` is overwritten."""
    gradient = gradient.mul_(norm.weight).to(scale.dtype)
    dots = (gradient * x).sum(dim=-1, keepdim=True)
    share = dots.mul_(scale.pow(3)).div_(x.shape[-1])
    return gradient.mul_(scale).addcmul_(x.to(scale.dtype), share, value=-1).add_(residual).to(x.dtype)


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> None:
    """Rotate queries or keys [tokens, heads x size] by their positions, in place; the angles are [tokens, size / 2]."""
    half = cosine.shape[1]
    one, other = states.view(len(states), -1, 2, half).unbind(2)
    cosine, sine = cosine[:, None], sine[:, None]
    before = one.clone()
    one.mul_(cosine).addcmul_(other, sine, value=-1)
    other.mul_(cosine).addcmul_(before, sine)
