"""The train stage on the tiny Llama: what it refuses, that gradients are right, that it learns and repeats itself."""

import json
import logging
import math
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.shared import copied
from support.tiny_models import adapter_stage, base_stage, recipe, tensors
from support.tolerances import backward_error, forward_error, largest_logit, roundoff

torch = pytest.importorskip("torch")
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from support.training import ROWS, SOURCE, FirstGradient, apart, moved, settings
from transformers import DataCollatorForLanguageModeling

from tutor.artifacts.stage_folder import log_folder
from tutor.engines.hf.loading import load_base
from tutor.engines.hf.score import answer_logprobs
from tutor.errors import ArtifactError, DataError
from tutor.machine.capacity import plan_training
from tutor.machine.memory.batching import split_step
from tutor.prompt import Encoded, audit, completion, conversation, render
from tutor.stages.train import held_out_loss as scoring
from tutor.stages.train import loop as fit
from tutor.stages.train import stage as train
from tutor.stages.train.audit import audit_labels, encode_rows, label_ids
from tutor.stages.train.kernels.packed_attention import LENGTHS, split_rows
from tutor.stages.train.trainer import count_parameters, lora_config, make_trainer, training_arguments

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]


@pytest.fixture
def trainer_of(tiny: Path, tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """The trainer that the stage makes, of any rows and with any settings."""

    def make(rows: Sequence[Encoded], quantization: str = "none", precision: str = "fp32", **changes: Any) -> Any:
        chosen = settings(**changes)
        torch.manual_seed(1)
        passes = split_step(chosen, [len(row.ids) for row in rows])
        arguments = training_arguments(chosen, precision, 1, tmp_path / "checkpoints", passes)
        model = load_base(tiny, quantization, precision)
        return make_trainer(model, tokenizer, rows, lora_config(chosen), arguments)

    return make


def gradients(model: Any, rows: Sequence[Encoded]) -> dict[str, Any]:
    """Of the mean loss over all supervised tokens of all rows, without a library's help."""
    model.zero_grad()
    total = sum(sum(row.mask) for row in rows)
    for row in rows:
        ids = torch.tensor([row.ids])
        logits = model(input_ids=ids).logits[0, row.n_prompt - 1 : -1].float()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, row.n_prompt :], reduction="sum")
        (losses / total).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


# --- the rows --------------------------------------------------------------------------------------------------------


def test_too_long_rows_are_refused_by_name_and_not_cut(tokenizer: Any, rows: list[Encoded]) -> None:
    longest = max(range(len(rows)), key=lambda number: len(rows[number].ids))
    limit = len(rows[longest].ids)
    assert encode_rows(tokenizer, ROWS, "", limit) == rows
    with pytest.raises(DataError, match=rf"1 of 12 rows are longer than train.max_length \({limit - 1} tokens") as one:
        encode_rows(tokenizer, ROWS, "", limit - 1)
    assert one.value.problems == (f"{limit} tokens: {ROWS[longest]['instruction']!r}",)
    assert one.value.code == 3
    with pytest.raises(DataError, match="30 of 30 rows") as many:
        encode_rows(tokenizer, [{**ROWS[0], "instruction": "ñ" * 200}] * 30, "", 16)
    assert len(many.value.problems) == 20
    assert all("ñ" * 61 not in problem for problem in many.value.problems)


def test_encoded_row_is_served_prompt_answer_and_eos(tokenizer: Any, rows: list[Encoded]) -> None:
    for row, source in zip(rows, ROWS, strict=True):
        assert row.ids[: row.n_prompt] == tokenizer(render(conversation(source["instruction"])))["input_ids"]
        answer = tokenizer(completion(source["response"]), add_special_tokens=False)["input_ids"]
        assert row.ids[row.n_prompt :] == [*answer, tokenizer.eos_token_id]
        assert audit(row, row.ids[: row.n_prompt], tokenizer) == []


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
    assert ends == 12  # pad is the same id, and carries no loss


def without(row: Encoded, n: int) -> Encoded:
    return Encoded(row.ids, [*row.mask[:-n], *[0] * n])


