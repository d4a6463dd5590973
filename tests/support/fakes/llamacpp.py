"""Scripts in place of the programs of a llama.cpp build."""

import json
import sys
from pathlib import Path

from tutor.engines.llamacpp.build import MARKER

SERVER = """
import http.server, json, os, signal, socketserver, sys, time
from pathlib import Path

home = Path(__file__).parent.parent
plan = json.loads((home / "plan.json").read_text("utf-8"))
(home / "started.json").write_text(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], "env": dict(os.environ)}))
print(plan.get("output", "hello"), flush=True)
if "signal" in plan:
    os.kill(os.getpid(), plan["signal"])
if "exit" in plan:
    sys.exit(plan["exit"])
if plan.get("stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
paths = []


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        paths.append(self.path)
        self.send_response(200 if len(paths) > plan.get("loading", 0) else 503)
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
"""A llama-server that follows the plan in plan.json, and writes down how it was started and what it was sent."""


def script(build: Path, name: str, text: str) -> None:
    """Make a program of a fake build the Python script `text`."""
    path = build / "bin" / name
    path.write_text(f"#!{sys.executable}\n{text}", "utf-8")
    path.chmod(0o755)
    sizes = {program.name: program.stat().st_size for program in (build / "bin").iterdir()}
    (build / MARKER).write_text(json.dumps({"sizes": sizes}), "utf-8")
