"""serving/verify.py, stages/convert/lineage.py and `tutor verify`: the recorded origin of a file is recomputed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.fakes import ollama as fake
from support.files import write_rows
from support.models.gguf_bytes import facts
from support.models.small_weights import (
    ATTENTION,
    NAMES,
    SHAPES,
    permuted_for_llamacpp,
    random_weights,
    trained_weights,
    write_gguf,
    write_model,
)

from tutor.artifacts.hashing import file_sha256
from tutor.artifacts.stage_folder import writing
from tutor.errors import ArtifactError, RecipeError, ServiceError
from tutor.formats.models.gguf import read_gguf
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe
from tutor.serving import verify
from tutor.stages.convert import lineage

Run = Callable[..., Any]


class Built:
    """A recipe and its build folder, with one F16 file and one Q8_0 file of the merged model."""

    def __init__(self, recipe: Path, build: Path) -> None:
        self.path, self.build, self.recipe = recipe, build, read_recipe(recipe)
        self.folder = build / self.recipe.name
        base = random_weights()
        merged = trained_weights(base)
        model = write_model(self.folder / "base" / "model", base)
        known = facts(weights=lineage.weights_hash(model))
        (self.folder / "base" / "base.json").write_text(json.dumps(asdict(known)), "utf-8")
        write_model(self.folder / "merged", merged)
        for name in ("data", "adapter"):
            (self.folder / name).mkdir()
        write_rows(self.folder / "data" / "train.jsonl", [{"instruction": "¿Qué?", "response": "Eso."}])
        save_file({"a": np.zeros((2, 2), np.float32)}, self.folder / "adapter" / "adapter_model.safetensors")
        self.metadata = lineage.to_fields(lineage.tutor_lineage(self.recipe, self.inputs))
        with writing(self.folder / "gguf", "convert", {}) as (out, _):
            for kind in ("F16", "Q8_0"):
                write_gguf(out / f"tutor-{kind}.gguf", merged, kind, metadata=self.metadata)

    @property
    def inputs(self) -> dict[str, Path]:
        names = {"data": "data", "base": "base", "train": "adapter", "merge": "merged"}
        return {stage: self.folder / name for stage, name in names.items()}

    def gguf(self, kind: str = "Q8_0") -> Path:
        return self.folder / "gguf" / f"tutor-{kind}.gguf"

    def conditions(self, path: Path) -> dict[str, str]:
        return {row.what: row.condition for row in verify.verify_file(path, self.recipe, self.build)}


@pytest.fixture
def built(recipe_file: Path, tmp_path: Path) -> Built:
    return Built(recipe_file, tmp_path / "build")


HASHES = ("data.sha256", "recipe.sha256", "adapter.sha256", "merged.sha256", "base", "base.sha256")


# Lineage


def test_lineage_names_inputs_weights_and_tools(built: Built) -> None:
    recorded = lineage.from_fields(read_gguf(built.gguf()).fields)
    assert set(recorded) == {*HASHES, *lineage.SOFTWARE_KEYS}
    assert all(len(recorded[name]) == 64 for name in HASHES if name.endswith("sha256"))
    assert "torch " in recorded["tools"]
    assert not any(str(built.build) in value for value in recorded.values()), "no path of this machine"


def test_lineage_is_equal_in_another_folder(built: Built, tmp_path: Path) -> None:
    moved_away = {name: Path(shutil.copytree(path, tmp_path / "x" / path.name)) for name, path in built.inputs.items()}
    assert lineage.tutor_lineage(built.recipe, moved_away) == lineage.tutor_lineage(built.recipe, built.inputs)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"seed": 7}, False),
        ({"system": "Eres un tutor."}, False),
        ({"train": {"rank": 4}}, False),
        ({"train": {"logging_steps": 3, "save_minutes": 9.0}}, True),
        ({"generate": {"temperature": 1.0}}, True),
        ({"data": {"train": "elsewhere.jsonl"}}, True),
    ],
)
def test_recipe_hash_changes_only_with_training_settings(change: dict[str, Any], same: bool) -> None:  # noqa: FBT001
    changed = Recipe.model_validate(change)
    assert (lineage.recipe_hash(changed) == lineage.recipe_hash(Recipe())) is same


# Files


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_file_of_this_build_is_ok_in_every_row(built: Built, kind: str) -> None:
    assert set(built.conditions(built.gguf(kind)).values()) == {"ok"}


def sabotage_rows(built: Built) -> None:
    with (built.folder / "data" / "train.jsonl").open("a") as rows:
        rows.write("\n")


def sabotage_adapter(built: Built) -> None:
    save_file({"a": np.ones((2, 2), np.float32)}, built.folder / "adapter" / "adapter_model.safetensors")


def sabotage_merged(built: Built) -> None:
    shutil.rmtree(built.folder / "merged")
    write_model(built.folder / "merged", random_weights(9))


@pytest.mark.parametrize(
    ("sabotage", "wrong"),
    [
        (sabotage_rows, {"data.sha256"}),
        (sabotage_adapter, {"adapter.sha256"}),
        (sabotage_merged, {"merged.sha256", "weights"}),
    ],
)
def test_changed_input_is_wrong_in_its_rows_alone(
    built: Built, sabotage: Callable[[Built], None], wrong: set[str]
) -> None:
    sabotage(built)
    found = built.conditions(built.gguf())
    assert {what for what, condition in found.items() if condition == "wrong"} == wrong
    assert {condition for what, condition in found.items() if what not in wrong} == {"ok"}


def test_file_with_one_changed_byte_is_wrong(built: Built, tmp_path: Path) -> None:
    copy = tmp_path / "a.gguf"
    data = bytearray(built.gguf("F16").read_bytes())
    data[-4] ^= 1  # the last bit of a number: far below the error of a quantization
    copy.write_bytes(data)
    found = built.conditions(copy)
    assert (found["file"], found["weights"]) == ("wrong", "wrong")
    assert found["merged.sha256"] == "ok", "the record itself is unchanged"


def test_missing_inputs_are_unknown_with_a_reason(built: Built, tmp_path: Path) -> None:
    copy = Path(shutil.copy(built.gguf(), tmp_path / "a.gguf"))
    for name in ("data", "adapter", "merged", "gguf", "base"):
        shutil.rmtree(built.folder / name)
    rows = {row.what: row for row in verify.verify_file(copy, built.recipe, built.build)}
    unknown = {what for what, row in rows.items() if row.condition == "unknown"}
    assert unknown == {"file", "weights", "data.sha256", "adapter.sha256", "merged.sha256", "base.sha256"}
    assert "adapter" in rows["adapter.sha256"].computed
    assert not verify.wrong_rows(list(rows.values()))
    assert not verify.is_shown(list(rows.values())), "the hashes that a file records show nothing of its tensors"


@pytest.mark.parametrize(
    ("conditions", "shown"),
    [
        ([("file", "ok"), ("weights", "unknown"), ("merged.sha256", "unknown")], True),
        ([("file", "unknown"), ("weights", "ok")], True),
        ([("file", "unknown"), ("weights", "unknown"), ("merged.sha256", "ok"), ("base", "ok")], False),
        ([("file", "ok"), ("weights", "ok"), ("adapter file", "unknown"), ("adapter weights", "unknown")], False),
        ([("file", "unknown"), ("adapter file", "ok"), ("adapter weights", "ok")], False),
        ([("file", "unknown")], False),
        ([("version", "ok")], False),
        ([], False),
    ],
)
def test_origin_is_shown_only_by_the_bytes_of_every_file(conditions: list[tuple[str, Any]], shown: bool) -> None:  # noqa: FBT001
    assert verify.is_shown([verify.Row(what, condition, "", "") for what, condition in conditions]) is shown


DTYPES = {"BOOL": 8, "I8": 8, "U8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
DTYPES |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32}
DTYPES |= {"F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F3": 3}
"""Bits a number by the names of the safetensors format, and a name that it does not have."""


@pytest.mark.parametrize("dtype", DTYPES)
def test_source_of_any_dtype_is_compared_or_unknown(built: Built, dtype: str) -> None:
    size = 64 * DTYPES[dtype] // 8
    entry = {"dtype": dtype, "shape": [64], "data_offsets": [0, size]}
    header = json.dumps({"model.norm.weight": entry}).encode()
    path = built.folder / "merged" / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * size)
    found = built.conditions(built.gguf())
    assert found["weights"] == ("wrong" if dtype in ("F16", "BF16", "F32") else "unknown")


@pytest.mark.parametrize("kind", ["F64", "I8", "I16", "I32", "I64", "Q8_1"])
@pytest.mark.parametrize("labelled", ["F16", "Q8_0"])
def test_tensor_of_any_type_is_compared(built: Built, tmp_path: Path, kind: str, labelled: str) -> None:
    """No file of llama.cpp has such weights: llama.cpp itself keeps a few small tables in them."""
    type_ = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{labelled}"])
    for key, value in built.metadata.items():
        writer.add_string(key, value)
    for name, shape in SHAPES.items():
        rows = np.full((*shape[:-1], shape[-1] // block * size), 1, np.uint8)
        writer.add_tensor(NAMES[name], rows, raw_shape=rows.shape, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert built.conditions(tmp_path / "a.gguf")["weights"] == "wrong"


def test_file_that_changes_while_it_is_verified_is_refused(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    path = built.gguf()
    monkeypatch.setattr(verify, "_weights_row", lambda *_: (path.touch(), verify.Row("weights", "ok", "", ""))[1])
    with pytest.raises(ArtifactError, match=r"tutor-Q8_0\.gguf changed while it was read"):
        built.conditions(path)


def test_damaged_weights_are_unknown_and_their_hash_is_wrong(built: Built) -> None:
    path = built.folder / "merged" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    rows = {row.what: row for row in verify.verify_file(built.gguf(), built.recipe, built.build)}
    assert rows["merged.sha256"].condition == "wrong"
    assert rows["weights"].condition == "unknown"
    assert "is damaged" in rows["weights"].computed


def test_other_software_versions_are_not_wrong(built: Built, tmp_path: Path) -> None:
    metadata = {**built.metadata, "tutor.version": "0.0.1", "tutor.tomorrow": "?"}
    path = write_gguf(tmp_path / "a.gguf", random_weights(), metadata=metadata)
    found = built.conditions(path)
    assert (found["version"], found["tomorrow"]) == ("other", "unknown")


def adapter(built: Built, path: Path) -> Path:
    """Write a GGUF of an adapter of the base's q matrix, and its PEFT folder."""
    rank = 2
    random_ = np.random.default_rng(3)
    rows = random_weights()[f"{ATTENTION}q_proj.weight"].shape
    a, b = (random_.standard_normal(shape, np.float32) for shape in ((rank, rows[1]), (rows[0], rank)))
    named = f"base_model.model.{ATTENTION}q_proj.lora_"
    save_file({f"{named}A.weight": a, f"{named}B.weight": b}, built.folder / "adapter" / "adapter_model.safetensors")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for key, value in lineage.to_fields(lineage.adapter_lineage(built.recipe, built.inputs)).items():
        writer.add_string(key, value)
    ordered = permuted_for_llamacpp(f"{ATTENTION}q_proj.weight", b)
    for half, matrix in (("a", a), ("b", ordered)):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{half}", matrix.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_adapter_file_is_compared_with_that_of_peft(built: Built) -> None:
    with writing(built.folder / "lora", "lora", {}) as (out, _):
        adapter(built, out / "tutor-lora.gguf")
    found = built.conditions(built.folder / "lora" / "tutor-lora.gguf")
    assert set(found.values()) == {"ok"}
    assert {"file", "weights", "adapter.sha256", "base.sha256"} <= set(found)
    assert "merged.sha256" not in found
    other = adapter(built, built.folder / "b.gguf")
    sabotage_adapter(built)
    assert built.conditions(other)["adapter.sha256"] == "wrong"