@pytest.mark.parametrize(
    ("sabotage", "said"),
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
    sabotage: Any, said: str, trainer_of: Any, rows: list[Encoded], tokenizer: Any
) -> None:
    trainer = trainer_of([*rows[:3], sabotage(rows[3], tokenizer)])
    with pytest.raises(DataError) as caught:
        audit_labels(trainer, rows[:4], tokenizer)
    assert caught.value.code == 3
    assert f"train row 4: {said}" in caught.value.problems
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
    plain = settings(packing=False)  # TRL packs nothing that it also cuts
    arguments = training_arguments(plain, "fp32", 1, tmp_path, split_step(plain, [len(row.ids) for row in rows]))
    arguments.max_length = len(rows[0].ids) - 1  # what TRL's own default of 1024 does to long rows
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


# --- the gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "precision"), [("nf4", "bf16"), ("nf4", "fp32"), ("int8", "bf16"), ("none", "bf16")]
)
def test_only_adapters_are_trainable_and_they_are_fp32(
    quantization: str, precision: str, trainer_of: Any, rows: list[Encoded]
) -> None:
    model = trainer_of(rows, quantization, precision).model
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 4 * 2
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert all(".lora_" in name for name in trained)
    layers = [module for name, module in model.named_modules() if name.endswith("_proj.base_layer")]
    kinds = {"nf4": Linear4bit, "int8": Linear8bitLt, "none": torch.nn.Linear}
    assert {type(layer) for layer in layers} == {kinds[quantization]}
    if quantization == "nf4":
        states = [layer.weight.quant_state for layer in layers]
        assert {(state.quant_type, state.nested) for state in states} == {("nf4", True)}


def test_count_parameters_unpacks_4_bit_weights(trainer_of: Any, rows: list[Encoded], tiny: Path) -> None:
    plain = sum(weight.numel() for weight in tensors(tiny).values())
    adapter = 8 * 2 * (64 + 64 + 64 + 32 + 64 + 32 + 64 + 64)
    for quantization in ("nf4", "int8", "none"):
        assert count_parameters(trainer_of(rows, quantization).model) == (adapter, plain + adapter)


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
    first = scoring.mean_loss(model, rows)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert scoring.mean_loss(model, rows) == first
    scoring.refuse_inference_layout(model)
    after = gradients(model, rows[:4])
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_scoring_has_no_dropout_and_restores_mode_after_error(trainer_of: Any, rows: list[Encoded]) -> None:
    model = moved(trainer_of(rows, "nf4", dropout=0.5).model)
    assert scoring.mean_loss(model, rows) == scoring.mean_loss(model, rows)

    def leave() -> None:
        with scoring.evaluating(model):
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
    found, loss = gradients(model, rows[:4]), scoring.mean_loss(model, rows)
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
    assert scoring.mean_loss(model, rows) == pytest.approx(loss, abs=bound)


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes packs for inference on CPUs with AVX512-BF16 only")
def test_layer_packed_by_eval_mode_is_refused(trainer_of: Any, rows: list[Encoded]) -> None:
    model = moved(trainer_of(rows, "nf4", dropout=0.0).model)
    right = gradients(model, rows[:4])
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([rows[0].ids]))
    model.train()
    with pytest.raises(ArtifactError, match=r"layers\.0\.self_attn\.q_proj is packed for inference") as caught:
        scoring.refuse_inference_layout(model)
    assert caught.value.code == 5
    assert apart(gradients(model, rows[:4]), right) > 0.01  # and this is why


@pytest.mark.slow
def test_accumulated_gradient_equals_that_of_one_batch(trainer_of: Any, tokenizer: Any, rows: list[Encoded]) -> None:
    long = {"instruction": "¿Y todo junto?", "response": " ".join(row["response"] for row in ROWS[:6])}
    mixed = [*rows[:3], *encode_rows(tokenizer, [long], "", 1024)]
    first = []
    for batch, accumulation, packing in ((1, 4, False), (4, 1, False), (1, 4, True)):
        trainer = trainer_of(mixed, batch_size=batch, accumulation=accumulation, packing=packing, dropout=0.0)
        trainer.args.max_grad_norm = 0.0  # as they are, not clipped
        torch.manual_seed(2)
        moved(trainer.model)
        wanted = gradients(trainer.model, mixed)
        trainer.model.zero_grad()
        callback = FirstGradient()
        trainer.add_callback(callback)
        trainer.train()
        bound = backward_error(trainer.model.get_base_model().config, sum(len(row.ids) for row in mixed))
        assert apart(callback.gradients, wanted) < bound
        first.append(callback.gradients)
    assert max(apart(other, first[0]) for other in first[1:]) < bound


