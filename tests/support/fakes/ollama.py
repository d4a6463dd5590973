"""A strict fake of an Ollama server, on a loopback socket: it answers as Ollama does (docs/facts.md, 1, 5 and 11).

It refuses what a correct client does not send (unknown fields, load-time options in a request, `num_predict` 0,
`think` without the capability, a chunked blob), and keeps all requests in `requests`. A GGUF here has one tensor, its
family and its chat template, and all facts as JSON. A model without TEMPLATE is rendered by that template, or by one
of KNOWN that it resembles. `script(path, reply, ...)` replaces the next replies to a path.
"""

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from support.fakes.ollama_models import (  # noqa: F401 - tests import them from here
    CAPABILITY_WORDS,
    KNOWN,
    THINK_WORDS,
    Model,
    Thought,
    facts_of,
    gguf,
    split_thought,
    write_gguf,
)

CREATE = {"model", "files", "adapters", "template", "system", "parameters", "license", "messages", "parser", "stream"}
CHAT = {"model", "messages", "stream", "truncate", "options", "think", "_debug_render_only", "logprobs", "top_logprobs"}
GENERATE = {*CHAT - {"messages"}, "prompt", "system", "keep_alive", "raw"}
LOAD_TIME = {"num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread", "draft_num_predict"}
OPTIONS: dict[str, type | tuple[type, ...]] = {
    "num_predict": int,
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": int,
    "repeat_penalty": (int, float),
    "repeat_last_n": int,
    "seed": int,
    "stop": list,
}
Reply = Callable[["Handler"], None]


