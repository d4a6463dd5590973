"""engines/llamacpp/server.py: against programs that only pretend, and (marked llamacpp) against the pinned build."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from support.fake_llamacpp import script
from support.random_llama import RECOGNISER, TEXTS, llama3_splitter, make_tiny

from tutor.engines.llamacpp import process as llamacpp_process
from tutor.engines.llamacpp import server as llamacpp
from tutor.engines.llamacpp.build import VERSION
from tutor.engines.llamacpp.convert import imatrix, quantize, to_gguf
from tutor.engines.llamacpp.process import programs
from tutor.engines.llamacpp.score import reference_bytes, score
from tutor.engines.protocol import Generation
from tutor.errors import ArtifactError, HostError, RecipeError, ServiceError
from tutor.formats.models.gguf import read_gguf
from tutor.formats.models.pre_tokenizer import GPT2, LLAMA3, pre_tokenizer_name
from tutor.prompt import conversation, render
from tutor.recipe.quantizations import KINDS, NEED_IMATRIX, NOT_MADE, SECOND_NAMES

GREEDY = Generation(max_new_tokens=24, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=7)
SAMPLED = Generation(max_new_tokens=9, temperature=0.003, top_p=0.85, repetition_penalty=1.15, seed=7)
QUESTION = conversation("¿Qué es un tipo?")

SERVER = """
import http.server, json, os, signal, socketserver, sys, time
from pathlib import Path

home = Path(__file__).parent.parent
plan = json.loads((home / "plan.json").read_text("utf-8"))
(home / "started.json").write_text(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], "env": dict(os.environ)}))
print(plan.get("says", "hello"), flush=True)
if "signal" in plan:
    os.kill(os.getpid(), plan["signal"])
if "exit" in plan:
    sys.exit(plan["exit"])