# --- the scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mean_loss_weights_supervised_tokens_equally(precision: str, trainer_of: Any, rows: list[Encoded]) -> None:
    model = trainer_of(rows, "none", precision).model
    ids = [torch.tensor([row.ids]) for row in rows]
    with torch.no_grad(), scoring.evaluating(model):
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
    if precision == "bf16":  # the logits of the two passes are rounded once more, each to its own side
        error += 2 * roundoff(torch.bfloat16)
    bound = error * largest_logit(model, pairs)
    assert scoring.mean_loss(model, rows) == pytest.approx(torch.cat(losses).mean().item(), abs=bound)
    with scoring.evaluating(model):
        scores = answer_logprobs(model, pairs)
    assert [len(values) for values in scores] == [sum(row.mask) for row in rows]
    each = [value for values in scores for value in values]
    assert scoring.mean_loss(model, rows) == -math.fsum(each) / len(each)  # every token alike, whatever the rounding


def test_mean_loss_of_nan_raises_error(trainer_of: Any, rows: list[Encoded]) -> None:
    model = moved(trainer_of(rows).model)
    with torch.no_grad():
        next(weight for weight in model.parameters() if weight.requires_grad).fill_(math.nan)
    with pytest.raises(ArtifactError, match="held-out loss is nan") as caught:
        scoring.mean_loss(model, rows)
    assert caught.value.code == 5


