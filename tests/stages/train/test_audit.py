"""stages/train/audit.py: rows are encoded uncut, and a collator that changes a row fails the audit."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from support.models.training import ROWS, settings
from transformers import DataCollatorForLanguageModeling

from tutor.engines.hf.loading import load_base
from tutor.errors import DataError, RecipeError
from tutor.formats.models.model_folder import load_tokenizer
from tutor.machine.memory.batching import split_step
from tutor.prompt.encoding import Encoded, RowEncoder, audit
from tutor.prompt.messages import conversation
from tutor.prompt.tutor_format import completion, render
from tutor.stages.train.audit import audit_labels, encode_rows, label_ids, refuse_control_tokens
from tutor.stages.train.kernels.packed_attention import LENGTHS, split_rows
from tutor.stages.train.trainer import lora_config, make_trainer, training_arguments

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]


# --- the rows --------------------------------------------------------------------------------------------------------


def test_too_long_rows_are_refused_by_name_and_not_cut(tokenizer: Any, rows: list[Encoded]) -> None:
    longest = max(range(len(rows)), key=lambda number: len(rows[number].ids))
    limit = len(rows[longest].ids)
    assert encode_rows(RowEncoder(tokenizer), ROWS, limit) == rows
    with pytest.raises(DataError, match=rf"1 of 12 rows are longer than train.max_length \({limit - 1} tokens") as one:
        encode_rows(RowEncoder(tokenizer), ROWS, limit - 1)
    assert one.value.problems == (f"{limit} tokens: {ROWS[longest]['instruction']!r}",)
    assert one.value.code == 3
    with pytest.raises(DataError) as located:
        encode_rows(RowEncoder(tokenizer), [{**ROWS[longest], "line": 9}], 16, Path("mine.jsonl"))
    assert located.value.problems[0].startswith(f"mine.jsonl:9: {limit} tokens: ")
    with pytest.raises(DataError, match="30 of 30 rows") as many:
        encode_rows(RowEncoder(tokenizer), [{**ROWS[0], "instruction": "ñ" * 200}] * 30, 16)
    assert len(many.value.problems) == 20
    assert all("ñ" * 61 not in problem for problem in many.value.problems)


def test_encoded_row_is_served_prompt_answer_and_eos(tokenizer: Any, rows: list[Encoded]) -> None:
    for row, source in zip(rows, ROWS, strict=True):
        assert row.ids[: row.n_prompt] == tokenizer(render(conversation(source["instruction"])))["input_ids"]
        answer = tokenizer(completion(source["response"]), add_special_tokens=False)["input_ids"]
        assert row.ids[row.n_prompt :] == [*answer, tokenizer.eos_token_id]
        assert audit(row, row.ids[: row.n_prompt], tokenizer) == []


def test_control_token_of_the_base_is_refused(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<filename>"]})
    tokenizer.add_tokens(["interfaz"])  # text of its own token is text

    encoder = RowEncoder(tokenizer, system="Eres un tutor de <div>.")

    def row(question: str, answer: str) -> dict[str, str]:
        return {"instruction": question, "response": answer}

    good = ("r.jsonl:1", row("¿Qué es una interfaz?", "Un <div> no, ni < filename >."))
    bad = [
        ("r.jsonl:4", row("cat <filename>", "a")),
        ("r.jsonl:9", {**row("a", "<filename>"), "reasoning": "</think>"}),
        ("eval.jsonl:2", {"instruction": "a", "history": [{"role": "user", "content": "<｜User｜>"}]}),
    ]
    refuse_control_tokens(encoder, [good])
    with pytest.raises(DataError, match="3 of 4 rows hold a control token of the base") as caught:
        refuse_control_tokens(encoder, [good, *bad])
    assert caught.value.code == 3
    assert caught.value.problems == (
        "r.jsonl:4: holds <filename>", "r.jsonl:9: holds <filename>, </think>", "eval.jsonl:2: holds <｜User｜>",
    )  # fmt: skip
    with pytest.raises(DataError, match="25 of 25") as many:
        refuse_control_tokens(encoder, [bad[0]] * 25)
    assert len(many.value.problems) == 20
    with pytest.raises(RecipeError, match="system holds <filename>") as system:
        refuse_control_tokens(RowEncoder(tokenizer, system="Eres <filename>."), [good])
    assert system.value.code == 2


@pytest.mark.parametrize("packing", [True, False])
def test_collated_rows_equal_the_encoded_rows(
    *, packing: bool, trainer_of: Any, rows: list[Encoded], tokenizer: Any
) -> None:
    trainer = trainer_of(rows, packing=packing, accumulation=4)
    assert trainer.args.per_device_train_batch_size == (8 if packing else 2)
    assert audit_labels(trainer, rows, tokenizer) == 12
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(12)])
    assert split_rows(batch) == [(row.ids, label_ids(row)) for row in rows]
    ends = (batch["labels"] == tokenizer.eos_token_id).sum().item()
    assert ends == 12  # padding has this id too, without loss


def without(row: Encoded, n: int) -> Encoded:
    return Encoded(row.ids, [*row.mask[:-n], *[0] * n])


@pytest.mark.parametrize(
    ("sabotage", "expected"),
    [
        (lambda row, tokenizer: without(row, 1), "EOS is not supervised at the end"),
        (lambda row, tokenizer: Encoded(row.ids[:-1], row.mask[:-1]), "EOS is not supervised at the end"),
        (lambda row, tokenizer: without(row, len(row.ids) - row.n_prompt), "no token carries loss"),
        (lambda row, tokenizer: Encoded([row.ids[0], *row.ids], [0, *row.mask]), "2 BOS tokens instead of 1"),
        (lambda row, tokenizer: Encoded(row.ids[1:], row.mask[1:]), "0 BOS tokens instead of 1"),
        (
            lambda row, tokenizer: Encoded([row.ids[0], row.ids[5], *row.ids[2:]], row.mask),
            "the served prompt is not a prefix of the row",
        ),
        (
            lambda row, tokenizer: Encoded([*row.ids, tokenizer.eos_token_id], [*row.mask, 1]),
            "EOS is supervised more than once",
        ),
        (lambda row, tokenizer: Encoded(row.ids, [1] * len(row.ids)), "the served prompt is not a prefix of the row"),
    ],
    ids=["EOS masked", "EOS cut", "no loss", "two BOS", "no BOS", "another prompt", "two ends", "loss on the prompt"],
)
def test_changed_row_fails_the_audit(
    sabotage: Any, expected: str, trainer_of: Any, rows: list[Encoded], tokenizer: Any
) -> None:
    trainer = trainer_of([*rows[:3], sabotage(rows[3], tokenizer)])
    with pytest.raises(DataError) as caught:
        audit_labels(trainer, rows[:4], tokenizer)
    assert caught.value.code == 3
    assert f"train row 4: {expected}" in caught.value.problems
    assert not any("row 3" in problem for problem in caught.value.problems)


def test_dropped_row_fails_the_audit(trainer_of: Any, rows: list[Encoded], tokenizer: Any) -> None:
    with pytest.raises(DataError, match="the trainer kept 11 of 12 rows"):
        audit_labels(trainer_of(rows[1:]), rows, tokenizer)


def test_reordered_rows_fail_the_audit(trainer_of: Any, rows: list[Encoded], tokenizer: Any) -> None:
    trainer = trainer_of(rows)
    collate = trainer.data_collator
    trainer.data_collator = lambda items: collate([items[1], items[0], *items[2:]])
    with pytest.raises(DataError) as caught:
        audit_labels(trainer, rows, tokenizer)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        f"train row {number}" for number in (1, 2, 5, 6, 9, 10)
    ]


def test_wrong_row_lengths_fail_the_audit(trainer_of: Any, rows: list[Encoded], tokenizer: Any) -> None:
    trainer = trainer_of(rows)
    collate = trainer.data_collator

    def shifted(items: Any) -> Any:
        batch = collate(items)
        first, second, *others = batch[LENGTHS]
        return {**batch, LENGTHS: (first + 1, second - 1, *others)}

    trainer.data_collator = shifted
    with pytest.raises(DataError, match="positions do not start again"):
        audit_labels(trainer, rows, tokenizer)


def test_row_cut_by_the_library_fails_the_audit(
    trainer_of: Any, rows: list[Encoded], tokenizer: Any, tiny: Path, tmp_path: Path
) -> None:
    plain = settings(packing=False)  # TRL does not pack rows that it cuts
    arguments = training_arguments(plain, "fp32", 1, tmp_path, split_step(plain, [len(row.ids) for row in rows]))
    arguments.max_length = len(rows[0].ids) - 1  # TRL's default of 1024 cuts long rows
    model = load_base(tiny, "none", "fp32")
    trainer = make_trainer(model, tokenizer, rows[:1], lora_config(settings()), arguments)
    with pytest.raises(DataError) as caught:
        audit_labels(trainer, rows[:1], tokenizer)
    assert "train row 1: EOS is not supervised at the end" in caught.value.problems


def test_collator_that_masks_eos_as_padding_fails_the_audit(
    trainer_of: Any, rows: list[Encoded], tokenizer: Any
) -> None:
    trainer = trainer_of(rows, packing=False, batch_size=1)
    trainer.data_collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)  # docs/facts.md, 3
    with pytest.raises(DataError) as caught:
        audit_labels(trainer, rows, tokenizer)
    assert "train row 1: EOS is not supervised at the end" in caught.value.problems
