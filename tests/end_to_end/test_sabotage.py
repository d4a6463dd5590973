"""Every gate, tested by sabotage: each case breaks one hand-off and expects the refusal of the gate in charge.

    .venv/bin/pytest -s tests/end_to_end/test_sabotage.py        prints the table: sabotage -> gate -> message

The tiny model goes once through the real stages with the real llama.cpp; each case spoils a copy of that. Ollama is the
fake server. A new hand-off gets a case here.
"""

import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.fakes import ollama as fake
from support.outputs.published import SYSTEM, make_stages
from support.outputs.sabotage import Report, printed_table
from support.processes.command import ROOT, TINY
from support.shared import copied, linked, shared

from tutor.artifacts.disk import remove, write_json
from tutor.artifacts.hashing import file_sha256
from tutor.artifacts.manifest import MANIFEST, read_manifest, require_stage
from tutor.engines.llamacpp.build import build_folder, is_built
from tutor.engines.trace import Penalty
from tutor.errors import ArtifactError, DataError, GateError, TutorError
from tutor.machine.device import DeviceMemory
from tutor.pipeline import registry, runner
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import OllamaSettings, Recipe
from tutor.serving import promote, publish
from tutor.stages.parity import collect, in_transformers

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.llamacpp,
    pytest.mark.skipif(not is_built(build_folder()), reason="the pinned llama.cpp is not built"),
]

BUDGETS = {"Q8_0": 0.0005, "Q4_K_M": 0.005}
"""Four to five times what the tiny model loses; the recipe's defaults are for real ones."""


@pytest.fixture(scope="module")
def report() -> Iterator[Report]:
    """Collect rows of the table, which is printed after the last case."""
    yield from printed_table()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The tiny recipe with budgets for a tiny model."""
    budgets = ", ".join(f"{kind} = {value}" for kind, value in BUDGETS.items())
    text = TINY.read_text("utf-8").replace("../../data", str(ROOT / "data"))
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(f"{text}\n[parity]\nbudgets = {{{budgets}}}\n", "utf-8")
    return read_recipe(path)


@pytest.fixture(scope="module")
def made(recipe: Recipe, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build that every gate has passed: the shared one, compared within the budgets of this recipe."""
    build = tmp_path_factory.mktemp("sabotage")
    linked(built / "tiny", build / "tiny")
    assert runner.run_all(recipe, build, until="modelfile") == ["parity"]
    return build


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to be spoiled: the recipe's folder in a build of its own."""
    return copied(made / "tiny", tmp_path / "build" / "tiny")


def replace_bytes(path: Path, old: bytes, new: bytes) -> None:
    """Change bytes in place: the file keeps its size, and a manifest that only looks at that is satisfied."""
    data = path.read_bytes()
    assert old in data
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))


def field(name: str, kind: int, value: bytes) -> bytes:
    """A GGUF field as it stands in the file."""
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def compared(recipe: Recipe, folder: Path, match: str) -> "pytest.ExceptionInfo[TutorError]":
    """Assert that the parity stage refuses a spoiled folder at every run and keeps its record; return the error."""
    remove(folder / "parity")
    with pytest.raises(GateError, match=match) as caught:
        runner.run_one("parity", recipe, folder.parent)
    with pytest.raises(GateError, match=match):
        runner.run_one("parity", recipe, folder.parent)
    recorded = json.loads((folder / "parity" / "parity.json").read_text("utf-8"))
    assert recorded["refused"]["message"] == caught.value.message
    return caught


def test_untouched_build_passes_every_gate(recipe: Recipe, folder: Path) -> None:
    remove(folder / "parity")
    assert runner.run_one("parity", recipe, folder.parent)
    states = {item["state"] for item in require_stage(folder / "parity", "parity").results["hand_offs"]}
    assert states == {"same"}


