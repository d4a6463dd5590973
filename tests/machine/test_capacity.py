"""Whether a recipe fits a machine. The plan of its training: test_capacity_plan.py."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.files import write_rows
from support.models.workloads import LARGE

from tutor.errors import HostError, RecipeError
from tutor.machine import capacity, host, run_cost
from tutor.machine.device import DeviceMemory, PrecisionChoice
from tutor.machine.matmul_rate import MatmulRates
from tutor.machine.memory.plan import MemoryRequest
from tutor.machine.memory.shapes import SHAPES
from tutor.pipeline import runner

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}

GIB = 1 << 30
ANY = MemoryRequest("nf4", "auto", "bf16", tokens=1024, rank=8, targets=("q_proj",))


def model_folder(path: Path, **changes: Any) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return path


def test_shape_of_default_base_is_known_before_download(machine, based_on, tmp_path):
    assert capacity.find_shape(based_on(), tmp_path) == LARGE


def test_shape_of_the_tiny_model_is_known(machine, based_on, tmp_path):
    assert capacity.find_shape(based_on("tiny"), tmp_path) == SHAPES["tiny"]


def test_unknown_hub_base_has_no_shape_and_refuses_nothing(machine, based_on, tmp_path, caplog):
    recipe = based_on("hub:owner/name@" + "0" * 40)
    assert capacity.find_shape(recipe, tmp_path) is None
    with caplog.at_level("INFO"):
        capacity.refuse_stages(recipe, tmp_path, ["base", "train"])
    assert "not known before it is fetched" in caplog.text


def test_old_driver_is_refused_before_a_base_is_fetched(machine, based_on, tmp_path):
    machine.gpu()
    heading = machine.folder / "heading"
    heading.write_text(heading.read_text().replace("13.0", "12.8"))
    recipe = based_on("hub:owner/name@" + "0" * 40)
    capacity.refuse_stages(recipe, tmp_path, ["convert"])
    with pytest.raises(HostError, match=r"runs CUDA up to 12\.8"):
        capacity.refuse_stages(recipe, tmp_path, ["base", "train"])


def test_run_sees_one_gpu_before_its_first_stage(machine, based_on, tmp_path, monkeypatch):
    """CUDA reads the variable once, when it starts."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    machine.gpu()
    machine.gpu()
    monkeypatch.setattr(capacity, "refuse_stages", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.run_all(based_on("tiny"), tmp_path / "build")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-0aaaa-0"


def test_shape_is_read_from_the_nearest_copy_of_the_base(machine, based_on, recipe_file, tmp_path):
    """From the hub's cache, a folder, or the base stage's output, whichever the recipe names."""
    revision = "0" * 40
    source = f"hub:owner/name@{revision}"
    cached = model_folder(tmp_path / "hub/hub/models--owner--name/snapshots" / revision, num_hidden_layers=3)
    recipe = based_on(source)
    assert capacity.find_shape(recipe, tmp_path).layers == 3
    made = model_folder(tmp_path / "small/base/model", num_hidden_layers=4)
    (made.parent / "base.json").write_text(json.dumps({"source": source, "model": "model"}))
    assert capacity.find_shape(recipe, tmp_path).layers == 4
    (made.parent / "base.json").write_text(json.dumps({"source": "tiny", "model": "model"}))
    assert capacity.find_shape(recipe, tmp_path).layers == 3  # of another recipe's base
    (cached / "config.json").write_text("{")
    assert capacity.find_shape(recipe, tmp_path) is None
    local = model_folder(recipe_file.parent / "local", num_hidden_layers=5)
    path = recipe.model_copy(update={"base": recipe.base.model_copy(update={"source": "path:local"})})
    assert capacity.find_shape(path, tmp_path).layers == 5
    (local / "config.json").write_text('{"hidden_size": "wide"}')
    assert capacity.find_shape(path, tmp_path) is None


def test_shape_of_a_packages_gguf_is_read(machine, based_on, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    package = tmp_path / "site" / "some_model"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    writer = gguf.GGUFWriter(package / "model.gguf", "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for name, rows in (("token_embd.weight", 40), ("blk.0.attn_q.weight", 64)):
        writer.add_tensor(name, numpy.zeros((rows, 64), dtype=numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.syspath_prepend(tmp_path / "site")
    found = capacity.find_shape(based_on("package:some_model/model.gguf"), tmp_path)
    assert (found.hidden, found.layers, found.intermediate, found.kv_heads, found.head_dim) == (64, 2, 96, 2, 16)
    assert (found.vocabulary, found.tied) == (40, True)


def test_training_that_fits_is_not_refused(machine, roomy, based_on, tmp_path):
    machine.gpu(24)
    capacity.refuse_stages(based_on(), tmp_path, ["base", "train", "merge", "convert"])


def test_training_beyond_the_gpu_names_parts_and_a_setting(machine, roomy, based_on, tmp_path):
    machine.gpu(8, name="NVIDIA RTX 4060")
    with pytest.raises(HostError) as caught:
        capacity.refuse_stages(based_on(quantization="none"), tmp_path, ["base", "train"])
    assert caught.value.code == 4
    assert "(weights 16.1, " in caught.value.message
    assert caught.value.message.endswith("; NVIDIA RTX 4060 has 8.0 GB")
    assert caught.value.hint == 'set train.quantization = "nf4"'
    assert "\n" not in str(caught.value)


def test_training_that_no_setting_fits_names_smaller_base(machine, roomy, based_on, tmp_path):
    machine.gpu(2)
    with pytest.raises(HostError, match="no setting makes it fit: take a smaller base"):
        capacity.refuse_stages(based_on(), tmp_path, ["train"])


def test_training_over_by_assumptions_only_is_a_warning(machine, roomy, based_on, tmp_path, caplog):
    """The tensors of an 8B and short rows take about 6 GB; the parts of CUDA and the allocator are assumptions."""
    machine.gpu(6.4)
    with caplog.at_level("WARNING"):
        capacity.refuse_stages(based_on(max_length=128), tmp_path, ["train"])
    assert "a card has 6.4 GB: it may not fit; if it does not, " in caplog.text


def test_warning_without_helping_setting_names_smaller_base(machine, roomy, based_on, tmp_path, caplog):
    """The CUDA context alone is larger than this GPU's memory, and no setting of the recipe reduces it."""
    machine.gpu(0.4)
    with caplog.at_level("WARNING"):
        capacity.refuse_stages(based_on("tiny", quantization="nf4", gradient_checkpointing=True), tmp_path, ["train"])
    assert "if it does not, no setting makes it fit: take a smaller base" in caplog.text


def test_gpu_memory_held_by_others_names_the_programs(machine, roomy, based_on, tmp_path):
    machine.gpu(24, 2)
    (machine.folder / "apps").write_text("4242, /usr/bin/python3, 20480\n7, [Not Found], [N/A]\n")
    with pytest.raises(HostError, match=r"of a card 2\.0 GB are free, the rest is held by 4242 python3 \(21\.5 GB\)"):
        capacity.refuse_stages(based_on(), tmp_path, ["train"])


def test_stages_without_training_need_no_gpu_memory(machine, roomy, based_on, tmp_path):
    machine.gpu(2)
    capacity.refuse_stages(based_on(), tmp_path, ["merge", "convert"])


@pytest.mark.parametrize(
    ("capability", "settings", "expected_text"),
    [
        ("6.1", {}, "compute capability 6.1; the pinned CUDA needs 7.5"),
        ("7.5", {"precision": "bf16"}, "no native bf16; set train.precision to auto"),
        (None, {"precision": "fp16"}, "fp16 needs a GPU"),
    ],
)
@pytest.mark.usefixtures("roomy")
def test_unsupported_precision_or_gpu_is_refused_early(
    machine, based_on, tmp_path, capability, settings, expected_text
):
    if capability:
        machine.gpu(capability=capability)
    with pytest.raises(HostError, match=expected_text):
        capacity.refuse_stages(based_on(**settings), tmp_path, ["train"])


def test_main_memory_in_use_warns_and_too_little_refuses(caplog):
    training = SimpleNamespace(gpu=False)
    machine = DeviceMemory(4 * GIB, 16 * GIB, "this machine", gpu=False)
    short = capacity.MemoryForecast(training, ANY, {"weights": 8 * GIB}, machine, {})
    with caplog.at_level("WARNING"):
        capacity.refuse_memory(short)
    assert "the rest is held by other programs" in caplog.text
    container = DeviceMemory(4 * GIB, 4 * GIB, "this container", gpu=False)
    beyond = capacity.MemoryForecast(training, ANY, {"weights": 8 * GIB}, container, {"max_length": 256})
    with pytest.raises(HostError, match=r"this container has 4.3 GB; set train.max_length = 256"):
        capacity.refuse_memory(beyond)


def test_long_training_on_a_cpu_is_a_warning(machine, roomy, based_on, recipe_file, tmp_path, caplog):
    rows = [{"instruction": f"¿{number}?", "response": "a" * 1000} for number in range(3000)]
    write_rows(recipe_file.with_name("tutor.jsonl"), rows)
    recipe = based_on()
    with caplog.at_level("WARNING"):
        capacity.refuse_training(recipe, tmp_path, SHAPES["tiny"], None)
        assert caplog.text == ""
        if host.memory().total > 20e9:
            capacity.refuse_training(recipe, tmp_path, LARGE, None)
            assert "training on this CPU takes about" in caplog.text


def test_forecast_of_a_training_follows_the_measured_rate(machine, based_on, tmp_path, monkeypatch):
    rows = [{"instruction": f"¿{number}?", "response": "a" * 1000} for number in range(300)]
    recipe = based_on("tiny")
    write_rows(recipe.path.with_name("tutor.jsonl"), rows)
    found = []
    for rates in (MatmulRates(1e8, 2e8), MatmulRates(1e8, 4e8), MatmulRates(4e8, 1e8, measured=False)):
        monkeypatch.setattr(capacity, "find_rates", lambda *_, rates=rates: rates)
        found.append(capacity.forecast_run(recipe, tmp_path, SHAPES["tiny"], None))
    slow, fast, guessed = (forecast["seconds"]["train"] - run_cost.STARTUP_SECONDS for forecast in found)
    assert slow == pytest.approx(2 * fast, rel=0.02)
    assert guessed == pytest.approx(fast)
    assert [forecast["precision"]["precision"] for forecast in found] == ["fp32", "fp32", "bf16"]
    assert [forecast["precision"]["measured"] for forecast in found] == [True, True, False]
    assert found[0]["precision"]["matmul_gflops"] == {"bf16": 0.1, "fp32": 0.2}


def test_forecast_on_a_gpu_measures_no_cpu(machine, based_on, tmp_path, monkeypatch):
    machine.gpu(24, name="NVIDIA A100")
    monkeypatch.setattr(capacity, "find_rates", None)
    forecast = capacity.forecast_run(based_on(), tmp_path, LARGE, host.gpus()[0])
    assert forecast["precision"] == {
        "precision": "bf16",
        "precision_reason": "GPU",
        "matmul_gflops": None,
        "measured": None,
    }


@pytest.mark.parametrize(
    ("total", "precision", "reason"), [(64, "fp32", "rates"), (24, "bf16", "memory"), (8, "fp32", "rates")]
)
def test_bf16_is_taken_where_fp32_does_not_fit(based_on, total, precision, reason):
    """The 8B in 16 bits takes about 18 GB, in fp32 twice as much."""
    memory = DeviceMemory(total * GIB, total * GIB, "this machine", gpu=False)
    settings = based_on(quantization="none", max_length=64).train
    choice = PrecisionChoice("fp32", "rates", MatmulRates(1e11, 2e11))
    found = capacity.fit_precision(choice, LARGE, settings, None, memory)
    assert (found.precision, found.reason) == (precision, reason)
    of_the_recipe = PrecisionChoice("fp32", "setting")
    assert capacity.fit_precision(of_the_recipe, LARGE, settings, None, memory) == of_the_recipe


def test_full_disk_is_refused_with_the_stages_sizes(machine, based_on, tmp_path, monkeypatch):
    free = SimpleNamespace(free=50 * 10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    stages = ["base", "train", "merge", "convert"]
    with pytest.raises(
        HostError, match=r"will write 58\.3 GB \(hub 16\.1, merge 16\.1, convert 26\.2\).* has 50\.0 GB free"
    ):
        capacity.refuse_stages(based_on(max_length=64), tmp_path / "not" / "made", stages[:1] + stages[2:])
    capacity.refuse_stages(based_on(max_length=64), tmp_path, ["convert"])


def test_run_that_cannot_fit_stops_before_the_download(machine, roomy, based_on, tmp_path):
    """The data stage runs first: its rows decide the memory of a training."""
    machine.gpu(4)
    recipe = based_on()
    for _ in range(2):
        with pytest.raises(HostError, match=r"a card has 4\.0 GB"):
            runner.run_all(recipe, tmp_path / "build")
    assert sorted(path.name for path in (tmp_path / "build" / "small").iterdir() if path.is_dir()) == ["data"]


def test_run_until_data_checks_no_training_memory(machine, roomy, based_on, tmp_path):
    machine.gpu(4)
    assert runner.run_all(based_on(), tmp_path / "build", until="data") == ["data"]


@pytest.mark.parametrize(("table", "name"), [("generate", "context"), ("train", "max_length")])
def test_length_beyond_the_positions_of_the_base_is_refused(machine, based_on, tmp_path, table, name):
    def refuse(tokens: int) -> None:
        recipe = based_on("tiny")
        settings = getattr(recipe, table).model_copy(update={name: tokens})
        capacity.refuse_stages(recipe.model_copy(update={table: settings}), tmp_path, ["base"])

    refuse(4096)
    with pytest.raises(RecipeError, match=rf"{table}.{name} is 4097, and the base tiny has 4096 positions; set"):
        refuse(4097)
