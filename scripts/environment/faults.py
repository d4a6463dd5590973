"""Turn the output of a failed installer into one line: what is wrong, and the next step.

In: lines of uv, pip or venv. Out: a SetupError. Does not start anything.
"""

import re

HOST = 4
"""Exit code for something that this machine lacks, as in tutor/errors.py."""
ARTIFACT = 5
"""Exit code for a file that does not have its pinned hash, as in tutor/errors.py."""
LOCKED = 7
"""Exit code for an environment that another process installs, as in tutor/errors.py."""
AGAIN = "the same command continues from here"
"""End of each next step: what is complete is not installed again."""

KNOWN = (
    (
        r"No space left on device|os error 28\b|Errno 28\b|Disk quota exceeded",
        HOST,
        "the disk is full ({free} GB free)",
        "delete something",
    ),
    (
        r"invalid peer certificate|UnknownIssuer|CERTIFICATE_VERIFY_FAILED|certificate verify failed",
        HOST,
        "the certificate of {index} is not trusted here (a proxy with its own certificate?)",
        "add it to the system's certificates or name a file with it: SSL_CERT_FILE=FILE",
    ),
    (
        r"Hash mismatch|DO NOT MATCH THE HASHES",
        ARTIFACT,
        "{index} serves a file without its pinned hash",
        "use another index, or try later",
    ),
    (
        r"\b407\b|Proxy Authentication Required",
        HOST,
        "the proxy asks for a name and a password",
        "set HTTPS_PROXY=http://NAME:PASSWORD@HOST:PORT",
    ),
    (
        r"dns error|onnection refused|connect error|is unreachable|timed out|imeout|name resolution|connection broken"
        r"|error sending request|onnection reset|NewConnectionError|Could not connect|ProxyError",
        HOST,
        "{index} does not answer",
        "check the network, and the proxy and index that pip is set to (HTTPS_PROXY, PIP_INDEX_URL)",
    ),
    (
        r"not found in the package registry|No matching distribution|no wheels? |no usable wheels|not compatible",
        HOST,
        "the package index has no file of a pinned package for this system and Python",
        "use another Python (PYTHON=python3.13) or another index (PIP_INDEX_URL)",
    ),
)
"""Patterns of known failures, the first that matches counts: pattern, exit code, what, next step."""
LOCATION = re.compile(r"https?://(?:[^\s/@'\"`]*@)?([^\s/'\"`()]+)")
"""Address in a line; the group has no user name and password."""
CONNECTION = re.compile(r"host='([^']+)', port=(\d+)")
"""Address in a connection error of pip."""


class SetupError(Exception):
    """An error in one line: what, then the next step; `code` is the exit code."""

    def __init__(self, message: str, hint: str, code: int = HOST) -> None:
        super().__init__(f"{message}; {hint}")
        self.code = code


def explain(what: str, lines: list[str], log: str, free: float) -> SetupError:
    """Return the error for the output of a failed program; `free` is the free space in GB, `log` has all lines."""
    text = "\n".join(lines)
    for pattern, code, message, hint in KNOWN:
        if re.search(pattern, text):
            found = message.format(free=f"{free:.1f}", index=_index(text))
            return SetupError(f"cannot {what}: {found}", f"{hint}; {AGAIN}", code)
    spoken = [line.strip() for line in lines if line.strip()]
    last = next((line for line in spoken if line.lower().startswith("error")), spoken[-1] if spoken else "no output")
    return SetupError(f"cannot {what}: {last}", f"all output: {log}; {AGAIN}")


def _index(text: str) -> str:
    if found := LOCATION.search(text):
        return found[1]
    if found := CONNECTION.search(text):
        return f"{found[1]}:{found[2]}"
    return "the package index"