def test_model_beyond_the_memory_is_compared_layer_by_layer(
    recipe: Recipe, folder: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU with less free memory than one layer, on a machine with enough."""
    full = DeviceMemory(0, 1 << 34, "a GPU", gpu=True)
    monkeypatch.setattr(in_transformers, "loading_memory", lambda: full)
    remove(folder / "parity")
    assert runner.run_one("parity", recipe, folder.parent)
    results = require_stage(folder / "parity", "parity").results
    assert results["transformers"] == "CPU, layer by layer"
    assert {item["state"] for item in results["hand_offs"]} == {"same"}
    spoil_adapter(folder)
    caught = compared(recipe, folder, r"base \+ adapter -> merged \(merge\) diverges in its log-probabilities")
    report("adapter of another run, read layer by layer", "parity: merge", caught)
    monkeypatch.setattr(in_transformers, "main_memory", lambda: DeviceMemory(0, 1 << 34, "this machine", gpu=False))
    remove(folder / "parity")
    assert runner.run_one("parity", recipe, folder.parent)
    states = [item["state"] for item in require_stage(folder / "parity", "parity").results["hand_offs"]]
    assert states[:2] == ["not checked", "not checked"]
    with pytest.raises(GateError, match="not compared, so not proven") as stopped:
        publish.publish(recipe, folder.parent)
    report("hand-offs not compared, for lack of memory", "publish: proof", stopped)


# Training


def test_eos_masked_in_training_is_refused_by_the_label_audit(recipe: Recipe, made: Path, report: Report) -> None:
    """With pad = EOS, a collator that masks padding also masks EOS: the model would never stop."""
    from datasets import Dataset

    from tutor.formats.models.model_folder import load_tokenizer, read_facts
    from tutor.formats.rows.split_files import TRAIN, read_split
    from tutor.prompt.encoding import RowEncoder
    from tutor.stages.train.audit import audit_labels, encode_rows
    from tutor.stages.train.kernels.chunked_loss import IGNORE_INDEX

    tokenizer = load_tokenizer(read_facts(made / "tiny/base")[1])
    rows = encode_rows(RowEncoder(tokenizer), read_split(made / "tiny/data", TRAIN), 2048)

    def collate(items: list[dict[str, list[int]]]) -> dict[str, Any]:
        import torch

        (item,) = items
        masked = [IGNORE_INDEX if token == tokenizer.eos_token_id else token for token in item["labels"]]
        ids = torch.tensor([item["input_ids"]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([masked])}

    labels = [[i if on else IGNORE_INDEX for i, on in zip(row.ids, row.mask, strict=True)] for row in rows]
    data = [{"input_ids": row.ids, "labels": each} for row, each in zip(rows, labels, strict=True)]
    args = SimpleNamespace(per_device_train_batch_size=1)
    trainer: Any = SimpleNamespace(train_dataset=Dataset.from_list(data), data_collator=collate, args=args)
    with pytest.raises(DataError) as caught:
        audit_labels(trainer, rows, tokenizer)
    assert "EOS is not supervised at the end" in caught.value.problems[0]
    caught.value.message += f" ({caught.value.problems[0]})"
    report("EOS masked in training", "train: label audit", caught)


# Merging


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a tiny model of the same shape and another seed."""
    from support.models.tiny_models import make_tiny, spanish

    make_other = partial(make_tiny, text=spanish(), seed=99)
    return shared(tmp_path_factory, "other", make_other) / "model.safetensors"


def test_base_of_equal_shape_is_refused_by_merge(
    recipe: Recipe, folder: Path, other_weights: Path, report: Report
) -> None:
    shutil.copy(other_weights, folder / "base/model/model.safetensors")
    from dataclasses import asdict

    from tutor.stages.base.stage import facts_of

    facts = asdict(facts_of(folder / "base/model", "tiny", "model"))
    (folder / "base/base.json").write_text(json.dumps(facts), "utf-8")
    remove(folder / "merged")
    with pytest.raises(ArtifactError, match="was trained on other weights") as caught:
        registry.BY_NAME["merge"].module.run(recipe, inputs(folder), folder / "merged")
    report("another base of the same shape", "merge: base hash", caught)


def inputs(folder: Path) -> dict[str, Path]:
    return {stage.name: folder / stage.folder for stage in registry.STAGES}


def test_base_swapped_after_merging_is_refused_by_parity(
    recipe: Recipe, folder: Path, other_weights: Path, report: Report
) -> None:
    shutil.copy(other_weights, folder / "base/model/model.safetensors")
    caught = compared(recipe, folder, r"base \+ adapter -> merged \(merge\) diverges in its log-probabilities")
    assert "another run's adapter, a base of the same shape" in str(caught.value)
    report("base swapped after merging", "parity: merge", caught)


def test_merge_into_an_undeclared_base_precision_is_refused(recipe: Recipe, folder: Path, report: Report) -> None:
    """The gate compares the merge with the base that its manifest declares: the original or the NF4 round trip."""
    path = folder / "merged" / MANIFEST
    manifest = json.loads(path.read_text("utf-8"))
    manifest["results"]["base"] = {"nf4": "original", "original": "nf4"}[manifest["results"]["base"]]
    write_json(path, manifest)
    caught = compared(recipe, folder, r"base \+ adapter -> merged \(merge\) diverges in its log-probabilities")
    assert "the base in another precision" in str(caught.value)
    report("merged into another base precision than declared", "parity: merge", caught)


@pytest.mark.parametrize("base", ["original", "nf4"])
def test_merge_into_either_declared_base_passes(recipe: Recipe, folder: Path, base: Any) -> None:
    merge, convert = recipe.merge.model_copy(update={"base": base}), recipe.convert.model_copy(update={"base": False})
    other = recipe.model_copy(update={"merge": merge, "convert": convert})
    for name in ("merged", "gguf", "ladder", "parity"):
        remove(folder / name)
    for name in ("merge", "convert", "ladder", "parity"):
        assert runner.run_one(name, other, folder.parent)
    assert require_stage(folder / "merged", "merged").results["base"] == base


def spoil_adapter(folder: Path) -> None:
    """Change every layer of the adapter."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter/adapter_model.safetensors"
    tensors = {name: weight.roll(1, 0) if "lora_B" in name else weight for name, weight in load_file(path).items()}
    save_file({name: weight.contiguous() for name, weight in tensors.items()}, path, metadata={"format": "pt"})


def test_adapter_of_another_run_is_refused_by_parity(recipe: Recipe, folder: Path, report: Report) -> None:
    spoil_adapter(folder)
    caught = compared(recipe, folder, r"base \+ adapter -> merged \(merge\) diverges in its log-probabilities")
    report("adapter of another run", "parity: merge", caught)


def test_wrong_template_in_merged_folder_is_refused_by_parity(recipe: Recipe, folder: Path, report: Report) -> None:
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = folder / "merged" / name
        path.write_text(path.read_text("utf-8").replace("Respuesta:", "Respuesta;"), "utf-8")
    caught = compared(recipe, folder, r"base \+ adapter -> merged \(merge\) diverges in its prompt")
    report("wrong chat template in merged/, after converting", "parity: merge", caught)
    with pytest.raises(ArtifactError, match="chat_template: expected") as early:
        registry.BY_NAME["convert"].module.run(recipe, inputs(folder), folder)
    report("wrong chat template in merged/", "convert: GGUF read-back", early)


# Converting and quantizing

PRE = field("tokenizer.ggml.pre", 8, struct.pack("<Q", 9) + b"llama-bpe")


def test_gguf_with_another_pre_tokenizer_is_refused(recipe: Recipe, folder: Path, report: Report) -> None:
    replace_bytes(folder / "gguf/tutor-F16.gguf", PRE, PRE.replace(b"llama-bpe", b"starcoder"))
    caught = compared(recipe, folder, r"merged -> F16 \(convert\) diverges in its tokens")
    assert "tokenizer.ggml.pre" in str(caught.value)
    report("another pre-tokenizer in a GGUF", "parity: convert", caught)
    report("another pre-tokenizer in a GGUF", "convert: GGUF read-back", read_back(folder, "F16", "pre_tokenizer"))


def read_back(folder: Path, kind: str, what: str) -> "pytest.ExceptionInfo[TutorError]":
    """Assert that the convert stage's own check refuses a file with a message that matches `what`."""
    from tutor.formats.models.model_folder import read_facts
    from tutor.prompt.tutor_format import chat_template
    from tutor.stages.convert import stage as convert

    facts, _ = read_facts(folder / "base")
    says = convert.implied_metadata(folder / "merged", facts)
    expected = replace(says, chat_template=chat_template(add_bos=facts.add_bos), file_type=kind)
    with pytest.raises(ArtifactError, match=what) as caught:
        convert.check_gguf(folder / f"gguf/tutor-{kind}.gguf", expected)
    return caught


def test_gguf_that_adds_no_bos_is_refused(recipe: Recipe, folder: Path, report: Report) -> None:
    name = "tokenizer.ggml.add_bos_token"
    replace_bytes(folder / "gguf/tutor-Q8_0.gguf", field(name, 7, b"\x01"), field(name, 7, b"\x00"))
    caught = compared(recipe, folder, r"F16 -> Q8_0 \(quantize\) diverges in its tokens: .*a BOS\?")
    report("BOS no more added by a GGUF", "parity: quantize", caught)
    report("BOS no more added by a GGUF", "convert: GGUF read-back", read_back(folder, "Q8_0", "add_bos"))


def test_gguf_with_another_end_token_is_refused(folder: Path, report: Report) -> None:
    from tutor.formats.models.model_folder import read_facts

    name, eos = "tokenizer.ggml.eos_token_id", read_facts(folder / "base")[0].eos
    for number, path in ((eos, folder / "gguf/tutor-F16.gguf"),):
        replace_bytes(path, field(name, 4, struct.pack("<I", number)), field(name, 4, struct.pack("<I", 7)))
    report("another EOS in a GGUF", "convert: GGUF read-back", read_back(folder, "F16", "eos: expected"))


def test_wrong_template_in_one_gguf_is_refused_by_parity(recipe: Recipe, folder: Path, report: Report) -> None:
    path = folder / "gguf/tutor-Q4_K_M.gguf"
    replace_bytes(path, b"\\nRespuesta:", b"\\nRespuesta;")
    caught = compared(recipe, folder, r"F16 -> Q4_K_M \(quantize\) diverges in its prompt")
    report("wrong chat template in one GGUF", "parity: quantize", caught)


def test_damaged_f16_file_is_refused_by_parity(recipe: Recipe, folder: Path, report: Report) -> None:
    spoil_weights(folder / "gguf/tutor-F16.gguf")
    caught = compared(recipe, folder, r"merged -> F16 \(convert\) diverges in its log-probabilities")
    report("damaged F16 file", "parity: convert", caught)


@pytest.mark.parametrize(("what", "change"), [("another window", {"window": 8}), ("another factor", {"factor": 1.3})])
def test_llama_server_with_another_penalty_is_refused_by_parity(
    recipe: Recipe, folder: Path, report: Report, monkeypatch: pytest.MonkeyPatch, what: str, change: dict[str, Any]
) -> None:
    trace = collect.llamacpp_trace

    def other(server: Any, prompt: str, tokens: int, penalty: Penalty | None = None) -> Any:
        return trace(server, prompt, tokens, replace(penalty, **change) if penalty else None)

    monkeypatch.setattr(collect, "llamacpp_trace", other)
    caught = compared(recipe, folder, r"merged -> F16 \(convert\) diverges in its (log-probabilities|greedy answer)")
    report(f"{what} of the penalty in llama.cpp", "parity: convert", caught)


def spoil_weights(path: Path) -> None:
    """Overwrite some KB among a file's weights with bytes that are a small number in every format."""
    data = bytearray(path.read_bytes())
    middle = len(data) - len(data) // 4
    data[middle : middle + 4096] = bytes(4096)
    path.write_bytes(data)


def test_damaged_quantization_is_refused_by_parity(recipe: Recipe, folder: Path, report: Report) -> None:
    spoil_weights(folder / "gguf/tutor-Q8_0.gguf")
    caught = compared(recipe, folder, r"F16 -> Q8_0 \(quantize\) diverges in its log-probabilities: KL")
    report("damaged quantization", "parity: quantize", caught)


def test_quantization_coarser_than_its_name_is_refused(recipe: Recipe, folder: Path, report: Report) -> None:
    shutil.copy(folder / "gguf/tutor-Q4_K_M.gguf", folder / "gguf/tutor-Q8_0.gguf")
    early = read_back(folder, "Q8_0", "file_type: expected 'Q8_0', found 'Q4_K_M'")
    report("Q4_K_M under the name of Q8_0", "convert: GGUF read-back", early)
    with pytest.raises(ArtifactError, match="bytes instead of") as sized:
        runner.run_one("parity", recipe, folder.parent)
    report("Q4_K_M under the name of Q8_0", "manifest: size", sized)
    reseal(folder / "gguf")
    caught = compared(recipe, folder, r"F16 -> Q8_0 \(quantize\) diverges in its log-probabilities: KL")
    assert "coarser than its name says" in str(caught.value)
    report("Q4_K_M under the name of Q8_0, manifest forged", "parity: quantize", caught)


def reseal(folder: Path) -> None:
    """Write a stage's manifest again over the present files, as a careful forger would."""
    manifest = read_manifest(folder)
    assert manifest is not None
    for name, entry in manifest.outputs.items():
        entry.update(size=(folder / name).stat().st_size, sha256=file_sha256(folder / name))
    write_json(folder / MANIFEST, vars(manifest))


def test_gguf_of_the_untuned_base_is_refused_by_parity(recipe: Recipe, folder: Path, report: Report) -> None:
    shutil.copy(folder / "gguf/base-Q8_0.gguf", folder / "gguf/tutor-Q8_0.gguf")
    reseal(folder / "gguf")
    caught = compared(recipe, folder, r"F16 -> Q8_0 \(quantize\) diverges in its prompt")
    report("the untuned base's GGUF", "parity: quantize", caught)


@pytest.mark.parametrize("share", [0.99, 0.5])
def test_truncated_quantization_is_refused_by_its_size(
    recipe: Recipe, folder: Path, report: Report, share: float
) -> None:
    path = folder / "gguf/tutor-Q8_0.gguf"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ArtifactError, match="bytes instead of") as caught:
        runner.run_one("parity", recipe, folder.parent)
    report(f"quantization cut at {share:.0%}", "manifest: size", caught)
    report(f"quantization cut at {share:.0%}", "convert: GGUF read-back", read_back(folder, "Q8_0", "no whole GGUF"))