if plan.get("stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
asked = []


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        asked.append(self.path)
        self.send_response(200 if len(asked) > plan.get("loading", 0) else 503)
        self.end_headers()

    def do_POST(self):
        (home / "request.json").write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(plan.get("status", 200))
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for event in plan.get("events", []):
                text = event if isinstance(event, str) else "data: " + json.dumps(event, ensure_ascii=False)
                self.wfile.write((text + "\\n\\n").encode())
                time.sleep(plan.get("pause", 0))
        except BrokenPipeError:
            (home / "hung_up").touch()


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


Server(sys.argv[sys.argv.index("--host") + 1], Handler).serve_forever()
"""

CONVERTER = """
import argparse, json, sys
from pathlib import Path
import gguf
from conversion.base import TextModel

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for name in ("--outfile", "--outtype", "--model-name"):
        parser.add_argument(name)
    given = vars(parser.parse_args())
    print("hola, converting")
    model = TextModel()
    given["pre"] = model.get_vocab_base_pre("a tokenizer")
    model.prepare_metadata(vocab_only=False)
    given["says"] = model.gguf_writer.said
    given["gguf"] = gguf.__file__
    Path(given["outfile"]).write_text(json.dumps(given))
"""


@pytest.fixture
def pretend(build: Path) -> Callable[..., dict[str, Any]]:
    """Make a llama-server that follows a plan; the arguments to serve it with."""

    def plan(**steps: Any) -> dict[str, Any]:
        script(build, "llama-server", SERVER)
        (build / "plan.json").write_text(json.dumps(steps), "utf-8")
        return {"gguf": build / "a.gguf", "context": 128, "threads": 1, "log": build / "server.log"}

    return plan


def started(build: Path) -> dict[str, Any]:
    return json.loads((build / "started.json").read_text("utf-8"))


def alive(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody has collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def piece(text: str) -> dict[str, Any]:
    return {"content": text, "stop": False}


def end(stop_type: str, predicted: int) -> dict[str, Any]:
    numbers = {"tokens_evaluated": 11, "tokens_predicted": predicted, "timings": {"predicted_per_second": 95.5}}
    return {"content": "", "stop": True, "stop_type": stop_type, **numbers}


# The build


def test_programs_that_are_not_built_are_an_environment_error_that_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTOR_LLAMACPP", str(tmp_path / "nowhere"))
    with pytest.raises(HostError, match="make llamacpp") as raised:
        programs()
    assert raised.value.code == 4


def test_a_program_of_another_size_than_recorded_is_no_build(build: Path) -> None:
    (build / "bin" / "llama-server").write_text("cut", "utf-8")
    with pytest.raises(HostError, match="not whole"):
        programs()


# The server's lifetime


def test_the_server_gets_exactly_this_file_and_a_private_socket(
    build: Path, pretend: Callable[..., dict[str, Any]]
) -> None:
    with llamacpp.serve(**pretend(loading=3), lora=build / "l.gguf"):
        argv = started(build)["argv"]
        socket = Path(argv[argv.index("--host") + 1])
        assert socket.parent.stat().st_mode & 0o077 == 0
    options = dict(itertools.pairwise(argv))
    assert options["-m"] == str(build / "a.gguf")
    assert options["--lora"] == str(build / "l.gguf")
    assert (options["-c"], options["-np"], options["-t"]) == ("128", "1", "1")
    assert {"--offline", "--no-webui"} <= set(argv)
    assert "--port" not in argv
    assert not socket.parent.exists()


def test_options_in_the_environment_do_not_reach_the_server(
    build: Path, pretend: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "99")
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with llamacpp.serve(**pretend()):
        assert not [name for name in started(build)["env"] if name.startswith("LLAMA_")]


def test_a_long_temporary_folder_does_not_break_the_socket(
    pretend: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with llamacpp.serve(**pretend()) as server:
        assert server.name == "llama.cpp"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_server_is_stopped_when_its_user_fails(
    build: Path, pretend: Callable[..., dict[str, Any]], error: type[BaseException]
) -> None:
    with pytest.raises(error), llamacpp.serve(**pretend()):
        raise error
    assert not alive(started(build)["pid"])


def test_a_server_that_ignores_sigterm_is_killed(
    build: Path, pretend: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp_process, "STOP_SECONDS", 0.2)
    with llamacpp.serve(**pretend(stubborn=True)):
        pass
    assert not alive(started(build)["pid"])


def test_ctrl_c_at_the_terminal_does_not_reach_the_server(build: Path, pretend: Callable[..., dict[str, Any]]) -> None:
    with llamacpp.serve(**pretend()):
        assert os.getpgid(started(build)["pid"]) != os.getpgid(0)


def test_a_server_that_ends_early_is_a_service_error_with_its_first_complaint(
    build: Path, pretend: Callable[..., dict[str, Any]]
) -> None:
    says = (
        "0.00.003 I srv load_model: loading model 'a.gguf'\n"
        "0.00.075.432 E llama_model_load: error loading model: tensor 'x' is not within the file bounds\n"
        "0.00.122.034 E srv  llama_server: exiting due to model loading error\n"
    )
    with pytest.raises(ServiceError) as raised, llamacpp.serve(**pretend(says=says, exit=1)):
        pass
    assert "a.gguf: llama_model_load: error loading model: tensor 'x' is not within" in raised.value.message
    assert str(build / "server.log") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_server_that_the_processor_cannot_run_is_an_environment_error(
    pretend: Callable[..., dict[str, Any]],
) -> None:
    with pytest.raises(HostError, match="lacks instructions"), llamacpp.serve(**pretend(signal=signal.SIGILL)):
        pass


def test_a_server_that_never_gets_ready_is_given_up(
    build: Path, pretend: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp, "LOAD_SECONDS", 0.5)
    with pytest.raises(ServiceError, match="has not loaded"), llamacpp.serve(**pretend(loading=10**6)):
        pass
    assert not alive(started(build)["pid"])


def kill_the_parent(arguments: dict[str, Any], pid_of_server: Callable[[], int]) -> int:
    """SIGKILL for a process inside `serve`; the id of the server that it had."""
    code = (
        "import sys, time; from pathlib import Path; from tutor.engines.llamacpp.server import serve\n"
        "with serve(Path(sys.argv[1]), context=128, threads=1, log=Path(sys.argv[2])):\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(arguments["gguf"]), str(arguments["log"])]
    with tempfile.TemporaryDirectory() as scratch:  # what a killed process cannot remove
        environment = {**os.environ, "TMPDIR": scratch}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "ready\n"
            server = pid_of_server()
            assert alive(server)
            parent.kill()
    return server


def test_the_server_dies_with_a_parent_that_is_killed(build: Path, pretend: Callable[..., dict[str, Any]]) -> None:
    server = kill_the_parent(pretend(), lambda: started(build)["pid"])
    assert within(5, lambda: not alive(server))


# Answers


def test_a_greedy_request_leaves_nothing_but_the_largest_logit(
    build: Path, pretend: Callable[..., dict[str, Any]]
) -> None:
    with llamacpp.serve(**pretend(events=[end("eos", 1)])) as server:
        server.answer(QUESTION, GREEDY)
    request = json.loads((build / "request.json").read_text("utf-8"))
    assert request["prompt"] == render(QUESTION)
    assert (request["temperature"], request["top_k"], request["repeat_penalty"]) == (0.0, 0, 1.0)
    assert request["samplers"] == ["penalties", "temperature"]
    assert (request["n_predict"], request["seed"], request["stop"]) == (24, 7, ["\nInstrucción:"])
    assert request["cache_prompt"] is False


def test_a_sampled_request_says_everything_that_the_recipe_says(
    build: Path, pretend: Callable[..., dict[str, Any]]
) -> None:
    with llamacpp.serve(**pretend(events=[end("eos", 1)])) as server:
        server.answer(QUESTION, SAMPLED)
    request = json.loads((build / "request.json").read_text("utf-8"))
    assert (request["temperature"], request["top_p"], request["top_k"]) == (0.003, 0.85, 40)
    assert request["samplers"] == ["penalties", "top_k", "top_p", "temperature"]
    # The whole sequence, as transformers' penalty sees it: the context is the longest that it can be.
    assert (request["repeat_penalty"], request["repeat_last_n"]) == (1.15, 128)
    assert request["cache_prompt"] is True


@pytest.mark.parametrize(
    ("stop_type", "finish", "tokens"), [("eos", "stop", 2), ("word", "stop", 3), ("limit", "length", 3)]
)
def test_the_end_of_an_answer_is_told_and_eos_is_not_counted(
    pretend: Callable[..., dict[str, Any]], stop_type: str, finish: str, tokens: int
) -> None:
    heard: list[str] = []
    events = [piece(" Un"), ":", piece(" tipo"), piece(""), end(stop_type, 3)]
    with llamacpp.serve(**pretend(events=events)) as server:
        answer = server.answer(QUESTION, GREEDY, heard.append)
    assert (answer.text, answer.finish, answer.tokens, answer.prompt_tokens) == (" Un tipo", finish, tokens, 11)
    assert answer.tokens_per_second == 95.5
    assert heard == [" Un", " tipo"]


def test_unusual_line_ends_inside_an_answer_do_not_cut_the_stream(pretend: Callable[..., dict[str, Any]]) -> None:
    text = " a\u2028b\u0085c\u2029d\x1ce 🎉\r\nf"
    with llamacpp.serve(**pretend(events=[piece(text), end("eos", 2)])) as server:
        assert server.answer(QUESTION, GREEDY).text == text


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        ({"events": [piece(" a")]}, "without the final event"),
        ({"events": []}, "without the final event"),
        ({"events": [piece(" a"), {"error": {"message": "out of slots"}}]}, "out of slots"),
        ({"events": [piece(" a"), "data: {"]}, "no JSON"),
        ({"events": [end("none", 2)]}, "without the final event"),
        ({"status": 400, "events": ['{"error": {"message": "too long"}}']}, "too long"),
        ({"status": 500, "events": ["<html>"]}, "<html>"),
    ],
)
def test_a_stream_that_does_not_end_well_is_a_service_error(
    pretend: Callable[..., dict[str, Any]], plan: dict[str, Any], what: str
) -> None:
    with llamacpp.serve(**pretend(**plan)) as server, pytest.raises(ServiceError, match=what) as raised:
        server.answer(QUESTION, GREEDY)
    assert raised.value.code == 6


def test_a_server_that_dies_in_an_answer_is_a_service_error(
    build: Path, pretend: Callable[..., dict[str, Any]]
) -> None:
    def die(_: str) -> None:
        os.kill(started(build)["pid"], signal.SIGKILL)

    plan = pretend(events=[piece(" a")] * 50, pause=0.05)
    with llamacpp.serve(**plan) as server, pytest.raises(ServiceError):
        server.answer(QUESTION, GREEDY, die)


def test_ctrl_c_in_an_answer_hangs_up_and_the_server_lives_on(
    build: Path, pretend: Callable[..., dict[str, Any]]
) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with llamacpp.serve(**pretend(events=[piece(" a")] * 500, pause=0.01)) as server:
        with pytest.raises(KeyboardInterrupt):
            server.answer(QUESTION, GREEDY, interrupt)
        assert within(5, (build / "hung_up").exists)
        assert alive(started(build)["pid"])


# Quantize


def write_gguf(path: Path, file_type: int | None) -> Path:
    import numpy as np

    writer = GGUFWriter(path, "llama")
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


COPY = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])\n"


def test_a_quantized_file_appears_under_its_name_only_when_whole(build: Path, tmp_path: Path) -> None:
    script(build, "llama-quantize", COPY)
    source, target = write_gguf(tmp_path / "a.gguf", 1), tmp_path / "q.gguf"
    quantize(source, target, "Q4_K_M", 1)
    assert target.read_bytes() == source.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.gguf*")) == ["a.gguf", "q.gguf"]


@pytest.mark.parametrize("ending", ["sys.exit(3)", "os.kill(os.getpid(), 9)"])
def test_a_failed_quantization_leaves_the_old_file_and_no_half(build: Path, tmp_path: Path, ending: str) -> None:
    script(build, "llama-quantize", f"import os, sys; open(sys.argv[2], 'w').write('half')\n{ending}")
    target = tmp_path / "q.gguf"
    target.write_text("old", "utf-8")
    with pytest.raises((ArtifactError, HostError)):
        quantize(write_gguf(tmp_path / "a.gguf", 1), target, "Q8_0", 1)
    assert target.read_text("utf-8") == "old"
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_is_told_as_such(build: Path, tmp_path: Path) -> None:
    script(build, "llama-quantize", "import sys; print('basic_ios::clear: iostream error'); sys.exit(1)")
    with pytest.raises(HostError, match="disk is full"):
        quantize(write_gguf(tmp_path / "a.gguf", 1), tmp_path / "q.gguf", "Q8_0", 1)


def test_the_quantizer_s_own_reason_is_in_the_error(build: Path, tmp_path: Path) -> None:
    said = "quantizing 'a' to 'b'\\nfailed to quantize: tensor 'x' is odd\\nllama_quantize: failed to quantize model"
    script(build, "llama-quantize", f"import sys; print({said!r}.replace('\\\\n', chr(10))); sys.exit(1)")
    with pytest.raises(ArtifactError, match="to Q8_0: failed to quantize: tensor 'x' is odd"):
        quantize(write_gguf(tmp_path / "a.gguf", 1), tmp_path / "q.gguf", "Q8_0", 1)


@pytest.mark.parametrize("file_type", [2, 7, 15, 17])
def test_a_quantized_source_is_refused_in_the_specification_s_words(
    build: Path, tmp_path: Path, file_type: int
) -> None:
    with pytest.raises(RecipeError, match=r"already quantized .* FP16/FP32 \(specification, 7\.2\)") as raised:
        quantize(write_gguf(tmp_path / "a.gguf", file_type), tmp_path / "q.gguf", "Q4_K_M", 1)
    assert raised.value.code == 2


@pytest.mark.parametrize("file_type", [0, 1, 32])
def test_sixteen_and_thirty_two_bits_can_be_quantized(build: Path, tmp_path: Path, file_type: int) -> None:
    script(build, "llama-quantize", COPY)
    quantize(write_gguf(tmp_path / "a.gguf", file_type), tmp_path / "q.gguf", "Q8_0", 1)


def test_a_source_that_does_not_say_what_it_is_is_refused(build: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="GUESSED"):
        quantize(write_gguf(tmp_path / "a.gguf", None), tmp_path / "q.gguf", "Q8_0", 1)


def test_an_unknown_quantization_is_a_recipe_error(build: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'Q9_X'"):
        quantize(write_gguf(tmp_path / "a.gguf", 1), tmp_path / "q.gguf", "Q9_X", 1)


def test_a_matrix_is_named_without_its_folder_and_types_by_whole_names(build: Path, tmp_path: Path) -> None:
    """The file keeps the name as it is given: two build folders must give the same bytes."""
    script(build, "llama-quantize", "import json, os, sys; open(sys.argv[-3], 'w').write(json.dumps(sys.argv[1:]))")
    source, target = write_gguf(tmp_path / "a.gguf", 1), tmp_path / "q.gguf"
    (tmp_path / "m.imatrix").touch()
    types = {"blk.1.attn_q.weight": "Q8_0"}
    quantize(source, target, "Q4_K_M", 3, matrix=tmp_path / "m.imatrix", types=types)
    given = json.loads(target.read_text("utf-8"))
    assert given[:4] == ["--imatrix", "m.imatrix", "--tensor-type", r"^blk\.1\.attn_q\.weight$=q8_0"]
    assert (given[4], given[6:]) == (str(source), ["Q4_K_M", "3"])


def test_relative_paths_reach_the_quantizer_whole(build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(build, "llama-quantize", "import shutil, sys; shutil.copy(*sys.argv[-4:-2])")
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "a.gguf", 1)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "m.imatrix").touch()
    quantize(Path("a.gguf"), Path("q.gguf"), "Q4_K_M", 1, matrix=Path("sub/m.imatrix"))
    assert (tmp_path / "q.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


@pytest.mark.parametrize(("tokens", "piece"), [(100_000, 512), (1024, 512), (1023, 256), (70, 32), (3, 32)])
def test_a_short_text_is_weighed_in_shorter_pieces(build: Path, tmp_path: Path, tokens: int, piece: int) -> None:
    writes = "import json, sys; a = sys.argv; open(a[a.index('-o') + 1], 'w').write(json.dumps(a[1:]))"
    script(build, "llama-imatrix", writes)
    (tmp_path / "train.txt").touch()
    imatrix(tmp_path / "a.gguf", tmp_path / "train.txt", tmp_path / "a.imatrix", tokens, 2)
    given = json.loads((tmp_path / "a.imatrix").read_text("utf-8"))
    options = dict(itertools.pairwise(given))
    assert (options["-f"], options["-c"], options["-t"]) == ("train.txt", str(piece), "2")
    assert {"--parse-special", "--no-ppl"} <= set(given)
    assert not list(tmp_path.glob("*.partial"))


def test_a_matrix_that_fails_leaves_nothing(build: Path, tmp_path: Path) -> None:
    script(build, "llama-imatrix", "import sys; print('error: you need at least 64 tokens'); sys.exit(1)")
    with pytest.raises(ArtifactError, match=r"importance matrix.*64 tokens"):
        imatrix(tmp_path / "a.gguf", tmp_path / "train.txt", tmp_path / "a.imatrix", 1, 1)
    assert list(tmp_path.glob("*imatrix*")) == []


# Convert


@pytest.fixture
def converter(build: Path) -> Callable[[str], Path]:
    """A converter that recognises what it is told, or nothing; the build's folder."""

    def knows(name: str) -> Path:
        for folder in ("conversion", "gguf-py"):
            (build / folder).mkdir()
        (build / "convert_hf_to_gguf.py").write_text(CONVERTER, "utf-8")
        (build / "conversion" / "base.py").write_text(RECOGNISER, "utf-8")
        (build / "conversion" / "knows.txt").write_text(name, "utf-8")
        (build / "gguf-py" / "gguf.py").touch()
        return build

    return knows


def converted(tmp_path: Path, pre: str, says: dict[str, str] | None = None) -> dict[str, Any]:
    target = tmp_path / "tutor-F16.gguf"
    to_gguf(tmp_path, target, pre, says)
    return json.loads(target.read_text("utf-8"))


def test_a_tokenizer_that_the_converter_does_not_know_gets_our_name(
    converter: Callable[[str], Path], tmp_path: Path
) -> None:
    build = converter("")
    given = converted(tmp_path, "llama-bpe")
    assert (given["pre"], given["outtype"], given["model_name"]) == ("llama-bpe", "f16", "tutor")
    assert given["gguf"] == str(build / "gguf-py" / "gguf.py")
    assert not list(tmp_path.glob("*.partial"))


def test_what_the_file_shall_say_stands_behind_what_the_converter_says(
    converter: Callable[[str], Path], tmp_path: Path
) -> None:
    converter("")
    given = converted(tmp_path, "llama-bpe", {"tutor.base": "año «'\"", "tutor.version": "1"})
    assert list(given["says"].items()) == [("theirs", "False"), ("tutor.base", "año «'\""), ("tutor.version", "1")]
    assert converted(tmp_path, "llama-bpe")["says"] == {"theirs": "False"}


@pytest.mark.parametrize(("known", "pre"), [("smollm", "smollm"), ("starcoder", "smollm"), ("falcon3", "llama-bpe")])
def test_a_name_that_the_converter_knows_wins_over_ours_for_the_same_splitting(
    converter: Callable[[str], Path], tmp_path: Path, known: str, pre: str
) -> None:
    converter(known)
    assert converted(tmp_path, pre)["pre"] == known


@pytest.mark.parametrize("pre", ["llama-bpe", ""])
def test_a_name_that_the_converter_knows_and_tokenizer_json_denies_is_an_error(
    converter: Callable[[str], Path], tmp_path: Path, pre: str
) -> None:
    converter("smollm")
    with pytest.raises(ArtifactError, match="knows this tokenizer as 'smollm'"):
        converted(tmp_path, pre)
    assert not list(tmp_path.glob("*.gguf*"))


def test_an_unknown_tokenizer_without_a_name_says_hash_pin_and_question(
    converter: Callable[[str], Path], tmp_path: Path
) -> None:
    converter("")
    with pytest.raises(ArtifactError) as raised:
        converted(tmp_path, "")
    assert raised.value.code == 5
    for part in ("ab" * 32, VERSION, "tokenizer changed?"):
        assert part in str(raised.value)


def test_a_converter_that_fails_is_quoted_by_its_last_line(converter: Callable[[str], Path], tmp_path: Path) -> None:
    converter("broken")
    with pytest.raises(ArtifactError, match=r"ValueError: Can not map tensor '.*absmax'") as raised:
        converted(tmp_path, "llama-bpe")
    assert "\n" not in str(raised.value)


# Score

SCORER = """
import json, sys
for line in sys.stdin:
    n, *ids = map(int, line.split())
    answer = ids[n:]
    print(json.dumps({"logprobs": [-i / 8 for i in answer], "top": [[[i, -0.5]] for i in answer]}), flush=True)
    print("a complaint " * 20, file=sys.stderr)
"""


def test_scores_come_in_the_rows_order_however_many_there_are(build: Path) -> None:
    script(build, "tutor-score", SCORER)
    rows = [([1, 2, 3], [row % 50, 8]) for row in range(5000)]
    scores = score(build / "a.gguf", rows, threads=1)
    assert [item.logprobs for item in scores] == [(-(row % 50) / 8, -1.0) for row in range(5000)]
    assert scores[9].top == (((9, -0.5),), ((8, -0.5),))


def test_no_rows_need_no_program(build: Path) -> None:
    script(build, "tutor-score", "raise SystemExit(1)")
    assert score(build / "a.gguf", [], threads=1) == []


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('print(\'{"logprobs":[-inf],"top":[[[1,nan]]]}\')', "not finite"),
        (
            "import sys; sys.stderr.write('tutor-score: token id 9 is outside the vocabulary, invalid'); sys.exit(1)",
            "id 9",
        ),
        ('print(\'{"logprobs":[-1.0],"top":[[[1,-1.0]]]}\')', "other scores"),
    ],
)
def test_scores_that_are_missing_or_no_numbers_are_an_error(build: Path, text: str, what: str) -> None:
    script(build, "tutor-score", text)
    with pytest.raises(ArtifactError, match=what):
        score(build / "a.gguf", [([1], [2]), ([1], [2])], threads=1)


