"""stages/train/kernels/packed_attention.py: packed rows give the loss and gradients of one row per micro-batch."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.models.tiny_models import recipe
from support.tolerances import backward_error, forward_error

torch = pytest.importorskip("torch")
from transformers import LlamaConfig, TrainerCallback
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tutor.engines.hf.loading import load_base
from tutor.engines.hf.score import answer_logprobs
from tutor.errors import DataError
from tutor.formats.models.model_folder import load_tokenizer
from tutor.machine.memory.batching import split_step
from tutor.prompt.encoding import Encoded
from tutor.stages.train.audit import label_ids
from tutor.stages.train.kernels import packed_attention
from tutor.stages.train.kernels.chunked_loss import IGNORE_INDEX
from tutor.stages.train.kernels.packed_attention import LENGTHS, use_packed_attention
from tutor.stages.train.trainer import lora_config, make_trainer, training_arguments

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]


WIDTHS = (9, 31, 14, 2, 57, 23, 11)


def made(widths: Sequence[int], seed: int = 0) -> list[Encoded]:
    """Return rows of random ids; the first half of each row, at least its first id, carries no loss."""
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 250, (width,), generator=draw).tolist() for width in widths]
    return [Encoded(row, [int(place >= max(1, len(row) // 2)) for place in range(len(row))]) for row in ids]


ROWS = made(WIDTHS)


def items(rows: Sequence[Encoded]) -> list[dict[str, list[int]]]:
    return [{"input_ids": row.ids, "labels": label_ids(row)} for row in rows]


collate = packed_attention.add_lengths(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True))


# --- the batch -------------------------------------------------------------------------------------------------------


def test_packed_batch_has_rows_in_order_and_restarted_positions() -> None:
    batch = collate([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}])
    assert {name: values if name == LENGTHS else values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "labels": [
            [IGNORE_INDEX, 6, 7, IGNORE_INDEX, 9]
        ],  # the first id of a row is never predicted, not even by the row before
        "position_ids": [[0, 1, 2, 0, 1]],
        LENGTHS: (3, 2),
    }


@pytest.mark.parametrize(
    "batch_of", [collate, DataCollatorForLanguageModeling(pad_token_id=0)], ids=["packed", "padded"]
)
def test_split_rows_returns_every_row_in_full(batch_of: Any) -> None:
    assert packed_attention.split_rows(batch_of(items(ROWS))) == [(row.ids, label_ids(row)) for row in ROWS]


@pytest.mark.parametrize("lengths", [(9, 31), (31, 9, 14, 2, 57, 23, 11), (40, 14, 2, 57, 23, 11), ()])
def test_split_rows_with_wrong_lengths_raises_error(lengths: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="positions do not start again"):
        packed_attention.split_rows({**collate(items(ROWS)), LENGTHS: lengths})


# --- the attention ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    loaded = load_base(tiny, "none", "fp32")
    assert loaded.config.num_attention_heads > loaded.config.num_key_value_heads  # grouped queries
    use_packed_attention(loaded)
    return loaded


@pytest.fixture(scope="module")
def plain(tiny: Path) -> Any:
    return load_base(tiny, "none", "fp32")


def packed_logits(model: Any, rows: Sequence[Encoded]) -> list[Any]:
    batch = collate(items(rows))
    batch.pop("labels")
    with torch.no_grad():
        return list(model(**batch, use_cache=False).logits[0].split([len(row.ids) for row in rows]))


def test_packed_logits_equal_those_of_single_rows(model: Any, plain: Any) -> None:
    for row, found in zip(ROWS, packed_logits(model, ROWS), strict=True):
        with torch.no_grad():
            alone = plain(input_ids=torch.tensor([row.ids])).logits[0]
        bound = forward_error(plain.config, len(row.ids)) * alone.abs().max().item()
        torch.testing.assert_close(found, alone, rtol=0, atol=bound)


def test_packed_row_is_independent_of_its_neighbours(model: Any) -> None:
    # Equal lengths give products of equal shapes, and so equal rounding.
    others = made(WIDTHS, seed=1)
    for place, row in enumerate(ROWS):
        mixed = [*others[:place], row, *others[place + 1 :]]
        assert torch.equal(packed_logits(model, mixed)[place], packed_logits(model, ROWS)[place])


def mask(model: Any, positions: Any) -> Any:
    width = positions.shape[1]
    return create_causal_mask(model.config, torch.zeros(1, width, 64), None, None, position_ids=positions)


def test_packed_mask_is_empty(model: Any, plain: Any) -> None:
    positions = collate(items(ROWS))["position_ids"]
    assert mask(plain, positions).numel() == sum(WIDTHS) ** 2
    assert mask(model, positions).numel() == 0
    assert mask(model, torch.arange(20)[None]) is None


def test_packed_rows_without_lengths_raise_error(model: Any) -> None:
    batch = collate(items(ROWS))
    with pytest.raises(ValueError, match="without row_lengths"):
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)


def test_packed_rows_with_padding_raise_error(model: Any) -> None:
    batch = collate(items(ROWS))
    padding = torch.ones_like(batch["input_ids"])
    padding[0, -1] = 0
    with pytest.raises(ValueError, match="no padding"):
        model(**batch, attention_mask=padding, use_cache=False)


def test_packed_mask_of_a_sliding_window_has_its_size(model: Any) -> None:
    positions = collate(items(ROWS))["position_ids"]
    nothing = torch.zeros(1, sum(WIDTHS), 64)
    config = copy.deepcopy(model.config)
    config.sliding_window = 5
    made = create_sliding_window_causal_mask(config, nothing, None, None, position_ids=positions)
    assert made.shape == (1, 1, 0, 5)


def test_single_packed_row_equals_a_plain_one(model: Any, plain: Any) -> None:
    with torch.no_grad():
        alone = plain(input_ids=torch.tensor([ROWS[4].ids])).logits[0]
    assert torch.equal(packed_logits(model, ROWS[4:5])[0], alone)


def test_batches_without_lengths_are_computed_as_by_sdpa(model: Any, plain: Any) -> None:
    pairs = [(row.ids[: row.n_prompt], row.ids[row.n_prompt :]) for row in ROWS]
    assert answer_logprobs(model, pairs) == answer_logprobs(plain, pairs)
    ids = torch.tensor([[0, 0, 0, *ROWS[0].ids], [*ROWS[6].ids, 7]])
    attention = torch.tensor([[0] * 3 + [1] * 9, [1] * 12])
    answers = [
        one.generate(input_ids=ids, attention_mask=attention, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for one in (model, plain)
    ]
    assert torch.equal(*answers)
    with torch.no_grad():
        padded = [one(input_ids=ids, attention_mask=attention).logits for one in (model, plain)]
    assert torch.equal(*padded)


# --- the training ----------------------------------------------------------------------------------------------------


class Steps(TrainerCallback):  # type: ignore[misc]
    """Records the gradients of every optimizer step before they are used."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Any]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.gradients.append({name: weight.grad.clone() for name, weight in named if weight.grad is not None})