def test_file_without_an_origin_is_an_artifact_error(built: Built, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not record its origin"):
        built.conditions(write_gguf(tmp_path / "a.gguf", random_weights()))


@pytest.mark.parametrize(("name", "is_file"), [("tutor", False), ("tutor:latest", False), ("user/tutor", False)])
def test_name_without_a_file_is_a_model(name: str, is_file: bool) -> None:  # noqa: FBT001
    assert verify.is_file(name) is is_file


@pytest.mark.parametrize("name", ["gone.gguf", "/gone", "./gone"])
def test_path_of_a_missing_file_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="is not a file"):
        verify.is_file(name)


# Models on a server


def add_model(server: fake.FakeOllama, path: Path, **facts: Any) -> str:
    digest = fake.write_gguf(path, **facts)
    server.blobs[f"sha256:{digest}"] = path.read_bytes()
    facts = fake.facts_of(path.read_bytes())
    server.models["tutor:latest"] = fake.Model({}, facts, f"sha256:{digest}")
    return digest


def test_published_model_is_identified_by_its_file(built: Built, server: fake.FakeOllama, tmp_path: Path) -> None:
    with writing(built.folder / "gguf", "convert", {}) as (out, _):
        add_model(server, out / "tutor-Q8_0.gguf", info=built.metadata)
    rows = {row.what: row for row in verify.verify_model("tutor:latest", server.host, built.recipe, built.build)}
    assert {row.condition for what, row in rows.items() if what != "weights"} == {"ok"}
    assert rows["file"].computed == "gguf/tutor-Q8_0.gguf"
    assert rows["weights"].condition == "wrong", "the files of the fake have other weights"


