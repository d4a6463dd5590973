"""What this machine has, whether a recipe fits it, and how that is said.

nvidia-smi and docker are small programs on PATH; /proc and /sys are folders of the test's own.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.fake_machine import HEADING
from support.files import write_rows

from tutor.errors import HostError
from tutor.formats.models import base_source
from tutor.machine import capacity, device, doctor, host, preflight, run_cost
from tutor.machine.device import DeviceMemory
from tutor.machine.host import MIB, Gpu, Memory, Processor
from tutor.machine.memory.plan import MemoryRequest
from tutor.machine.memory.row_lengths import RowLengths, find_row_lengths, largest_batch
from tutor.machine.memory.shapes import SHAPES
from tutor.pipeline import runner as pipeline
from tutor.recipe.settings import Recipe

LARGE = SHAPES["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
CPU = Processor("a processor", 2, ("avx2",))
ANY = MemoryRequest("nf4", "auto", "bf16", tokens=1024, rank=8, targets=("q_proj",))


def model_folder(path: Path, **changes: Any) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return path


# GPUs


def test_gpus_are_read_with_their_memory_in_bytes(machine):
    machine.gpu(24, 20, name="NVIDIA GeForce RTX 4090")
    assert host.gpus() == [Gpu(0, "NVIDIA GeForce RTX 4090", "580.95.05", (8, 9), 22888 * MIB, round(20e9 / MIB) * MIB)]
    assert host.driver_cuda() == (13, 0)


def test_without_a_driver_or_with_a_broken_one_there_is_no_gpu(machine):
    assert host.gpus() == []
    assert host.driver_cuda() is None
    machine.gpu()
    (machine.folder / "code").write_text("9")
    assert host.gpus() == []


@pytest.mark.parametrize(
    "text", ["No devices were found", "0, GPU-0, a card, 580, 8.9, [N/A], [N/A]", "0, GPU-0, a card, 580, [N/A], 1, 1"]
)
def test_what_nvidia_smi_cannot_say_is_no_gpu(machine, text):
    machine.gpu()
    (machine.folder / "gpus").write_text(text + "\n")
    assert host.gpus() == []


@pytest.mark.parametrize(
    ("visible", "indexes"),
    [
        ("0,1", [0, 1]),
        ("1", [1]),
        ("1,0", [1, 0]),
        ("", []),
        ("-1", []),
        ("GPU-1aaaa", [1]),
        ("0,7,1", [0]),
        ("GPU", []),
    ],
)
def test_hidden_gpus_are_left_out_as_cuda_leaves_them_out(machine, monkeypatch, visible, indexes):
    machine.gpu()
    machine.gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in host.gpus()] == indexes


# Memory and processor


def kernel(root: Path, cgroup: str = "", **limits: str) -> Path:
    """A machine with 24 GiB, 20 of them available, and cgroup files by their path."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal: {24 << 20} kB\nMemFree: 1 kB\nMemAvailable: {20 << 20} kB\nSwapFree: {1 << 20} kB\n"
    )
    (root / "proc/self/cgroup").write_text(cgroup)
    for path, text in limits.items():
        (root / "sys/fs/cgroup" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / path).write_text(text + "\n")
    return root


GIB = 1 << 30


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("", {}, None),
        ("0::/\n", {"memory.max": str(4 * GIB)}, 4 * GIB),
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/user/job\n", {"user/job/memory.max": "max", "user/memory.max": str(6 * GIB)}, 6 * GIB),
        ("0::/user/job\n", {"user/job/memory.max": str(3 * GIB), "user/memory.max": str(6 * GIB)}, 3 * GIB),
        ("0::/user/job\n", {"memory.max": str(2 * GIB)}, 2 * GIB),  # the path is the host's, the files are ours
        ("9:name=systemd:/\n4:memory:/docker/1\n", {"memory/docker/1/memory.limit_in_bytes": str(5 * GIB)}, 5 * GIB),
        ("4:cpu,memory:/docker/1\n", {"memory/memory.limit_in_bytes": str(5 * GIB)}, 5 * GIB),
        ("4:memory:/\n0::/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("0::/\n", {"memory.max": str(48 * GIB)}, None),  # above what the machine has
        ("0::/../..\n", {"memory.max": str(4 * GIB)}, 4 * GIB),
        ("nonsense\n", {}, None),
    ],
)
def test_a_containers_memory_limit_counts_in_both_versions_of_cgroups(tmp_path, cgroup, limits, expected):
    total = expected or 24 * GIB
    found = host.memory(kernel(tmp_path, cgroup, **limits))
    assert found == Memory(total, min(total, 21 * GIB), expected)


