"""stages/train/kernels/fast_dropout.py: PyTorch's dropout with other draws, seeded by PyTorch's generator."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from tutor.stages.train.kernels.fast_dropout import FastDropout, replace_dropout

SHAPE = (400, 501)


def dropped(p: float, seed: int = 1) -> "torch.Tensor":
    torch.manual_seed(seed)
    return FastDropout(p).train()(torch.ones(SHAPE))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_keeps_the_mean(p: float) -> None:
    out = dropped(p)
    count = out.numel()
    assert float((out == 0).sum()) == pytest.approx(p * count, abs=5 * (p * (1 - p) * count) ** 0.5)
    assert torch.unique(out[out != 0]).tolist() == [pytest.approx(1 / (1 - p), rel=1e-3)]


def test_dropout_is_independent_across_rows_columns_and_calls() -> None:
    torch.manual_seed(3)
    layer = FastDropout(0.5).train()
    first, second = ((layer(torch.ones(SHAPE)) > 0).float() for _ in range(2))
    for one, other in (
        (first, second),
        (first[1:], first[:-1]),
        (first[:, 1:], first[:, :-1]),
        (first[:, 4:], first[:, :-4]),
    ):
        assert abs(float(((one - 0.5) * (other - 0.5)).mean())) < 5 * 0.25 / one.numel() ** 0.5


def test_dropout_gradient_uses_the_forward_mask() -> None:
    torch.manual_seed(5)
    x = torch.randn(7, 33, requires_grad=True)
    out = FastDropout(0.3).train()(x)
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), out.detach())


def test_dropout_repeats_with_pytorchs_generator_state() -> None:
    layer = FastDropout(0.1).train()
    state = torch.get_rng_state()
    first, second = layer(torch.ones(SHAPE)), layer(torch.ones(SHAPE))
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(layer(torch.ones(SHAPE)), first)
    assert torch.equal(layer(torch.ones(SHAPE)), second)


def test_dropout_in_eval_mode_is_the_identity() -> None:
    x = torch.randn(3, 5)
    assert FastDropout(0.9).eval()(x) is x


def test_replace_dropout_changes_only_active_dropout_layers() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), "off": nn.Dropout(0.0)}).eval()
    assert replace_dropout(model) == 1
    assert isinstance(model["a"][1], FastDropout)
    assert isinstance(model["off"], nn.Dropout)
    assert model["a"][1].training is False
    assert model.train()["a"][1].training is True
    assert repr(model["a"][1]) == "FastDropout(p=0.10001)"
