"""A fake TypeScript compiler."""

from pathlib import Path

COMPILER = """#!@PYTHON@ -SE
import os, pathlib, signal, sys, time
here = pathlib.Path("@HERE@")
files = [name for name in sys.argv[1:] if name.endswith(".ts")]
with (here / "runs").open("a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
(here / "environment").write_text("\\n".join(os.environ))
parsing, found = "--noCheck" in sys.argv, []
for name in files:
    source = pathlib.Path(name).read_text("utf-8")
    if "HANG" in source:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        (here / "hanging").write_text(str(os.getpid()))
        time.sleep(600)
    if "CONNECT" in source:
        import socket
        try:
            socket.create_connection(("127.0.0.1", int(source.split()[1])), 5)
        except OSError:
            pass
        else:
            (here / "connected").touch()
    if "CRASH" in source:
        print("panic: it broke\\n\\ngoroutine 1 [running]:")
        sys.exit(2)
    if "GREEDY" in source:
        bytes(2**33)
    while "CHATTY" in source:
        print("x" * 65536)
    if "MISCONFIGURED" in source:
        print("error TS5112: tsconfig.json is present")
        sys.exit(1)
    for number, line in enumerate(source.splitlines(), 1):
        for word in line.split():
            lacks = word.startswith("needs-") and "has-" + word[6:] not in source
            if word.startswith("TS1") if parsing else word.startswith("TS2") or lacks:
                code = "TS2304" if lacks else word
                found.append(f"{name}({number},1): error {code}: said\\x1b[31m of {word}")
print("\\n".join(found))
if parsing:
    print("error TS2318: Cannot find global type 'Array'.")
sys.exit(1 if found or parsing else 0)
"""
"""A script. TS1nnn in a text is a syntax error, TS2nnn a type error; needs-x is one unless has-x is in the text."""


def runs(folder: Path) -> list[str]:
    """The arguments of each run of the fake compiler in a folder."""
    log = folder / "runs"
    return log.read_text("utf-8").splitlines() if log.exists() else []