class FakeOllama(ThreadingHTTPServer):
    """The server; `host` is its URL. Tests can read its models and requests, and script its next replies."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.host = f"http://127.0.0.1:{self.server_address[1]}"
        self.version = "0.33.0-rc2"
        self.capabilities: list[str] = []  # of every model; empty: as its template has them
        self.pieces = [" Una", " interfaz", " describe", " un", " objeto", "."]
        self.blobs: dict[str, bytes] = {}
        self.models: dict[str, Model] = {}
        self.order: list[str] = []  # names, the last written last
        self.loaded: list[str] = []
        self.gpu_share = 0.75  # of every loaded model
        self.shows_prompts = True
        self.reply_to: Callable[[str], list[tuple[str, float]]] | None = None  # prompt -> pieces with log-probabilities
        # all options of the answer, and as `asked` those of the request alone -> pieces with log-probabilities
        self.reply_by_options: Callable[[dict[str, Any]], list[tuple[str, float]]] | None = None
        self.counts = lambda prompt: len(prompt.split())  # tokens
        self.requests: list[tuple[str, Any]] = []
        self.headers: list[Message] = []  # of each request
        self.scripts: dict[str, list[Reply | None]] = {}
        self.cancelled = threading.Event()
        self.alter: Callable[[bytes], bytes] = bytes  # changes every answer before it is sent

    def script(self, path: str, *replies: Reply | None) -> None:
        """Set the next replies to "METHOD /path"; None stands for the normal one."""
        self.scripts[path] = list(replies)

    def bodies(self, path: str) -> list[Any]:
        """The bodies of the requests to "METHOD /path", in order."""
        return [body for where, body in self.requests if where == path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""


class Handler(BaseHTTPRequestHandler):
    server: FakeOllama
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self.handle_one("GET")

    def do_HEAD(self) -> None:
        self.handle_one("HEAD")

    def do_POST(self) -> None:
        self.handle_one("POST")

    def do_DELETE(self) -> None:
        self.handle_one("DELETE")

    def handle_one(self, method: str) -> None:
        where = f"{method} {self.path}"
        self.server.headers.append(self.headers)
        short = re.sub(r"/sha256:.*", "", where)
        scripted = self.server.scripts.get(short)
        reply = scripted.pop(0) if scripted else None
        if method == "POST" and self.path.startswith("/api/blobs/"):
            self.server.requests.append((short, self.path.rpartition("/")[2]))
            (reply or Handler.put_blob)(self)
            return
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(raw) if raw else None
        self.server.requests.append((short, body))
        if reply:
            reply(self)
            return
        routes: dict[str, Callable[[Any], None]] = {
            "GET /api/version": lambda _: self.json({"version": self.server.version}),
            "GET /api/tags": lambda _: self.json({"models": self.tags()}),
            "GET /api/ps": lambda _: self.json({"models": [*map(self.running_model, self.server.loaded)]}),
            "HEAD /api/blobs": lambda _: self.empty(200 if self.blob_name() in self.server.blobs else 404),
            "POST /api/create": self.create,
            "POST /api/show": self.show,
            "POST /api/copy": self.copy,
            "DELETE /api/delete": self.delete,
            "POST /api/chat": self.chat,
            "POST /api/generate": self.generate,
        }
        if short in routes:
            routes[short](body)
        else:
            self.send(404, b"404 page not found", "text/plain")

    # Responses

    def send(
        self,
        status: int,
        data: bytes,
        kind: str = "application/json; charset=utf-8",
        headers: dict[str, str] | None = None,
    ) -> None:
        data = self.server.alter(data)
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def empty(self, status: int) -> None:
        self.send(status, b"")

    def json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode())

    def error(self, status: int, what: Any) -> None:
        self.json({"error": what}, status)

    def lines(self, values: list[Any], *, end: str = "complete", pause: float = 0.0) -> None:
        """A stream of JSON lines; `end` is complete, drop (the connection breaks) or hang."""
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for value in values:
                data = value if isinstance(value, bytes) else (json.dumps(value, ensure_ascii=False) + "\n").encode()
                data = self.server.alter(data)
                if data:  # an empty piece would end the stream
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                self.wfile.flush()
                time.sleep(pause)
            if end == "hang":
                time.sleep(30)
        except (BrokenPipeError, ConnectionResetError):
            self.server.cancelled.set()
            self.close_connection = True
            return
        if end == "drop":
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(b"0\r\n\r\n")

    # Blobs and models

    def blob_name(self) -> str:
        return self.path.rpartition("/")[2]

    def put_blob(self) -> None:
        assert "Content-Length" in self.headers, "a blob is sent with its length, not chunked"
        data = self.rfile.read(int(self.headers["Content-Length"]))
        name = f"sha256:{hashlib.sha256(data).hexdigest()}"
        known = self.blob_name() in self.server.blobs
        self.server.blobs.setdefault(name, data)
        if name != self.blob_name():
            self.error(400, f'digest mismatch, expected "{self.blob_name()}", got "{name}"')
        else:
            self.empty(200 if known else 201)

    def create(self, body: dict[str, Any]) -> None:
        if unknown := set(body) - CREATE:
            return self.error(400, f"strict: unknown fields {unknown}")
        if not body.get("files"):
            return self.error(400, "neither 'from' or 'files' was specified")
        if not re.fullmatch(r"((\w[\w.:-]*/)?\w[\w-]*/)?\w[\w.-]*(:\w[\w.-]*)?", body["model"], re.ASCII):
            return self.error(400, "invalid model name")
        digest = next(iter(body["files"].values()))
        try:
            facts = self.check_blob(digest)
            for adapter in body.get("adapters", {}).values():
                if self.check_blob(adapter)["kind"] != "adapter":
                    raise ValueError("strict: an adapter without general.type")
        except ValueError as error:
            return self.lines([{"status": "parsing GGUF"}, {"error": str(error)}])
        layers = [{"status": f"creating new layer sha256:{n}"} for n in range(3)]
        model = Model({k: v for k, v in body.items() if k not in ("model", "stream")}, facts, digest)
        self.remember(body["model"], model)
        return self.lines(
            [
                {"status": "parsing GGUF"},
                {"status": "validating GGUF model", "digest": "0000000000000000000", "total": 10, "completed": 10},
                {"status": "verifying conversion"},
                *([{"status": f"using autodetected template {model.recognised}"}] if model.recognised else []),
                *layers,
                {"status": "writing manifest"},
                {"status": "success"},
            ]
        )

    def check_blob(self, digest: str) -> dict[str, Any]:
        data = self.server.blobs.get(digest)
        if data is None:
            raise ValueError(f"open /models/blobs/{digest}: no such file or directory")
        if not data.startswith(b"GGUF"):
            raise ValueError("supplied file was not in GGUF format")
        facts = facts_of(data)
        if len(data) < facts["size"]:
            raise ValueError(
                f'tensor "blk.0.attn_v.weight" offset+size ({facts["size"]}) exceeds file size ({len(data)})'
            )
        return facts

    def remember(self, name: str, model: Model) -> None:
        name = self.existing(name) or name
        self.server.models[name] = model
        if name in self.server.order:
            self.server.order.remove(name)
        self.server.order.append(name)

    def existing(self, name: str) -> str | None:
        """A model's name as it is kept: without a tag it is `latest`, and case does not matter."""
        full = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
        return next((known for known in self.server.models if known.lower() == full.lower()), None)

    def find(self, name: str) -> Model | None:
        known = self.existing(name)
        if known is None:
            self.error(404, f"model '{name}' not found")
            return None
        return self.server.models[known]

    def show(self, body: dict[str, Any]) -> None:
        if model := self.find(body["model"]):
            made = model.body
            given = made.get("parameters", {})
            given = {"stop": KNOWN[model.recognised][2], **given} if model.recognised else given
            parameters = [
                (name, entry)
                for name, value in given.items()
                for entry in (value if isinstance(value, list) else [value])
            ]
            answer = {
                "template": model.facts["chat_template"] if model.native else model.template,
                "parameters": "\n".join(f"{name:<30} {json.dumps(v, ensure_ascii=False)}" for name, v in parameters),
                "details": {
                    "family": model.facts.get("family", "llama"),
                    "quantization_level": model.facts["quantization"],
                },
                "capabilities": self.server.capabilities or model.capabilities,
                "model_info": model.facts.get("info", {}),
                "modelfile": f"# by the fake\nFROM /models/blobs/{model.blob.replace(':', '-')}\n",
            }
            self.json(answer | ({"system": made["system"]} if "system" in made else {}))

    def tags(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "model": name,
                "digest": self.server.models[name].digest,
                "modified_at": f"2026-11-23T17:42:{number:02}.117365914Z",
                "size": len(self.server.blobs[self.server.models[name].blob]),
                "details": {"family": "llama"},
            }
            for number, name in reversed(list(enumerate(self.server.order)))
        ]

    def running_model(self, name: str) -> dict[str, Any]:
        return {"name": name, "model": name, "size": 400, "size_vram": int(400 * self.server.gpu_share)}

    def copy(self, body: dict[str, Any]) -> None:
        if model := self.find(body["source"]):
            self.remember(body["destination"], model)
            self.empty(200)

    def delete(self, body: dict[str, Any]) -> None:
        if self.find(body["model"]):
            name = self.existing(body["model"]) or ""
            del self.server.models[name]
            self.server.order.remove(name)
            self.empty(200)

    # Answers

    def asked_badly(self, body: dict[str, Any], fields: set[str], model: Model) -> bool:
        """Whether the request is refused, and the answer is out."""
        options = body.get("options", {})
        thinks = "thinking" in (self.server.capabilities or model.capabilities)
        answers = "prompt" in body or "messages" in body
        if unknown := set(body) - fields:
            self.error(400, f"strict: unknown fields {unknown}")
        elif reloading := set(options) & LOAD_TIME:
            self.error(400, f"strict: {reloading} would load the model again")
        elif wrong := [n for n, v in options.items() if n not in OPTIONS or not isinstance(v, OPTIONS[n])]:
            self.error(500, f'option "{wrong[0]}" must be of another type')
        elif body.get("think") and not thinks:
            self.error(400, f'"{body["model"]}" does not support thinking')
        elif answers and options.get("num_predict", 0) <= 0:
            self.error(400, "strict: num_predict <= 0 is no limit")
        elif answers and body.get("truncate") is not False:
            self.error(400, "strict: without truncate false a long prompt is cut silently")
        else:
            return False
        return True

    def chat(self, body: dict[str, Any]) -> None:
        model = self.find(body["model"])
        if model and not self.asked_badly(body, CHAT, model):
            self.answer(body, model, body["messages"], {"message": {"role": "assistant", "content": ""}})

    def generate(self, body: dict[str, Any]) -> None:
        model = self.find(body["model"])
        if model is None or self.asked_badly(body, GENERATE, model):
            return
        if "prompt" not in body:
            name = self.existing(body["model"])
            self.server.loaded = [known for known in self.server.loaded if known != name]
            unload = body.get("keep_alive") == 0
            self.server.loaded += [] if unload else [name or ""]
            reason = "unload" if unload else "load"
            self.json({"model": body["model"], "response": "", "done": True, "done_reason": reason})
        else:
            self.answer(body, model, [{"role": "user", "content": body["prompt"]}], {"response": ""})

    def answer(self, body: dict[str, Any], model: Model, messages: list[Any], empty: dict[str, Any]) -> None:
        name = self.existing(body["model"]) or ""
        if name not in self.server.loaded:
            self.server.loaded.append(name)
        prompt = str(body["prompt"]) if body.get("raw") else model.render(messages, think=body.get("think"))
        if body.get("_debug_render_only") and self.server.shows_prompts:
            return self.json({**empty, "done": False, "_debug_info": {"rendered_template": prompt}})
        limit = body["options"]["num_predict"]
        answer = (
            self.server.reply_to(prompt) if self.server.reply_to else [(piece, -0.1) for piece in self.server.pieces]
        )
        if self.server.reply_by_options:
            options = {**model.body.get("parameters", {}), **body["options"], "asked": body["options"]}
            answer = self.server.reply_by_options(options)
        pieces, words = answer[:limit], self.server.counts(prompt)
        if words > model.body.get("parameters", {}).get("num_ctx", 4096):
            what = {"code": 400, "message": f"request ({words} tokens) exceeds the available context size", "n_ctx": 64}
            return self.error(400, json.dumps({"error": what}))
        last = {**empty, "done": True, "done_reason": "length" if limit < len(answer) else "stop"}
        last |= {"prompt_eval_count": words, "eval_count": len(pieces) + 1, "eval_duration": 500_000_000}
        if not body["stream"]:
            return self.json(
                {**last, "message": {"role": "assistant", "content": "".join(piece for piece, _ in pieces)}}
            )
        top = int(body.get("top_logprobs", 0)) if body.get("logprobs") else 0
        if "response" in empty:
            return self.lines([*(completion(piece, logprob, top) for piece, logprob in pieces), last])
        parts = split_thought(pieces, opened=prompt.rstrip().endswith(THINK_WORDS[0])) if model.thinks else pieces
        return self.lines([*(chunk(piece, logprob, top) for piece, logprob in parts), last])