COMPARER = """
import json, sys
options = dict(zip(sys.argv[4::2], sys.argv[5::2]))
if "--keep" in options:
    open(options["--keep"], "w").write("distributions")
for line in sys.stdin:
    n, *ids = map(int, line.split())
    count = len(ids) - n
    score = {"logprobs": [-1.0] * count, "top": [[[1, -0.5]]] * count}
    if "--against" in options:
        score |= {"kl": [0.25] * count, "same": [0, 1, 1, 1][:count]}
    print(json.dumps(score))
"""


def test_the_first_model_writes_the_reference_and_the_next_is_compared_with_it(build: Path, tmp_path: Path) -> None:
    script(build, "tutor-score", COMPARER)
    reference, rows = tmp_path / "reference.bin", [([1], [2, 3])]
    (first,) = score(build / "a.gguf", rows, threads=1, reference=reference)
    (second,) = score(build / "b.gguf", rows, threads=1, reference=reference)
    assert (first.kl, first.same) == ((), ())
    assert (second.kl, second.same) == ((0.25, 0.25), (False, True))


def test_a_comparison_that_is_missing_is_an_error(build: Path, tmp_path: Path) -> None:
    script(build, "tutor-score", COMPARER.replace('if "--against"', 'if "--never"'))
    (tmp_path / "reference.bin").touch()
    with pytest.raises(ArtifactError, match="other scores"):
        score(build / "a.gguf", [([1], [2])], threads=1, reference=tmp_path / "reference.bin")


