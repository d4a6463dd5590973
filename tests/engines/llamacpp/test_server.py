"""engines/llamacpp/server.py, with a fake server and (marked llamacpp) with the pinned build."""

import itertools
import json
import os
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
from support.fakes.llamacpp import SERVER, script
from support.models.random_llama import TEXTS

from tutor.engines.llamacpp import process
from tutor.engines.llamacpp import server as server_module
from tutor.engines.llamacpp.server import LlamaServer, serve
from tutor.engines.protocol import Generation
from tutor.errors import HostError, ServiceError
from tutor.prompt.messages import conversation
from tutor.prompt.tutor_format import render

GREEDY = Generation(max_new_tokens=24, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=7)
SAMPLED = Generation(max_new_tokens=9, temperature=0.003, top_p=0.85, repetition_penalty=1.15, seed=7)
QUESTION = conversation("¿Qué es un tipo?")


@pytest.fixture
def fake_server(build: Path) -> Callable[..., dict[str, Any]]:
    """Make a llama-server that follows a plan; return the arguments of `serve`."""

    def plan(**steps: Any) -> dict[str, Any]:
        script(build, "llama-server", SERVER)
        (build / "plan.json").write_text(json.dumps(steps), "utf-8")
        return {"gguf": build / "a.gguf", "context": 128, "threads": 1, "log": build / "server.log"}

    return plan


def started(build: Path) -> dict[str, Any]:
    return json.loads((build / "started.json").read_text("utf-8"))


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
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


# Start and stop


def test_server_gets_its_file_and_a_private_socket(build: Path, fake_server: Callable[..., dict[str, Any]]) -> None:
    with serve(**fake_server(loading=3)):
        argv = started(build)["argv"]
        socket = Path(argv[argv.index("--host") + 1])
        assert socket.parent.stat().st_mode & 0o077 == 0
    options = dict(itertools.pairwise(argv))
    assert options["-m"] == str(build / "a.gguf")
    assert (options["-c"], options["-np"], options["-t"]) == ("128", "1", "1")
    assert {"--offline", "--no-webui"} <= set(argv)
    assert "--port" not in argv
    assert not socket.parent.exists()


def test_environment_options_do_not_reach_server(
    build: Path, fake_server: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "99")
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with serve(**fake_server()):
        assert not [name for name in started(build)["env"] if name.startswith("LLAMA_")]