def chunk(text: str, logprob: float = 0.0, top: int = 0) -> dict[str, Any]:
    field = "thinking" if isinstance(text, Thought) else "content"
    event: dict[str, Any] = {"message": {"role": "assistant", "content": "", field: text}, "done": False}
    return event | logprobs(text, logprob, top)


def completion(text: str, logprob: float = 0.0, top: int = 0) -> dict[str, Any]:
    return {"response": text, "done": False} | logprobs(text, logprob, top)


def logprobs(text: str, logprob: float, top: int) -> dict[str, Any]:
    others = [{"token": text, "logprob": logprob}, {"token": "�", "logprob": logprob - 3}]
    return {"logprobs": [{"token": text, "logprob": logprob, "top_logprobs": others[:top]}]} if top else {}


# Bad replies, for `script`


def status(code: int, text: str, kind: str = "application/json", headers: dict[str, str] | None = None) -> Reply:
    return lambda handler: handler.send(code, text.encode(), kind, headers)


def stream(*values: Any, end: str = "complete", pause: float = 0.0) -> Reply:
    return lambda handler: handler.lines(list(values), end=end, pause=pause)


def hang(handler: Handler) -> None:
    """Accept the request and send nothing."""
    time.sleep(5)


def hang_up(handler: Handler) -> None:
    """Accept the request and close the connection."""
    handler.close_connection = True
    handler.connection.shutdown(2)


@contextlib.contextmanager
def running() -> Iterator[FakeOllama]:
    """Run a fake server until the end of the context."""
    with FakeOllama() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