# Pre-tokenizers

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2_BYTES = {**BYTES, "use_regex": True}


def splits(*patterns: str) -> dict[str, Any]:
    step = {"type": "Split", "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [*({**step, "pattern": {"Regex": item}} for item in patterns), BYTES]}


def digits(*, individual: bool) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": individual}, GPT2_BYTES]}


def tokenizer_json(path: Path, splitter: Any, **other: Any) -> Path:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3}, "merges": [["a", "b"]]} | other.pop(
        "model", {}
    )
    tokenizer = {"added_tokens": [{"id": 3, "content": "<s>"}], "normalizer": None, "pre_tokenizer": splitter}
    path.write_text(json.dumps({**tokenizer, "model": model, **other}), "utf-8")
    return path


@pytest.mark.parametrize(
    ("splitter", "name"),
    [
        (splits(LLAMA3), "llama-bpe"),
        (splits(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), "qwen2"),
        (GPT2_BYTES, "gpt-2"),
        (splits(GPT2), "gpt-2"),
        (digits(individual=True), "smollm"),
    ],
)
def test_a_splitting_that_llama_cpp_has_gets_its_name(tmp_path: Path, splitter: Any, name: str) -> None:
    assert pre_tokenizer_name(tokenizer_json(tmp_path / "t.json", splitter)) == name