# Publishing


@pytest.fixture
def server() -> Iterator[fake.FakeOllama]:
    with fake.running() as running:
        yield running


@pytest.fixture
def tutor_recipe(tmp_path: Path) -> Recipe:
    return Recipe(system=SYSTEM, ollama=OllamaSettings(quantization="Q8_0"), path=tmp_path / "small.toml")


@pytest.fixture
def build(tutor_recipe: Recipe, tmp_path: Path) -> Path:
    """Stage folders around a file that the fake server accepts as a GGUF."""
    make_stages(tutor_recipe, tmp_path / "published")
    return tmp_path / "published"


def refused(server: fake.FakeOllama, recipe: Recipe, build: Path, kind: type[TutorError], match: str) -> Any:
    """Assert that publishing fails and leaves no name on the server; return the error."""
    with pytest.raises(kind, match=match) as caught:
        promote.publish_and_promote(recipe, build, host=server.host)
    assert server.models == {}
    return caught


def test_gguf_with_one_changed_byte_is_not_published(
    server: fake.FakeOllama, tutor_recipe: Recipe, build: Path, report: Report
) -> None:
    path = build / "small/gguf/tutor-Q8_0.gguf"
    replace_bytes(path, b"xx", b"xy")
    caught = refused(server, tutor_recipe, build, ArtifactError, "changed since it was made")
    report("one byte of the GGUF, before publishing", "publish: hash", caught)