def test_a_kernel_that_says_nothing_is_unknown(tmp_path):
    assert host.memory(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "name", "features", "bf16"),
    [
        ("model name\t: Xeon\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n", "Xeon", 4, True),
        ("model name\t: Old\nflags\t\t: fpu sse2\n", "Old", 0, False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", os.uname().machine, 2, True),
        ("", os.uname().machine, 0, False),
    ],
)
def test_the_processors_features_decide_what_is_quick(tmp_path, text, name, features, bf16):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(text)
    found = host.processor(tmp_path)
    assert (found.name, len(found.features), found.multiplies_bf16) == (name, features, bf16)
    assert found.cores == len(os.sched_getaffinity(0))


# The base's shape


def test_the_default_base_is_known_before_anything_is_fetched(machine, based_on, tmp_path):
    assert capacity.find_shape(based_on(), tmp_path) == LARGE


def test_the_tiny_models_shape_is_known(machine, based_on, tmp_path):
    assert capacity.find_shape(based_on("tiny"), tmp_path) == SHAPES["tiny"]


def test_an_unknown_base_of_the_hub_has_no_shape_and_refuses_nothing(machine, based_on, tmp_path, caplog):
    recipe = based_on("hub:owner/name@" + "0" * 40)
    assert capacity.find_shape(recipe, tmp_path) is None
    with caplog.at_level("INFO"):
        capacity.refuse(recipe, tmp_path, ["base", "train"])
    assert "not known before it is fetched" in caplog.text


def test_what_is_at_hand_is_read(machine, based_on, recipe_file, tmp_path):
    """The hub's cache, a folder, and what the base stage wrote, whichever the recipe names."""
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


def test_a_packages_gguf_tells_its_shape(machine, based_on, tmp_path, monkeypatch):
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


# Rows


def rows_of(recipe: Recipe, build: Path) -> RowLengths | None:
    return find_row_lengths(recipe, build, build / recipe.name / "base")


def test_rows_are_measured_by_the_split_and_before_it_by_the_file(machine, based_on, recipe_file, tmp_path):
    recipe = based_on("tiny")
    before = rows_of(recipe, tmp_path)
    split = tmp_path / "small" / "data"
    split.mkdir(parents=True)
    write_rows(split / "train.jsonl", [{"instruction": "¿?", "response": "a" * 2000}])
    after = rows_of(recipe, tmp_path)
    assert before.longest < 50
    assert 2000 / 3 < after.longest < 1000
    assert after.tokens < after.longest
    (split / "train.jsonl").unlink()
    prompted = rows_of(recipe.model_copy(update={"system": "s" * 1000}), tmp_path)
    assert before.longest + 1000 / 3 < prompted.longest < before.longest + 500