@pytest.fixture
def steps_of(tiny: Path, tmp_path: Path) -> Any:
    """Function that returns loss, gradients and ids of every step of a training with a learning rate of 1e-12."""
    tokenizer = load_tokenizer(tiny)

    def steps(rows: Sequence[Encoded], quantization: str = "none", **changes: Any) -> Any:
        checkpointing = changes.pop("checkpointing", False)
        wanted = {"epochs": 1, "logging_steps": 1, "learning_rate": 1e-12, "dropout": 0.0, **changes}
        settings = recipe(Path("r.toml"), train=wanted).train
        batches = split_step(settings, [len(row.ids) for row in rows])
        arguments = training_arguments(settings, "fp32", 3, tmp_path, batches)
        arguments.max_grad_norm = 0.0
        arguments.activation_checkpointing = arguments.gradient_checkpointing = checkpointing
        torch.manual_seed(1)
        model = load_base(tiny, quantization, "fp32")
        trainer = make_trainer(model, tokenizer, rows, lora_config(settings), arguments)
        torch.manual_seed(2)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        seen: list[list[int]] = []
        collate = trainer.data_collator

        def watched(items: Any) -> Any:
            seen.extend(item["input_ids"] for item in items)
            return collate(items)

        trainer.data_collator = watched
        callback = Steps()
        trainer.add_callback(callback)
        trainer.train()
        assert trainer.model.get_base_model().is_gradient_checkpointing == checkpointing
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return batches, losses, callback.gradients, seen

    return steps


