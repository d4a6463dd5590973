"""Fake programs of llama.cpp that answer and score as their JSON "GGUF" states; a base folder with a byte tokenizer."""

import json
from pathlib import Path

import pytest

SPANISH = (
    " Una interfaz describe la forma de un objeto y sus propiedades.\n\n"
    "```ts\ninterface A { b: string }\n```\n\nÚsala cuando varias funciones la compartan."
)


ENGLISH = " An interface describes the shape of an object and all of its properties, one by one."


TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
"""Chat template of the base."""


def write_base(folder: Path, template: str = TEMPLATE) -> None:
    """A base folder with a byte tokenizer: EOS is 256, no BOS."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    (folder / "model").mkdir(parents=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={sign: i for i, sign in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens([tokenizers.AddedToken("<fin>", normalized=False, special=True)])
    core.save(str(folder / "model" / "tokenizer.json"))
    labels = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<fin>", "chat_template": template}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(labels), "utf-8")
    facts = {"source": "tiny", "model": "model", "weights": "0", "vocabulary": 257, "add_bos": False, "bos": None}
    (folder / "base.json").write_text(
        json.dumps({**facts, "eos": 256, "pad": None, "pre_tokenizer": "x", "check": {}, "prompt": {}}), "utf-8"
    )


def read_requests(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


SERVER = """
import json, os, socketserver, sys
from http.server import BaseHTTPRequestHandler
flags = dict(zip(sys.argv[1:], sys.argv[2:]))
model = json.load(open(flags["-m"]))
class Handler(BaseHTTPRequestHandler):
    def address_string(self): return "test"
    def log_message(self, *_): pass
    def send(self, kind, body):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self): self.send("application/json", b"{}")
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(model["requests"], "a") as file: file.write(json.dumps(request) + "\\n")
        if self.path == "/tokenize":
            return self.send("application/json", json.dumps({"tokens": [0] * len(request["content"])}).encode())
        if model["crashes_on"] and model["crashes_on"] in request["prompt"]:
            with open(model["requests"] + ".crashes", "a") as file: file.write("x")
            if os.path.getsize(model["requests"] + ".crashes") <= model["times"]:
                os._exit(3)
        event = {"content": model["text"], "stop": True, "stop_type": "eos", "tokens_evaluated": 9,
                 "tokens_predicted": 21, "timings": {"predicted_per_second": 40.0}}
        self.send("text/event-stream", b"data: " + json.dumps(event).encode() + b"\\n\\n")
socketserver.UnixStreamServer(flags["--host"], Handler).serve_forever()
"""


SCORER = """
import json, sys
model = json.load(open(sys.argv[1]))
for line in sys.stdin:
    n, *ids = map(int, line.split())
    answer = ids[n:]
    with open(model["requests"], "a") as file: file.write(json.dumps({"scored": ids, "prompt": n}) + "\\n")
    print(json.dumps({"logprobs": [model["logprob"]] * len(answer), "top": [[[0, -1.0]]] * len(answer)}))
"""