def test_gguf_with_the_base_template_is_not_published(
    server: fake.FakeOllama, tutor_recipe: Recipe, build: Path, report: Report
) -> None:
    make_stages(tutor_recipe, build, chat_template="{% for m in messages %}<think></think>{% endfor %}")
    caught = refused(server, tutor_recipe, build, GateError, "template is .*<think>")
    report("R1's own template left in the GGUF", "publish: /api/show", caught)


def test_modelfile_with_another_template_is_not_published(
    server: fake.FakeOllama, tutor_recipe: Recipe, build: Path, report: Report
) -> None:
    path = build / "small/model/create.json"
    body = json.loads(path.read_text("utf-8"))
    body["template"] = body["template"].replace("Respuesta:", "Respuesta: ")
    path.write_text(json.dumps(body), "utf-8")
    reseal(build / "small/model")
    caught = refused(server, tutor_recipe, build, GateError, "gets another prompt than in training")
    report("another TEMPLATE in the Modelfile", "publish: rendered prompts", caught)


def test_ollama_that_adds_a_second_bos_is_refused(
    server: fake.FakeOllama, tutor_recipe: Recipe, build: Path, report: Report
) -> None:
    server.counts = lambda prompt: 1 + len(prompt.split())
    caught = refused(server, tutor_recipe, build, GateError, r"Q8_0 -> Ollama \(publish\) diverges in its tokens")
    report("a second BOS in Ollama", "parity: publish", caught)