@pytest.mark.parametrize("text", ["", "[1]\n", "{\n", '{"instruction": 1, "response": 2}\n', "\udcff", "[" * 100_000])
def test_rows_that_are_wrong_are_the_data_stages_to_refuse(machine, based_on, recipe_file, tmp_path, text):
    recipe_file.with_name("tutor.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert rows_of(based_on(), tmp_path) is None


def test_a_pipe_is_not_waited_for(machine, based_on, recipe_file, tmp_path):
    recipe_file.with_name("tutor.jsonl").unlink()
    os.mkfifo(recipe_file.with_name("tutor.jsonl"))
    assert rows_of(based_on(), tmp_path) is None


# Whether it fits


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks with room for anything."""
    free = SimpleNamespace(free=10**15, total=10**15, used=0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)


def test_a_training_that_fits_is_not_refused(machine, roomy, based_on, tmp_path):
    machine.gpu(24)
    capacity.refuse(based_on(), tmp_path, ["base", "train", "merge", "convert"])


def test_a_training_beyond_the_gpu_is_refused_with_its_parts_and_a_setting_that_fits(
    machine, roomy, based_on, tmp_path
):
    machine.gpu(8, name="NVIDIA RTX 4060")
    with pytest.raises(HostError) as caught:
        capacity.refuse(based_on(quantization="none"), tmp_path, ["base", "train"])
    assert caught.value.code == 4
    assert "(weights 16.1, " in caught.value.message
    assert caught.value.message.endswith("; NVIDIA RTX 4060 has 8.0 GB")
    assert caught.value.hint == 'set train.quantization = "nf4"'
    assert "\n" not in str(caught.value)


def test_where_nothing_fits_that_is_said(machine, roomy, based_on, tmp_path):
    machine.gpu(2)
    with pytest.raises(HostError, match="no setting makes it fit: take a smaller base"):
        capacity.refuse(based_on(), tmp_path, ["train"])


def test_where_only_what_is_assumed_does_not_fit_it_is_a_warning(machine, roomy, based_on, tmp_path, caplog):
    """The tensors of an 8B and short rows take about 6 GB; CUDA's own share and the allocator's were never measured."""
    machine.gpu(6.4)
    with caplog.at_level("WARNING"):
        capacity.refuse(based_on(max_length=128), tmp_path, ["train"])
    assert "a card has 6.4 GB: it may not fit; if it does not, " in caplog.text


def test_a_warning_where_no_setting_helps_names_a_smaller_base(machine, roomy, based_on, tmp_path, caplog):
    """CUDA's own share alone is more than this card has, and no setting of the recipe makes it less."""
    machine.gpu(0.4)
    with caplog.at_level("WARNING"):
        capacity.refuse(based_on("tiny", quantization="nf4", gradient_checkpointing=True), tmp_path, ["train"])
    assert "if it does not, no setting makes it fit: take a smaller base" in caplog.text


def test_memory_of_the_gpu_that_others_hold_is_named_with_its_holders(machine, roomy, based_on, tmp_path):
    machine.gpu(24, 2)
    (machine.folder / "apps").write_text("4242, /usr/bin/python3, 20480\n7, [Not Found], [N/A]\n")
    with pytest.raises(HostError, match=r"of a card 2\.0 GB are free, the rest is held by 4242 python3 \(21\.5 GB\)"):
        capacity.refuse(based_on(), tmp_path, ["train"])


def test_stages_that_do_not_train_need_no_gpu_memory(machine, roomy, based_on, tmp_path):
    machine.gpu(2)
    capacity.refuse(based_on(), tmp_path, ["merge", "convert"])


@pytest.mark.parametrize(
    ("capability", "settings", "said"),
    [
        ("6.1", {}, "compute capability 6.1; the pinned CUDA needs 7.5"),
        ("7.5", {"precision": "bf16"}, "no native bf16; set train.precision to auto"),
        (None, {"precision": "fp16"}, "fp16 needs a GPU"),
    ],
)
@pytest.mark.usefixtures("roomy")
def test_a_precision_that_would_fail_later_is_refused_now(machine, based_on, tmp_path, capability, settings, said):
    if capability:
        machine.gpu(capability=capability)
    with pytest.raises(HostError, match=said):
        capacity.refuse(based_on(**settings), tmp_path, ["train"])


def test_without_bf16_a_gpu_computes_in_fp16_and_a_cpu_in_fp32(based_on):
    train = based_on().train
    old = Gpu(0, "T4", "580", (7, 5), 1, 1)
    assert device.precision_on(train.precision, old, CPU) == "fp16"
    assert device.precision_on(train.precision, None, CPU) == "fp32"
    assert device.precision_on(train.precision, None, Processor("x", 2, ("bf16",))) == "bf16"


def test_a_row_is_never_estimated_longer_than_the_recipe_allows(based_on):
    train = based_on(max_length=256, batch_size=4, packing=False).train
    assert largest_batch(train, RowLengths([9000] * 9, 1)) == (1024, 256)
    assert largest_batch(train, RowLengths([100] * 9, 1)) == (400, 100)
    assert largest_batch(train, None) == (1024, 256)


def test_main_memory_that_others_use_is_a_warning_and_too_little_of_it_a_refusal(caplog):
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


def test_weeks_on_a_cpu_are_said_before(machine, roomy, based_on, recipe_file, tmp_path, caplog):
    rows = [{"instruction": f"¿{number}?", "response": "a" * 1000} for number in range(3000)]
    write_rows(recipe_file.with_name("tutor.jsonl"), rows)
    recipe = based_on()
    with caplog.at_level("WARNING"):
        capacity.refuse_training(recipe, tmp_path, SHAPES["tiny"], None)
        assert caplog.text == ""
        if host.memory().total > 20e9:
            capacity.refuse_training(recipe, tmp_path, LARGE, None)
            assert "training on this CPU takes about" in caplog.text


# Disk


def test_a_disk_without_room_for_the_chain_is_refused_with_its_stages(machine, based_on, tmp_path, monkeypatch):
    free = SimpleNamespace(free=50 * 10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    stages = ["base", "train", "merge", "convert"]
    with pytest.raises(
        HostError, match=r"will write 74\.5 GB \(hub 16\.1, merge 16\.1, convert 42\.4\).* has 50\.0 GB free"
    ):
        capacity.refuse(based_on(max_length=64), tmp_path / "not" / "made", stages[:1] + stages[2:])
    capacity.refuse(based_on(max_length=64), tmp_path, ["convert"])


def test_what_the_hub_sent_already_needs_no_room(machine, based_on, tmp_path):
    recipe = based_on()
    before = run_cost.disk_sizes(recipe, LARGE, ["base"])
    assert before == {"hub": 2 * LARGE.parameters}
    snapshot = base_source.hub_snapshot(recipe.base.source)
    snapshot.mkdir(parents=True)
    with (snapshot / "model-00001-of-00002.safetensors").open("wb") as file:
        file.truncate(9 * 10**9)
    assert run_cost.disk_sizes(recipe, LARGE, ["base"])["hub"] == before["hub"] - 9 * 10**9
    (snapshot / "model-00002-of-00002.safetensors").symlink_to("gone")
    assert run_cost.disk_sizes(recipe, LARGE, ["base"])["hub"] == before["hub"] - 9 * 10**9
    with (snapshot / "model-00003-of-00003.safetensors").open("wb") as file:
        file.truncate(9 * 10**9)
    assert run_cost.disk_sizes(recipe, LARGE, ["base"]) == {}


def test_needs_on_one_disk_add_up(tmp_path):
    _, _, free = host.free_disk(tmp_path)
    half = free * 2 // 3
    assert run_cost.short_disks([(tmp_path / "a", half)]) == []
    ((place, left, need),) = run_cost.short_disks([(tmp_path / "a" / "b", half), (tmp_path, half)])
    assert (place, need) == (tmp_path, 2 * half)
    assert left < need


def test_a_folder_that_may_not_be_entered_is_on_the_disk_of_the_one_above(tmp_path):
    (tmp_path / "closed" / "inside").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    if os.access(tmp_path / "closed", os.X_OK):
        pytest.skip("this user may enter any folder (root)")
    assert host.free_disk(tmp_path / "closed" / "inside" / "more")[1] == tmp_path / "closed"


# The pipeline


def test_a_run_that_cannot_fit_stops_before_anything_is_fetched(machine, roomy, based_on, tmp_path):
    """The rows come first: they tell how long a training's are."""
    machine.gpu(4)
    recipe = based_on()
    for _ in range(2):
        with pytest.raises(HostError, match=r"a card has 4\.0 GB"):
            pipeline.run_all(recipe, tmp_path / "build")
    assert sorted(path.name for path in (tmp_path / "build" / "small").iterdir() if path.is_dir()) == ["data"]


def test_stages_that_are_asked_for_alone_are_weighed_alone(machine, roomy, based_on, tmp_path):
    machine.gpu(4)
    assert pipeline.run_all(based_on(), tmp_path / "build", until="data") == ["data"]


# The stack


def test_the_stacks_preflight_says_it_with_the_rest(machine, roomy, based_on, tmp_path):
    machine.gpu(4)
    recipe = based_on()
    assert preflight.memory_faults(recipe, tmp_path, LARGE, gpu=True)[0].what.endswith("; a card has 4.0 GB")
    (tmp_path / "small" / "adapter").mkdir(parents=True)
    (tmp_path / "small" / "adapter" / "manifest.json").touch()
    assert preflight.memory_faults(recipe, tmp_path, LARGE, gpu=True) == []


def test_a_gpu_that_says_too_little_is_left_to_the_trainer(machine, roomy, based_on, tmp_path):
    assert preflight.memory_faults(based_on(), tmp_path, LARGE, gpu=True) == []


def test_the_stack_weighs_the_gpu_that_it_hands_over(machine, roomy, based_on, tmp_path, monkeypatch):
    machine.gpu(24)
    machine.gpu(4)
    assert preflight.memory_faults(based_on(), tmp_path, LARGE, gpu=True) == []
    monkeypatch.setenv("TUTOR_GPU", "1")
    assert preflight.memory_faults(based_on(), tmp_path, LARGE, gpu=True)


# The checks


def states(checks: Any) -> dict[str, str]:
    return {check.what: check.state for check in checks}


def test_a_machine_without_a_gpu_is_told_what_it_can_do(machine):
    (check,) = doctor.gpu_checks([])
    assert (check.state, "data/demo.toml" in check.hint) == ("warning", True)


@pytest.mark.parametrize(("capability", "state"), [((6, 1), "missing"), ((7, 5), "warning"), ((8, 0), "ok")])
def test_the_compute_capability_is_judged(machine, capability, state):
    gpu = Gpu(0, "a card", "580", capability, 8 * GIB, 8 * GIB)
    assert states(doctor.gpu_checks([gpu]))["compute capability"] == state


def test_two_gpus_are_one_too_many(machine):
    gpu = Gpu(0, "a card", "580", (8, 0), 8 * GIB, 8 * GIB)
    assert "CUDA_VISIBLE_DEVICES" in next(iter(doctor.gpu_checks([gpu, gpu]))).hint


def installed(folder: Path, name: str, version: str) -> None:
    """A package's metadata, which is all of it that is looked at."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(("runs", "state"), [("12.8", "missing"), ("13.0", "ok"), ("14.1", "ok")])
def test_a_driver_older_than_the_installed_cuda_is_said_with_both_versions(machine, tmp_path, monkeypatch, runs, state):
    installed(tmp_path / "site", "nvidia-cuda-runtime", "13.2.86")
    monkeypatch.syspath_prepend(tmp_path / "site")
    machine.gpu()
    (machine.folder / "heading").write_text(HEADING.replace("13.0", runs))
    check = next(check for check in doctor.gpu_checks(host.gpus()) if check.what == "driver")
    assert check.state == state
    assert runs in check.found
    assert ("CUDA 13.2" in check.hint) == (state == "missing")


@pytest.mark.parametrize(
    ("name", "version", "state", "said"),
    [
        ("transformers", "5.9.0", "missing", "drops every blank"),
        ("transformers", "5.22.1", "missing", "5.22.2 or newer"),
        ("transformers", "4.57.6", "warning", "==5.23.0"),
        ("torch", "2.9.1+cu128", "missing", "CVE-2026-24747"),
        ("trl", "1.15.0", "warning", "==1.16.0"),
        ("jinja2", "3.1.5", "missing", "sandbox"),
    ],
)
def test_library_versions_that_harm_are_named(tmp_path, monkeypatch, name, version, state, said):
    installed(tmp_path / "site", name, version)
    monkeypatch.syspath_prepend(tmp_path / "site")
    check = next(check for check in doctor.package_checks() if check.what == name)
    assert check.state == state
    assert said in f"{check.found} {check.hint}"
    assert version in check.found


@pytest.mark.parametrize(
    ("version", "specifier", "right"),
    [
        ("1.16.0", "==1.16.0", True),
        ("1.16", "==1.16.0", True),
        ("1.16.1", "==1.16.0", False),
        ("2.15.0+cpu", ">=2.13", True),
        ("2.9", ">=2.13", False),
        ("24.20.1", ">=24.19,<25", True),
        ("25.0.0", "<25,>=24.19", False),
        ("7.2", "", True),
    ],
)
def test_versions_are_compared_by_number(version, specifier, right):
    assert doctor.satisfies(version, specifier) is right


def test_the_train_extra_of_pyproject_is_what_is_looked_for():
    wanted = dict(doctor.wanted_versions("train"))
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes"} <= wanted.keys()
    assert wanted["trl"] == "==1.16.0"


def test_what_is_not_built_is_named_with_the_command_that_builds_it(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("TUTOR_LLAMACPP", str(tmp_path / "none"))
    monkeypatch.setenv("TUTOR_TYPESCRIPT", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(machine.folder))
    found = {check.what: check for check in doctor.program_checks()}
    assert "g++" in found["llama.cpp"].hint
    machine.program("c++", "#!/bin/sh\n")
    found = {check.what: check for check in doctor.program_checks()}
    assert (found["llama.cpp"].state, found["llama.cpp"].hint) == ("missing", "make llamacpp")
    assert found["TypeScript compiler"].needed_by != doctor.RUN


@pytest.fixture
def ollama(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """An Ollama that says the version that it is given."""
    said = {"version": ""}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.server_port}")
    yield lambda version: said.update(version=version)
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize(("version", "state"), [("0.33.3", "ok"), ("0.29.9", "missing"), ("0.0.0", "warning")])
def test_the_server_is_asked_for_its_version(machine, ollama, version, state):
    ollama(version)
    check = doctor.ollama_check()
    assert (check.state, version in check.found) == (state, True)


def test_no_server_stops_only_publishing(machine):
    check = doctor.ollama_check()
    assert (check.state, check.needed_by) == ("missing", "tutor publish")
    assert "ollama serve" in check.hint


def test_docker_and_the_toolkit_stop_only_the_containers(machine):
    assert {check.needed_by for check in doctor.docker_checks({}, gpu=True)} == {"make all"}
    machine.program("docker", "#!/bin/sh\necho 2.40.0\n")
    machine.gpu()
    info = {"ServerVersion": "26.1.5", "Runtimes": {}}
    assert states(doctor.docker_checks(info, gpu=True)) == {"Docker": "ok", "NVIDIA container toolkit": "missing"}
    with_toolkit = {**info, "Runtimes": {"nvidia": {}}}
    assert states(doctor.docker_checks(with_toolkit, gpu=True))["NVIDIA container toolkit"] == "ok"
    assert states(doctor.docker_checks(info, gpu=False)) == {"Docker": "ok"}


def report(*checks: doctor.HostCheck, refusal: HostError | None = None) -> doctor.HostReport:
    return doctor.HostReport(checks, None, refusal)


def test_one_way_to_train_is_enough():
    no_docker = doctor.HostCheck("Docker", "missing", "", needed_by=doctor.STACK)
    no_torch = doctor.HostCheck("train environment", "missing", "", needed_by=doctor.RUN)
    no_ollama = doctor.HostCheck("Ollama", "missing", "", needed_by=doctor.SERVE)
    assert report(no_docker, no_ollama).fault is None
    assert report(no_torch, no_ollama).fault is None
    fault = report(no_torch, no_docker).fault
    assert "tutor run lacks train environment; make all lacks Docker" in fault.message
    assert report(refusal=HostError("too large")).fault.message == "too large"