def test_socket_in_long_temporary_folder_works(
    fake_server: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with serve(**fake_server()) as server:
        assert server.name == "llama.cpp"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_server_is_stopped_on_exception(
    build: Path, fake_server: Callable[..., dict[str, Any]], error: type[BaseException]
) -> None:
    with pytest.raises(error), serve(**fake_server()):
        raise error
    assert not alive(started(build)["pid"])


def test_server_ignoring_sigterm_is_killed(
    build: Path, fake_server: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STOP_SECONDS", 0.2)
    with serve(**fake_server(stubborn=True)):
        pass
    assert not alive(started(build)["pid"])


def test_terminal_ctrl_c_does_not_reach_server(build: Path, fake_server: Callable[..., dict[str, Any]]) -> None:
    with serve(**fake_server()):
        assert os.getpgid(started(build)["pid"]) != os.getpgid(0)


def test_server_ending_early_raises_with_its_first_error(
    build: Path, fake_server: Callable[..., dict[str, Any]]
) -> None:
    output = (
        "0.00.003 I srv load_model: loading model 'a.gguf'\n"
        "0.00.075.432 E llama_model_load: error loading model: tensor 'x' is not within the file bounds\n"
        "0.00.122.034 E srv  llama_server: exiting due to model loading error\n"
    )
    with pytest.raises(ServiceError) as raised, serve(**fake_server(output=output, exit=1)):
        pass
    assert "a.gguf: llama_model_load: error loading model: tensor 'x' is not within" in raised.value.message
    assert str(build / "server.log") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_server_ended_by_sigill_raises_host_error(
    fake_server: Callable[..., dict[str, Any]],
) -> None:
    with pytest.raises(HostError, match="lacks instructions"), serve(**fake_server(signal=signal.SIGILL)):
        pass


def test_server_never_ready_is_stopped_after_timeout(
    build: Path, fake_server: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "LOAD_SECONDS", 0.5)
    with pytest.raises(ServiceError, match="has not loaded"), serve(**fake_server(loading=10**6)):
        pass
    assert not alive(started(build)["pid"])


def kill_the_parent(arguments: dict[str, Any], pid_of_server: Callable[[], int]) -> int:
    """Kill a process inside `serve`; return the id of its server."""
    code = (
        "import sys, time; from pathlib import Path; from tutor.engines.llamacpp.server import serve\n"
        "with serve(Path(sys.argv[1]), context=128, threads=1, log=Path(sys.argv[2])):\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(arguments["gguf"]), str(arguments["log"])]
    with tempfile.TemporaryDirectory() as scratch:  # a killed process cannot remove its socket
        environment = {**os.environ, "TMPDIR": scratch}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "ready\n"
            server = pid_of_server()
            assert alive(server)
            parent.kill()
    return server


def test_server_is_killed_with_its_parent(build: Path, fake_server: Callable[..., dict[str, Any]]) -> None:
    server = kill_the_parent(fake_server(), lambda: started(build)["pid"])
    assert within(5, lambda: not alive(server))


# Answers


def test_greedy_request_disables_sampling(build: Path, fake_server: Callable[..., dict[str, Any]]) -> None:
    with serve(**fake_server(events=[end("eos", 1)])) as server:
        server.answer(QUESTION, GREEDY)
    request = json.loads((build / "request.json").read_text("utf-8"))
    assert request["prompt"] == render(QUESTION)
    assert (request["temperature"], request["top_k"], request["repeat_penalty"]) == (0.0, 0, 1.0)
    assert request["samplers"] == ["penalties", "temperature"]
    assert (request["n_predict"], request["seed"], request["stop"]) == (24, 7, ["\nInstrucción:"])
    assert request["cache_prompt"] is False


def test_sampled_request_has_all_settings_of_the_recipe(
    build: Path, fake_server: Callable[..., dict[str, Any]]
) -> None:
    with serve(**fake_server(events=[end("eos", 1)])) as server:
        server.answer(QUESTION, SAMPLED)
    request = json.loads((build / "request.json").read_text("utf-8"))
    assert (request["temperature"], request["top_p"], request["top_k"]) == (0.003, 0.85, 40)
    assert request["samplers"] == ["penalties", "top_k", "top_p", "temperature"]
    # The full sequence, as for the penalty of transformers: at most the context.
    assert (request["repeat_penalty"], request["repeat_last_n"]) == (1.15, 128)
    assert request["cache_prompt"] is True


@pytest.mark.parametrize(
    ("stop_type", "finish", "tokens"), [("eos", "eos", 2), ("word", "stop", 3), ("limit", "length", 3)]
)
def test_answer_has_finish_reason_and_token_count_without_eos(
    fake_server: Callable[..., dict[str, Any]], stop_type: str, finish: str, tokens: int
) -> None:
    received: list[str] = []
    events = [piece(" Un"), ":", piece(" tipo"), piece(""), end(stop_type, 3)]
    with serve(**fake_server(events=events)) as server:
        answer = server.answer(QUESTION, GREEDY, received.append)
    assert (answer.text, answer.finish, answer.tokens, answer.prompt_tokens) == (" Un tipo", finish, tokens, 11)
    assert answer.tokens_per_second == 95.5
    assert received == [" Un", " tipo"]


def test_unicode_line_separators_do_not_split_events(fake_server: Callable[..., dict[str, Any]]) -> None:
    text = " a\u2028b\u0085c\u2029d\x1ce 🎉\r\nf"
    with serve(**fake_server(events=[piece(text), end("eos", 2)])) as server:
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
def test_incomplete_stream_raises_service_error(
    fake_server: Callable[..., dict[str, Any]], plan: dict[str, Any], what: str
) -> None:
    with serve(**fake_server(**plan)) as server, pytest.raises(ServiceError, match=what) as raised:
        server.answer(QUESTION, GREEDY)
    assert raised.value.code == 6


def test_server_killed_during_answer_raises_service_error(
    build: Path, fake_server: Callable[..., dict[str, Any]]
) -> None:
    def die(_: str) -> None:
        os.kill(started(build)["pid"], signal.SIGKILL)

    plan = fake_server(events=[piece(" a")] * 50, pause=0.05)
    with serve(**plan) as server, pytest.raises(ServiceError):
        server.answer(QUESTION, GREEDY, die)


def test_ctrl_c_during_answer_disconnects_and_keeps_server(
    build: Path, fake_server: Callable[..., dict[str, Any]]
) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with serve(**fake_server(events=[piece(" a")] * 500, pause=0.01)) as server:
        with pytest.raises(KeyboardInterrupt):
            server.answer(QUESTION, GREEDY, interrupt)
        assert within(5, (build / "hung_up").exists)
        assert alive(started(build)["pid"])


# The pinned build


@pytest.fixture(scope="module")
def server(random_llama: Path) -> Iterator[LlamaServer]:
    with serve(random_llama / "tiny-F16.gguf", context=256, threads=1, log=random_llama / "server.log") as running:
        yield running


@pytest.mark.llamacpp
@pytest.mark.parametrize("text", TEXTS)
def test_server_tokenizes_as_transformers(server: LlamaServer, tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert server.tokenize(text) == ids
    assert ids[0] == tokenizer.bos_token_id


def argmax_answer(model: Any, ids: list[int], tokens: int) -> list[int]:
    """Greedy ids by plain forward passes, so that no generation setting of a library applies."""
    import torch
    from support.tolerances import half_error

    ids = list(ids)
    start = len(ids)
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(torch.tensor([ids])).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            bound = half_error(model.config) * logits.abs().max().item()
            assert best - second > bound, "rounding must not decide which token is the best"
            ids.append(int(logits.argmax()))
    return ids[start:]


@pytest.mark.llamacpp
def test_greedy_answer_is_argmax_of_transformers(server: LlamaServer, model: Any, tokenizer: Any) -> None:
    ids = argmax_answer(model, tokenizer(render(QUESTION))["input_ids"], 12)
    assert len(set(ids)) > 3
    answer = server.answer(QUESTION, replace(GREEDY, max_new_tokens=12, stops=()))
    assert answer.text == tokenizer.decode(ids)
    assert (answer.finish, answer.tokens) == ("length", 12)
    assert answer.prompt_tokens == len(tokenizer(render(QUESTION))["input_ids"])


@pytest.mark.llamacpp
def test_repetition_penalty_equals_transformers(server: LlamaServer, model: Any, tokenizer: Any) -> None:
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
def test_speed_and_memory_of_running_server_are_measured(server: LlamaServer, random_llama: Path) -> None:
    speed = server.speed(list(range(5, 105)), 16)
    assert speed.prompt > 0 < speed.generation
    memory = server.peak_memory()
    assert memory is not None
    assert memory > (random_llama / "tiny-F16.gguf").stat().st_size


@pytest.mark.llamacpp
def test_stop_text_ends_answer_and_is_removed(server: LlamaServer, model: Any, tokenizer: Any) -> None:
    text = tokenizer.decode(argmax_answer(model, tokenizer(render(QUESTION))["input_ids"], 12))
    stop = text[8:11]
    assert len(stop) == 3
    answer = server.answer(QUESTION, replace(GREEDY, stops=("never there", stop)))
    assert answer.finish == "stop"
    assert answer.text == text.partition(stop)[0]


@pytest.mark.llamacpp
def test_same_seed_gives_same_answer(server: LlamaServer) -> None:
    sampled = replace(SAMPLED, temperature=1.0, max_new_tokens=20)
    first, second, other = (server.answer(QUESTION, replace(sampled, seed=seed)).text for seed in (1, 1, 2))
    assert first == second != other


@pytest.mark.llamacpp
def test_interrupted_answer_leaves_server_free(server: LlamaServer) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    endless = replace(GREEDY, max_new_tokens=200, stops=())
    with pytest.raises(KeyboardInterrupt):
        server.answer(QUESTION, endless, interrupt)
    assert server.answer(QUESTION, replace(GREEDY, max_new_tokens=3)).tokens <= 3


@pytest.mark.llamacpp
def test_prompt_longer_than_context_raises_service_error(server: LlamaServer) -> None:
    with pytest.raises(ServiceError, match="exceeds the available context size"):
        server.answer(conversation("una pregunta larga " * 200), GREEDY)


@pytest.mark.llamacpp
def test_file_that_is_no_gguf_raises_service_error(real: None, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("<html>", "utf-8")
    with (
        pytest.raises(ServiceError, match="invalid magic"),
        serve(tmp_path / "a.gguf", context=64, threads=1, log=tmp_path / "log"),
    ):
        pass


@pytest.mark.llamacpp
def test_real_server_is_killed_with_its_parent(random_llama: Path) -> None:
    def server_pid() -> int:
        words = {path: path.read_bytes().split(b"\0") for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()}
        gguf = str(random_llama / "tiny-F16.gguf").encode()
        (found,) = (path for path, line in words.items() if b"llama-server" in line[0] and {gguf, b"128"} <= {*line})
        return int(found.parent.name)

    pid = kill_the_parent({"gguf": random_llama / "tiny-F16.gguf", "log": random_llama / "killed.log"}, server_pid)
    assert within(5, lambda: not alive(pid))
