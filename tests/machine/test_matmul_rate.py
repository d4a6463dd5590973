"""The rate of matrix products: the rules of the measurement, once for real, and the guess without PyTorch."""

import sys
from dataclasses import replace
from functools import partial

import pytest

from tutor.machine import matmul_rate
from tutor.machine.host import Processor
from tutor.machine.matmul_rate import MatmulRates, fastest_seconds, find_rates, guess_rates, measure_rates
from tutor.machine.memory.shapes import SHAPES

CPU = Processor("a processor", 4, ("avx2",))


def test_fastest_call_counts_and_the_first_does_not(monkeypatch):
    monkeypatch.setattr(matmul_rate, "SECONDS", 1.0)
    now, order = [0.0], []
    took = {"bf16": iter([0.1, 9.0]), "fp32": iter([0.1, 0.4, 0.3, 0.5])}

    def call(name):
        order.append(name)
        now[0] += next(took[name])

    found = fastest_seconds({name: partial(call, name) for name in took}, lambda: now[0])
    assert found == pytest.approx({"bf16": 9.0, "fp32": 0.3})
    assert order == ["bf16", "fp32", "bf16", "fp32", "fp32", "fp32"]  # the slow one is not repeated


def test_measurement_multiplies_the_shapes_matrix_in_both_types(monkeypatch):
    """Once for real; PyTorch's random state and threads stay as a training after it expects them."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(matmul_rate, "SECONDS", 0.0)
    from tutor.engines.hf import products

    seen, product = set(), products.product

    def recorded(x, weight):
        seen.add((weight.dtype, tuple(weight.shape), tuple(x.shape)))
        return product(x, weight)

    monkeypatch.setattr(products, "product", recorded)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    shape = replace(SHAPES["tiny"], hidden=576, intermediate=4000)
    rates = measure_rates(shape)
    assert measure_rates(replace(shape)) is rates  # an equal shape is not measured again
    assert rates.measured
    assert min(rates.bf16, rates.fp32) > 0
    largest, tokens = matmul_rate.SIDES[1], matmul_rate.TOKENS
    shapes = [((largest, 576), (tokens, 576)), ((576, largest), (tokens, largest))]  # outputs, gradients of inputs
    assert seen == {(dtype, *shape) for dtype in (torch.bfloat16, torch.float32) for shape in shapes}
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_rates_without_torch_are_a_guess(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert find_rates(SHAPES["tiny"], CPU) == guess_rates(CPU)
    assert not guess_rates(CPU).measured


def test_guess_grows_with_cores_and_knows_amx():
    two, four = (guess_rates(replace(CPU, cores=cores)) for cores in (2, 4))
    assert four.fp32 == 2 * two.fp32
    amx = guess_rates(Processor("x", 2, ("amx_bf16", "avx512_bf16", "avx512f", "avx2")))
    assert amx.bf16 > amx.fp32
    plain = guess_rates(Processor("x", 2, ("avx512_bf16", "avx512f", "avx2")))
    assert plain.bf16 < plain.fp32
    assert guess_rates(Processor("x", 2, ())).fp32 < two.fp32


def test_rates_are_recorded_in_gflops():
    assert MatmulRates(156.24e9, 288e9).gflops == {"bf16": 156.2, "fp32": 288.0}