@pytest.fixture(scope="module")
def bounds(tiny: Path) -> tuple[float, float]:
    """Bounds of the relative errors of losses and gradients; an untrained model's logits are below its loss."""
    config = LlamaConfig.from_pretrained(tiny)
    return forward_error(config, max(WIDTHS)), backward_error(config, sum(WIDTHS))


def apart(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Return the largest difference, relative to the largest gradient."""
    assert found.keys() == wanted.keys() != set()
    largest = max(value.abs().max().item() for value in wanted.values())
    return max((found[name] - wanted[name]).abs().max().item() for name in wanted) / largest


@pytest.mark.pipeline
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    ("budget", "rows", "count"), [(1000, 4, 1), (90, 2, 2)], ids=["one pass a step", "two batches a step"]
)
@pytest.mark.parametrize("last", [3, 1])
def test_packed_loss_and_gradients_equal_single_row_batches(
    quantization: str, budget: int, rows: int, count: int, last: int, *, steps_of: Any, bounds: tuple[float, float]
) -> None:
    taken = ROWS[: 4 + last]  # the last step is incomplete
    batch = {"batch_size": 1, "accumulation": 4}
    plan, losses, gradients, order = steps_of(taken, quantization, **batch, pass_tokens=budget)
    other, wanted_losses, wanted, wanted_order = steps_of(taken, quantization, **batch, packing=False)
    assert (plan.rows, plan.count, plan.packed) == (rows, count, True)
    assert (other.rows, other.count, other.packed) == (1, 4, False)
    assert order == wanted_order
    assert sorted(order) == sorted(row.ids for row in taken)
    assert order != [row.ids for row in taken]  # shuffled, in an equal order
    assert len(losses) == 2
    assert losses == pytest.approx(wanted_losses, rel=bounds[0])
    assert len(gradients[0]) == 2 * 4 * 2  # layers, projections, A and B
    assert [apart(*pair) < bounds[1] for pair in zip(gradients, wanted, strict=True)] == [True, True]


@pytest.mark.pipeline
def test_packed_gradients_are_equal_with_checkpointing(steps_of: Any) -> None:
    kept = steps_of(ROWS, accumulation=4)
    again = steps_of(ROWS, accumulation=4, checkpointing=True)
    assert kept[0].packed
    assert again[1] == pytest.approx(kept[1], rel=1e-6)
    assert [apart(*pair) < 1e-6 for pair in zip(again[2], kept[2], strict=True)] == [True, True]


@pytest.mark.pipeline
def test_padded_loss_and_gradients_equal_single_row_batches(steps_of: Any, bounds: tuple[float, float]) -> None:
    found = steps_of(ROWS, batch_size=4, accumulation=1, packing=False)
    wanted = steps_of(ROWS, batch_size=2, accumulation=2)
    assert found[3] == wanted[3]
    assert found[1] == pytest.approx(wanted[1], rel=bounds[0])
    assert [apart(*pair) < bounds[1] for pair in zip(found[2], wanted[2], strict=True)] == [True, True]


@pytest.mark.parametrize("packing", [True, False])
def test_chunked_loss_equals_the_loss_of_trl(
    *, packing: bool, tiny: Path, tmp_path: Path, bounds: tuple[float, float]
) -> None:
    settings = recipe(
        Path("r.toml"), train={"batch_size": 7, "accumulation": 1, "packing": packing, "dropout": 0.0}
    ).train
    arguments = training_arguments(settings, "fp32", 3, tmp_path, split_step(settings, [len(row.ids) for row in ROWS]))
    model = load_base(tiny, "none", "fp32")
    trainer = make_trainer(model, load_tokenizer(tiny), ROWS, lora_config(settings), arguments)
    batch = trainer.data_collator(items(ROWS))
    for count in (None, torch.tensor(100)):
        ours = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
        theirs = SFTTrainer.compute_loss(trainer, trainer.model, dict(batch), num_items_in_batch=count)
        assert ours.item() == pytest.approx(theirs.item(), rel=bounds[0])
        with pytest.warns(FutureWarning):
            loss, outputs = trainer.compute_loss(
                trainer.model, dict(batch), return_outputs=True, num_items_in_batch=count
            )
        assert loss.item() == pytest.approx(ours.item(), rel=bounds[0])
        assert outputs.logits.shape[-1] == model.config.vocab_size