@pytest.mark.parametrize(
    ("splitter", "other", "what"),
    [
        (splits(LLAMA3 + "|x"), {}, r"\|x"),
        (splits(LLAMA3, LLAMA3), {}, "splits by"),
        (BYTES, {}, "splits by"),
        (None, {}, "splits by"),
        ({"type": "Whitespace"}, {}, "Whitespace"),
        ({**GPT2_BYTES, "add_prefix_space": True}, {}, "add_prefix_space"),
        ({"type": "ByteLevel"}, {}, "splits by"),
        (digits(individual=False), {}, "Digits"),
        ({**splits(LLAMA3), "pretokenizers": splits(LLAMA3)["pretokenizers"][:1]}, {}, "splits by"),
        (splits(LLAMA3), {"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        (splits(LLAMA3), {"model": {"type": "WordPiece"}}, "WordPiece"),
        (splits(LLAMA3), {"model": {"merges": []}}, "ignore_merges False"),
        (GPT2_BYTES, {"model": {"merges": [], "ignore_merges": True}}, "ignore_merges True"),
    ],
)
def test_a_splitting_without_a_name_is_refused_and_shown(
    tmp_path: Path, splitter: Any, other: dict[str, Any], what: str
) -> None:
    with pytest.raises(ArtifactError, match=what) as raised:
        pre_tokenizer_name(tokenizer_json(tmp_path / "t.json", splitter, **other))
    assert raised.value.code == 5


def test_llama_3_s_own_tokenizer_that_ignores_merges_needs_none(tmp_path: Path) -> None:
    path = tokenizer_json(tmp_path / "t.json", splits(LLAMA3), model={"merges": [], "ignore_merges": True})
    assert pre_tokenizer_name(path) == "llama-bpe"


@pytest.mark.parametrize(
    ("splitter", "normalizer"),
    [
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}, None),
        (None, {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}),
    ],
)
def test_sentencepiece_has_no_pre_tokenizer(tmp_path: Path, splitter: Any, normalizer: Any) -> None:
    path = tokenizer_json(tmp_path / "t.json", splitter, normalizer=normalizer, model={"byte_fallback": True})
    assert pre_tokenizer_name(path) == ""