def test_local_copy_of_a_server_file_has_its_weights_compared(built: Built, server: fake.FakeOllama) -> None:
    """The fake server returns no metadata of a real file: the test reads them from the file."""
    path = built.gguf()
    server.blobs[digest := f"sha256:{file_sha256(path)}"] = path.read_bytes()
    facts = {"info": {"tutor.base": built.metadata["tutor.base"]}, "chat_template": "", "quantization": "Q8_0"}
    server.models["tutor:latest"] = fake.Model({}, facts, digest)
    rows = {row.what: row for row in verify.verify_model("tutor:latest", server.host, built.recipe, built.build)}
    assert {row.condition for row in rows.values()} == {"ok"}
    assert str(built.folder / "merged") in rows["weights"].computed
    assert "merged.sha256" in rows


def test_model_of_another_build_is_wrong(built: Built, server: fake.FakeOllama, tmp_path: Path) -> None:
    add_model(server, tmp_path / "other.gguf", info={**built.metadata, "tutor.adapter.sha256": 64 * "0"})
    rows = verify.verify_model("tutor:latest", server.host, built.recipe, built.build)
    assert {row.what for row in verify.wrong_rows(rows)} == {"file", "adapter.sha256"}


def test_missing_model_or_one_without_origin_is_an_error(built: Built, server: fake.FakeOllama, tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="no model 'tutor:latest'"):
        verify.verify_model("tutor:latest", server.host, built.recipe, built.build)
    add_model(server, tmp_path / "a.gguf")
    with pytest.raises(ArtifactError, match="does not record its origin"):
        verify.verify_model("tutor:latest", server.host, built.recipe, built.build)