# --- the base it loads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "quantization"),
    [
        ("cut", "none"),
        ("cut", "nf4"),
        ("a tensor missing", "none"),
        ("a tensor missing", "nf4"),
        ("a tensor of another shape", "none"),
    ],
)
def test_base_with_missing_tensors_raises_error(damage: str, quantization: str, tiny: Path, tmp_path: Path) -> None:
    model = copied(tiny, tmp_path / "model")
    path, name = model / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    held = load_file(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
        name = "cannot load"
    else:
        weight = held.pop(name)
        if damage == "a tensor of another shape":
            held[name] = weight[:100].clone()
        save_file(held, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=name):
        load_base(model, quantization, "fp32")


def test_save_adapter_opens_no_network_connection(
    trainer_of: Any, rows: list[Encoded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = trainer_of(rows).model, []

    def nobody(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    monkeypatch.setattr(socket.socket, "connect", nobody)
    fit.save_adapter(model, "tiny", tmp_path / "adapter")
    assert asked == []


# --- the whole stage -------------------------------------------------------------------------------------------------

LONG = {"epochs": 3, "batch_size": 2, "accumulation": 1, "save_steps": 5}


def run(inputs: dict[str, Path], out: Path, **changes: Any) -> dict[str, Any]:
    out.mkdir()
    wanted = recipe(Path("r.toml"), train=settings(**{**LONG, **changes}).model_dump())
    return train.run(wanted, inputs, out, plan_training(wanted, inputs))


@pytest.fixture(scope="module")
def trained(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An adapter of twelve rows, three epochs, and what the stage says of it."""
    out = tmp_path_factory.mktemp("trained") / "adapter"
    return out, run(inputs, out)


Trained = tuple[Path, dict[str, Any]]


@pytest.mark.pipeline
def test_training_lowers_the_held_out_loss(trained: Trained) -> None:
    _, results = trained
    held_out = results["held_out"]
    assert (results["rows"], results["steps"], held_out["rows"]) == (12, 18, 2)
    assert held_out["loss_after"] < 0.8 * held_out["loss_before"]
    assert held_out["perplexity_after"] == pytest.approx(math.exp(held_out["loss_after"]))
    assert results["quantization"] == "nf4"
    json.dumps(results, allow_nan=False)


@pytest.mark.pipeline
def test_metrics_have_one_line_per_step(trained: Trained) -> None:
    lines = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 19))
    assert all(isinstance(line[name], float) for line in lines for name in ("loss", "learning_rate", "grad_norm"))
    assert max(line["learning_rate"] for line in lines) == pytest.approx(5e-3)
    assert lines[-1]["epoch"] == 3.0
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.pipeline
def test_evaluations_keep_the_best_adapter(trained: Trained) -> None:
    out, results = trained
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scored = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert list(scored) == [3, 6, 9, 12, 15, 18]
    assert results["kept_step"] == min(scored, key=scored.__getitem__)
    # Its file rounds A and B to FP16, and the pass over them rounds otherwise in the type that it computes in.
    rounding = 2 * roundoff(torch.float16) + (2 * roundoff(torch.bfloat16) if results["precision"] == "bf16" else 0)
    assert results["held_out"]["loss_after"] == pytest.approx(min(scored.values()), rel=rounding)
    timed = [json.loads(line) for line in (log_folder(out) / "metrics.jsonl").read_text().splitlines()]
    assert [{name: line[name] for name in lines[0]} for line in timed] == [
        {name: line[name] for name in lines[0]} for line in lines
    ]
    assert all(line["samples_per_second"] > 0 for line in timed)


@pytest.mark.pipeline
@pytest.mark.parametrize(
    ("wanted", "quantization", "checkpointing"),
    [
        ({"quantization": "int8"}, "int8", False),
        ({"quantization": "auto", "precision": "bf16"}, "none", False),
        ({"gradient_checkpointing": True}, "nf4", True),
    ],
    ids=["int8", "auto", "checkpointing"],
)
def test_each_quantization_and_precision_lowers_the_loss(
    wanted: dict[str, Any], quantization: str, checkpointing: Any, inputs: dict[str, Path], tmp_path: Path
) -> None:
    results = run(inputs, tmp_path / "out", **wanted)
    assert (results["quantization"], results["gradient_checkpointing"]) == (quantization, checkpointing)
    assert results["held_out"]["loss_after"] < 0.8 * results["held_out"]["loss_before"]


@pytest.mark.pipeline
def test_gradient_checkpointing_does_not_change_the_adapter(
    trained: Trained, inputs: dict[str, Path], tmp_path: Path
) -> None:
    results = run(inputs, tmp_path / "out", gradient_checkpointing=True)
    assert results["held_out"] == trained[1]["held_out"]


@pytest.mark.pipeline
def test_patience_stops_early_and_logs_the_step(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An evaluation every three of 48 steps; the held-out losses on the way are given, the last one is measured."""
    given, measured = iter([3.0, 2.0, 2.5, 2.1]), []

    def mean_loss(model: Any, rows: Sequence[Encoded]) -> float:
        if (loss := next(given, None)) is None:
            measured.append(loss := scoring.mean_loss(model, rows))
        return loss

    monkeypatch.setattr(fit, "mean_loss", mean_loss)
    with caplog.at_level(logging.INFO, "tutor"):
        results = run(inputs, tmp_path / "out", epochs=8, patience=2)
    assert (results["steps"], results["kept_step"]) == (12, 6)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    scored = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert scored == {3: 3.0, 6: 2.0, 9: 2.5, 12: 2.1}
    assert [results["held_out"]["loss_after"]] == measured
    assert "no better held-out loss in 2 evaluations: training ends" in caplog.text
    assert "the adapter of step 6 is kept" in caplog.text


@pytest.mark.pipeline
def test_adapter_config_names_source_and_no_local_path(trained: Trained, tiny: Path) -> None:
    out, results = trained
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], results["base_source"]) == (SOURCE, SOURCE)
    assert config["target_modules"] == sorted(config["target_modules"])  # a set's order changes from run to run
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "training.svg",
    }  # fmt: skip
    for path in out.iterdir():
        assert str(tiny.parent).encode() not in path.read_bytes()
    assert {str(tensor.dtype) for tensor in tensors(out).values()} == {"torch.float16"}
    assert results["adapter_bytes"] == (out / "adapter_model.safetensors").stat().st_size < 2 * 7168 + 4096


@pytest.mark.pipeline
def test_equal_recipes_make_equal_adapter_bytes(trained: Trained, inputs: dict[str, Path], tmp_path: Path) -> None:
    again = run(inputs, tmp_path / "again")
    for path in trained[0].iterdir():  # all that the next stage's key looks at
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert again["held_out"] == trained[1]["held_out"]


@pytest.mark.pipeline
def test_base_with_nan_loss_fails_before_training(tiny: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    model = copied(tiny, tmp_path / "model")
    held = load_file(model / "model.safetensors")
    held["lm_head.weight"][:] = math.inf
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="held-out loss is nan"):
        run({**inputs, "base": base_stage(model, tmp_path / "base")}, tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.pipeline
def test_support_adapter_has_the_form_of_a_trained_one(trained: Trained, tiny: Path, tmp_path: Path) -> None:
    # test_merge.py leans on it.
    made = adapter_stage(tiny, tmp_path / "adapter", "")
    assert tensors(made).keys() == tensors(trained[0]).keys()