def test_a_folder_with_only_a_sentencepiece_file_has_no_pre_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    assert pre_tokenizer_name(tmp_path / "tokenizer.json") == ""


# The pinned build


def smollm_splitter() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])


@pytest.fixture(scope="module")
def tiny(real: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama's folder, with its F16 GGUF beside the weights."""
    folder = make_tiny(tmp_path_factory.mktemp("tiny"), llama3_splitter())
    to_gguf(folder, folder / "tiny-F16.gguf", pre_tokenizer_name(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[llamacpp.LlamaServer]:
    with llamacpp.serve(tiny / "tiny-F16.gguf", context=256, threads=1, log=tiny / "server.log") as running:
        yield running


@pytest.mark.llamacpp
@pytest.mark.parametrize("text", TEXTS)
def test_the_server_reads_a_text_as_transformers_does(server: llamacpp.LlamaServer, tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert server.tokenize(text) == ids
    assert ids[0] == tokenizer.bos_token_id


@pytest.mark.llamacpp
@pytest.mark.parametrize("bos", [True, False])
def test_another_splitting_is_read_as_transformers_does_too(real: None, tmp_path: Path, bos: bool) -> None:  # noqa: FBT001
    from transformers import AutoTokenizer

    folder = make_tiny(tmp_path, smollm_splitter(), bos=bos)
    to_gguf(folder, folder / "a-F16.gguf", pre_tokenizer_name(folder / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with llamacpp.serve(folder / "a-F16.gguf", context=64, threads=1, log=folder / "log") as server:
        assert [server.tokenize(text) for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


def argmax_answer(model: Any, ids: list[int], tokens: int) -> list[int]:
    """Greedy ids by plain forward passes, so that no generation setting of any library has a say."""
    import torch
    from support.tolerances import half_error

    ids = list(ids)
    start = len(ids)
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(torch.tensor([ids])).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            bound = half_error(model.config) * logits.abs().max().item()
            assert best - second > bound, "which token is the best is no matter of rounding"
            ids.append(int(logits.argmax()))
    return ids[start:]


@pytest.mark.llamacpp
def test_a_greedy_answer_is_the_argmax_of_transformers(
    server: llamacpp.LlamaServer, model: Any, tokenizer: Any
) -> None:
    ids = argmax_answer(model, tokenizer(render(QUESTION))["input_ids"], 12)
    assert len(set(ids)) > 3
    answer = server.answer(QUESTION, replace(GREEDY, max_new_tokens=12, stops=()))
    assert answer.text == tokenizer.decode(ids)
    assert (answer.finish, answer.tokens) == ("length", 12)
    assert answer.prompt_tokens == len(tokenizer(render(QUESTION))["input_ids"])


@pytest.mark.llamacpp
def test_a_repetition_penalty_is_that_of_transformers(server: llamacpp.LlamaServer, model: Any, tokenizer: Any) -> None:
    import torch

    prompt = torch.tensor([tokenizer(render(QUESTION))["input_ids"]])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=12,
        repetition_penalty=1.9,
        pad_token_id=tokenizer.pad_token_id,
    )
    generation = replace(GREEDY, max_new_tokens=12, repetition_penalty=1.9, stops=())
    expected = tokenizer.decode(out[0, prompt.shape[1] :])
    assert server.answer(QUESTION, generation).text == expected
    assert server.answer(QUESTION, replace(generation, repetition_penalty=1.0)).text != expected


@pytest.mark.llamacpp
def test_scores_are_the_log_softmax_of_transformers(tiny: Path, model: Any, tokenizer: Any) -> None:
    import torch
    from support.tolerances import half_error, largest_logit

    rows = [(tokenizer(text)["input_ids"], tokenizer(" sí", add_special_tokens=False)["input_ids"]) for text in TEXTS]
    bound = half_error(model.config) * largest_logit(model, rows)
    scores = score(tiny / "tiny-F16.gguf", rows, threads=2, top=3)
    for (prompt, answer), scored in zip(rows, scores, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        best, chosen = expected.max(-1).values, [place[0][0] for place in scored.top]
        assert scored.logprobs == pytest.approx(expected[range(len(answer)), answer].tolist(), abs=bound)
        # The best token, or one that is no further below it than rounding moves two of them.
        assert (best - expected[range(len(answer)), chosen]).max() <= 2 * bound
        assert [place[0][1] for place in scored.top] == pytest.approx(best.tolist(), abs=bound)


@pytest.mark.llamacpp
def test_divergence_is_that_of_the_whole_distributions(tiny: Path, tmp_path: Path) -> None:
    import numpy as np

    quantize(tiny / "tiny-F16.gguf", tmp_path / "q.gguf", "Q4_0", 1)
    rows, files = [([5, 6, 7], [8, 9, 10]), ([7], [12])], (tiny / "tiny-F16.gguf", tmp_path / "q.gguf")
    whole = []
    for path in files:
        vocabulary = len(read_gguf(path).fields["tokenizer.ggml.tokens"])
        places = [place for item in score(path, rows, threads=1, top=vocabulary) for place in item.top]
        whole.append(np.array([[logprob for _, logprob in sorted(place)] for place in places]))
    expected = (np.exp(whole[0]) * (whole[0] - whole[1])).sum(-1)
    reference = tmp_path / "reference.bin"
    score(files[0], rows, threads=1, reference=reference)
    assert reference.stat().st_size == 16 + reference_bytes(rows, vocabulary)
    itself, other = (score(path, rows, threads=1, reference=reference) for path in files)
    assert [value for item in other for value in item.kl] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
    assert min(value for item in other for value in item.kl) > 1e-4
    same = (whole[0].argmax(-1) == whole[1].argmax(-1)).tolist()
    assert [value for item in other for value in item.same] == same
    assert max(abs(value) for item in itself for value in item.kl) < 1e-5
    assert all(value for item in itself for value in item.same)


@pytest.mark.llamacpp
def test_a_reference_of_other_rows_is_refused(tiny: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference.bin"
    score(tiny / "tiny-F16.gguf", [([5], [6, 7])], threads=1, reference=reference)
    with pytest.raises(ArtifactError, match="not of these rows"):
        score(tiny / "tiny-F16.gguf", [([5], [6])], threads=1, reference=reference)
    reference.write_bytes(reference.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="cut short"):
        score(tiny / "tiny-F16.gguf", [([5], [6, 7])], threads=1, reference=reference)


@pytest.mark.llamacpp
def test_speed_and_memory_are_those_of_the_running_server(server: llamacpp.LlamaServer, tiny: Path) -> None:
    speed = server.speed(list(range(5, 105)), 16)
    assert speed.prompt > 0 < speed.generation
    memory = server.peak_memory()
    assert memory is not None
    assert memory > (tiny / "tiny-F16.gguf").stat().st_size


@pytest.mark.llamacpp
def test_the_recipe_s_quantizations_are_the_quantizer_s_own(real: None) -> None:
    done = subprocess.run([programs().quantize, "--help"], capture_output=True, text=True, check=False)
    listed = re.findall(r"^ +\d+ +or +(\w+) ", done.stdout, re.MULTILINE)
    assert len(listed) > 30
    assert {*KINDS, *SECOND_NAMES, *NOT_MADE} >= set(listed)
    assert set(KINDS) <= set(listed)


@pytest.mark.llamacpp
def test_what_needs_a_matrix_is_refused_without_one_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    def makes(kind: str) -> bool:
        try:
            quantize(tiny / "tiny-F16.gguf", tmp_path / "q.gguf", kind, 1)
        except ArtifactError:
            return False
        return True

    refused = {kind for kind in KINDS if not makes(kind)}
    assert refused <= set(NEED_IMATRIX)


@pytest.mark.llamacpp
def test_an_id_outside_the_vocabulary_cannot_be_scored(tiny: Path) -> None:
    with pytest.raises(ArtifactError, match="outside the vocabulary"):
        score(tiny / "tiny-F16.gguf", [([1], [100000])], threads=1)


@pytest.mark.llamacpp
def test_a_stop_text_ends_an_answer_and_is_not_in_it(server: llamacpp.LlamaServer, model: Any, tokenizer: Any) -> None:
    text = tokenizer.decode(argmax_answer(model, tokenizer(render(QUESTION))["input_ids"], 12))
    stop = text[8:11]
    assert len(stop) == 3
    answer = server.answer(QUESTION, replace(GREEDY, stops=("never said", stop)))
    assert answer.finish == "stop"
    assert answer.text == text.partition(stop)[0]


@pytest.mark.llamacpp
def test_the_same_question_and_seed_get_the_same_answer(server: llamacpp.LlamaServer) -> None:
    sampled = replace(SAMPLED, temperature=1.0, max_new_tokens=20)
    first, second, other = (server.answer(QUESTION, replace(sampled, seed=seed)).text for seed in (1, 1, 2))
    assert first == second != other


@pytest.mark.llamacpp
def test_an_interrupted_answer_leaves_the_server_free_for_the_next(server: llamacpp.LlamaServer) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    endless = replace(GREEDY, max_new_tokens=200, stops=())
    with pytest.raises(KeyboardInterrupt):
        server.answer(QUESTION, endless, interrupt)
    assert server.answer(QUESTION, replace(GREEDY, max_new_tokens=3)).tokens <= 3


@pytest.mark.llamacpp
def test_a_prompt_longer_than_the_context_is_a_service_error(server: llamacpp.LlamaServer) -> None:
    with pytest.raises(ServiceError, match="exceeds the available context size"):
        server.answer(conversation("una pregunta larga " * 200), GREEDY)


@pytest.mark.llamacpp
def test_a_file_that_is_no_gguf_says_so_at_once(real: None, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("<html>", "utf-8")
    with (
        pytest.raises(ServiceError, match="invalid magic"),
        llamacpp.serve(tmp_path / "a.gguf", context=64, threads=1, log=tmp_path / "log"),
    ):
        pass


@pytest.mark.llamacpp
def test_a_killed_parent_leaves_no_llama_server(tiny: Path) -> None:
    def server_pid() -> int:
        words = {path: path.read_bytes().split(b"\0") for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()}
        gguf = str(tiny / "tiny-F16.gguf").encode()
        (found,) = (path for path, line in words.items() if b"llama-server" in line[0] and {gguf, b"128"} <= {*line})
        return int(found.parent.name)

    pid = kill_the_parent({"gguf": tiny / "tiny-F16.gguf", "log": tiny / "killed.log"}, server_pid)
    assert within(5, lambda: not alive(pid))