# The command


@pytest.mark.slow
def test_verify_command_exits_5_when_a_row_is_wrong(built: Built, tutor: Run) -> None:
    where = ("-r", built.path, "-b", built.build)
    fine = tutor("verify", built.gguf(), *where)
    assert (fine.returncode, fine.stderr) == (0, "")
    assert {line.split()[0] for line in fine.stdout.splitlines()} == {"ok"}
    sabotage_rows(built)
    bad = tutor("verify", built.gguf(), *where, "--json")
    assert bad.returncode == 5
    assert "data.sha256" in bad.stderr
    assert {row["what"]: row["condition"] for row in json.loads(bad.stdout)}["data.sha256"] == "wrong"
    assert tutor("verify", "gone.gguf", *where).returncode == 2
    elsewhere = tutor("verify", built.gguf(), "-r", built.path, "-b", built.build / "x")
    assert (elsewhere.returncode, elsewhere.stderr.count("\n")) == (8, 1)
    assert "nothing shows that" in elsewhere.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_verify_shows_key_values_of_a_file_escaped(built: Built, tutor: Run, flags: tuple[str, ...]) -> None:
    title = "\x1b]0;x\x07"
    write_gguf(built.gguf(), random_weights(), "Q8_0", metadata={f"tutor.{title}": "\u202e", "tutor.base": title})
    done = tutor("verify", built.gguf(), *flags, "-r", built.path, "-b", built.build)
    assert done.returncode == 5
    assert not {"\x1b", "\x07", "\u202e"} & set(done.stdout + done.stderr)
    assert all(text in done.stdout for text in ("\\u202e", "]0;x"))


def test_row_lines_shorten_hashes_and_name_unchecked_values() -> None:
    rows = [
        verify.Row("file", "ok", 64 * "a", "gguf/tutor-F16.gguf"),
        verify.Row("data.sha256", "wrong", 64 * "b", 64 * "c"),
        verify.Row("base.sha256", "unknown", 64 * "d", "build/x is not there"),
    ]
    ok, wrong, unknown = verify.row_lines(rows)
    assert ok.split() == ["ok", "file", "gguf/tutor-F16.gguf"]
    assert f"{16 * 'b'}… (here: {16 * 'c'}…)" in wrong
    assert unknown.endswith("cannot be checked: build/x is not there")