def test_ollama_with_other_weights_is_refused(
    server: fake.FakeOllama, tutor_recipe: Recipe, build: Path, report: Report
) -> None:
    server.reply_to = lambda _: [(piece, -1.4) for piece in server.pieces]
    caught = refused(server, tutor_recipe, build, GateError, r"diverges in its log-probabilities")
    report("other weights in Ollama", "parity: publish", caught)


@pytest.mark.parametrize(
    ("what", "change"), [("another window", {"repeat_last_n": 64}), ("another factor", {"repeat_penalty": 1.0})]
)
def test_modelfile_with_another_penalty_is_refused(
    server: fake.FakeOllama,
    tutor_recipe: Recipe,
    build: Path,
    report: Report,
    what: str,
    change: dict[str, Any],
) -> None:
    """The fake answers the penalised conversation otherwise where the sampler is another one than the recipe's."""
    path = build / "small/model/create.json"
    body = json.loads(path.read_text("utf-8"))
    served = {name: body["parameters"][name] for name in change}
    body["parameters"] |= change
    path.write_text(json.dumps(body), "utf-8")
    reseal(build / "small/model")
    server.reply_by_options = lambda options: [
        (piece if options.items() >= served.items() or "repeat_penalty" in options["asked"] else f"{piece}!", -0.1)
        for piece in server.pieces
    ]
    caught = refused(server, tutor_recipe, build, GateError, "diverges in its greedy answer: «repetition penalty»")
    report(f"{what} of the penalty in the Modelfile", "parity: publish", caught)


@pytest.mark.parametrize("known", [True, False], ids=["by its digest", "by its answers"])
def test_model_replaced_after_publishing_is_refused(
    server: fake.FakeOllama, tutor_recipe: Recipe, build: Path, report: Report, *, known: bool
) -> None:
    promote.publish_and_promote(tutor_recipe, build, host=server.host)
    theirs = server.models["tutor:latest"]
    server.models["tutor:latest"] = fake.Model({**theirs.body, "license": "x"}, theirs.facts, theirs.blob)
    server.reply_to = lambda _: [(" Otra", -0.1), (" cosa", -0.2)]
    if not known:
        (build / "small/model/published.json").unlink()
    refusal = publish.compare_published(tutor_recipe, build, host=server.host)["refused"]
    assert refusal["message"].startswith("Q8_0 -> Ollama (publish) diverges in its " + ("model" if known else "greedy"))
    with pytest.raises(GateError) as caught:
        raise GateError(refusal["message"], refusal["hint"])
    report("model replaced in Ollama after publishing", "tutor parity --host", caught)
