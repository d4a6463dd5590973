"""scripts/train_flops.py: the operations of a training, counted by hand and by PyTorch's own counter."""

import sys

import pytest
from support.processes.command import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import train_flops

from tutor.machine.memory.shapes import Shape

SMALL = Shape(64, 2, 96, 4, 2, 16, 512, tied=True)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_operations_of_one_row_are_those_counted_by_hand() -> None:
    matrices = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96)
    assert train_flops.operations(SMALL, [(10, 4)], 3, ["q_proj", "k_proj"]) == {
        "frozen weights": 4 * matrices * 10,
        "adapters": 6 * 2 * 3 * (64 + 64 + 64 + 32) * 10,
        "output head": 4 * 512 * 64 * 4,
        "attention": 2 * 6 * 2 * 4 * 16 * 55,  # 55 pairs of tokens; two products, 2 operations each, 3 passes
    }


def test_operations_of_rows_add_up() -> None:
    rows = [(10, 4), (7, 7), (1, 0)]
    parts = [train_flops.operations(SMALL, [row], 8, ALL) for row in rows]
    assert train_flops.operations(SMALL, rows, 8, ALL) == {name: sum(part[name] for part in parts) for name in parts[0]}


@pytest.mark.filterwarnings("ignore")
def test_operations_equal_pytorchs_count_of_a_pass() -> None:
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, attn_implementation="eager",
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=3, target_modules=list(ALL)))
    model.enable_input_require_grads()  # else PyTorch leaves the first layer's input out
    ids = torch.arange(20)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    counted = train_flops.operations(SMALL, [(20, 20)], 3, ALL)
    counted["attention"] = 12 * 2 * 4 * 16 * 20 * 20  # transformers' own attention computes the hidden half too
    assert counter.get_total_flops() == pytest.approx(sum(counted.values()), rel=0.01)


def test_utilisation_is_the_share_of_the_rate() -> None:
    assert train_flops.utilisation({"frozen weights": 60, "attention": 20}, 4.0, 40.0) == pytest.approx(0.5)


def test_matrix_rate_is_finite_and_positive() -> None:
    pytest.importorskip("torch")
    assert 0 < train_flops.matrix_rate(SMALL, 8, "fp32") < 1e15
