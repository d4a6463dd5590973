"""stages/train/held_out_loss.py: equal weights of all tokens, without an effect on the model in training."""

import math
from typing import Any

import pytest
from support.tolerances import backward_error, forward_error, largest_logit, roundoff

torch = pytest.importorskip("torch")
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from support.models.training import apart, gradients, moved

from tutor.engines.hf.score import answer_logprobs
from tutor.errors import ArtifactError
from tutor.prompt.encoding import Encoded
from tutor.stages.train import held_out_loss

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_scoring_keeps_gradients_and_module_modes(
    quantization: str, precision: str, trainer_of: Any, rows: list[Encoded]
) -> None:
    model = moved(trainer_of(rows, quantization, precision, dropout=0.0).model)
    assert all(module.training for module in model.modules())
    model.get_input_embeddings().eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = gradients(model, rows[:4])
    first = held_out_loss.mean_loss(model, rows)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert held_out_loss.mean_loss(model, rows) == first
    held_out_loss.refuse_inference_layout(model)
    after = gradients(model, rows[:4])
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_scoring_has_no_dropout_and_restores_mode_after_error(trainer_of: Any, rows: list[Encoded]) -> None:
    model = moved(trainer_of(rows, "nf4", dropout=0.5).model)
    assert held_out_loss.mean_loss(model, rows) == held_out_loss.mean_loss(model, rows)

    def leave() -> None:
        with held_out_loss.evaluating(model):
            assert not torch.is_grad_enabled()
            assert not any(m.training for m in model.modules() if not isinstance(m, Linear4bit))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def dequantized(layer: Any) -> Any:
    if isinstance(layer, Linear4bit):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return layer.state.CB.float() * layer.state.SCB[:, None] / 127


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_gradients_and_scores_equal_those_of_dequantized_base(
    quantization: str, trainer_of: Any, rows: list[Encoded]
) -> None:
    model = moved(trainer_of(rows, quantization, dropout=0.0).model)
    found, loss = gradients(model, rows[:4]), held_out_loss.mean_loss(model, rows)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear4bit | Linear8bitLt):
                weight = dequantized(child)
                plain = torch.nn.Linear(child.in_features, child.out_features, bias=False)
                plain.weight = torch.nn.Parameter(weight, requires_grad=False)
                setattr(parent, name, plain)
    tokens = sum(len(row.ids) for row in rows[:4])
    assert apart(found, gradients(model, rows[:4])) < backward_error(model.get_base_model().config, tokens)
    longest = max(len(row.ids) for row in rows)
    pairs = [(row.ids[: row.n_prompt], row.ids[row.n_prompt :]) for row in rows]
    bound = forward_error(model.get_base_model().config, longest) * largest_logit(model, pairs)
    assert held_out_loss.mean_loss(model, rows) == pytest.approx(loss, abs=bound)


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes packs for inference on CPUs with AVX512-BF16 only")
def test_layer_packed_by_eval_mode_is_refused(trainer_of: Any, rows: list[Encoded]) -> None:
    model = moved(trainer_of(rows, "nf4", dropout=0.0).model)
    right = gradients(model, rows[:4])
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([rows[0].ids]))
    model.train()
    with pytest.raises(ArtifactError, match=r"layers\.0\.self_attn\.q_proj is packed for inference") as caught:
        held_out_loss.refuse_inference_layout(model)
    assert caught.value.code == 5
    assert apart(gradients(model, rows[:4]), right) > 0.01  # the reason for the refusal


# --- the scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mean_loss_weights_supervised_tokens_equally(precision: str, trainer_of: Any, rows: list[Encoded]) -> None:
    model = trainer_of(rows, "none", precision).model
    ids = [torch.tensor([row.ids]) for row in rows]
    with torch.no_grad(), held_out_loss.evaluating(model):
        losses = [
            torch.nn.functional.cross_entropy(
                model(input_ids=item).logits[0, row.n_prompt - 1 : -1].float(),
                item[0, row.n_prompt :],
                reduction="none",
            )
            for item, row in zip(ids, rows, strict=True)
        ]
    pairs = [(row.ids[: row.n_prompt], row.ids[row.n_prompt :]) for row in rows]
    error = forward_error(model.get_base_model().config, max(len(row.ids) for row in rows))
    if precision == "bf16":  # each of the two passes rounds its logits once more
        error += 2 * roundoff(torch.bfloat16)
    bound = error * largest_logit(model, pairs)
    assert held_out_loss.mean_loss(model, rows) == pytest.approx(torch.cat(losses).mean().item(), abs=bound)
    with held_out_loss.evaluating(model):
        scores = answer_logprobs(model, pairs)
    assert [len(values) for values in scores] == [sum(row.mask) for row in rows]
    each = [value for values in scores for value in values]
    assert held_out_loss.mean_loss(model, rows) == -math.fsum(each) / len(each)  # tokens have equal weights


def test_mean_loss_of_nan_raises_error(trainer_of: Any, rows: list[Encoded]) -> None:
    model = moved(trainer_of(rows).model)
    with torch.no_grad():
        next(weight for weight in model.parameters() if weight.requires_grad).fill_(math.nan)
    with pytest.raises(ArtifactError, match="held-out loss is nan") as caught:
        held_out_loss.mean_loss(model, rows)
    assert caught.value.code == 5
