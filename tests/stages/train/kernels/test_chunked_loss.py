"""stages/train/kernels/chunked_loss.py: equal to cross entropy over all logits.

test_packed_attention.py compares it with TRL's own loss.
"""

from typing import Any

import pytest
from support.tolerances import roundoff, sum_error

torch = pytest.importorskip("torch")
from tutor.stages.train.kernels.chunked_loss import IGNORE_INDEX, summed_loss

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]


# --- the head on the CPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_summed_loss_equals_cross_entropy_of_all_logits(dtype: Any) -> None:
    draw = torch.Generator().manual_seed(4)
    hidden = torch.randn(2, 300, 48, generator=draw).to(dtype)
    head = torch.randn(700, 48, generator=draw).to(dtype)
    labels = torch.randint(0, 700, (2, 300), generator=draw)
    labels[torch.rand(2, 300, generator=draw) < 0.3] = IGNORE_INDEX
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    loss = summed_loss(ours, labels, head)
    logits = (exact @ head.double().T)[:, :-1].reshape(-1, 700)
    wanted = torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
    loss.backward()
    wanted.backward()
    assert loss.dtype == torch.float32
    kept = int((labels[:, 1:] != IGNORE_INDEX).sum())
    sums = 48 + 700 + kept  # terms of a logit, of the softmax, of the mean
    # Relative to the largest logit (48 products of N(0, 1), standard deviation 7), which bounds the losses.
    assert loss.item() == pytest.approx(
        wanted.item(), abs=kept * sum_error(sums, exact=True) * logits.abs().max().item()
    )
    # The backward pass: softmax and logits again, the sum over the vocabulary; bf16 gradients are rounded once more.
    rounding = sum_error(48 + 700 + 700, exact=True) + (0 if dtype == torch.float32 else 2 * roundoff(dtype))
    assert (ours.grad - exact.grad).abs().max() < rounding * exact.grad.abs().max()
    assert head.grad is None


def test_summed_loss_without_labels_is_zero_without_gradient() -> None:
    hidden = torch.randn(1, 5, 8, requires_grad=True)
    loss = summed_loss(hidden, torch.full((1, 5), IGNORE_INDEX), torch.randn(20, 8))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().max() == 0
