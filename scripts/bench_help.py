"""Compare the time of `tutor --help` with that of `python -c pass`: medians of several alternating runs.

    .venv/bin/python scripts/bench_help.py [--runs N]

Prints both in milliseconds of wall time, and their ratio. Does not check which modules are imported
(tests/cli/test_main.py does).
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS: dict[str, list[str]] = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "tutor --help": [str(Path(sys.executable).with_name("tutor")), "--help"],
}


def main() -> None:
    """Run the commands alternately and print a table."""
    parser = argparse.ArgumentParser(description="Compare the time of `tutor --help` with that of Python alone.")
    parser.add_argument("--runs", type=int, default=20, help="number of runs of each command (default: 20)")
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        seconds(command)  # warm-up, not counted: it reads the files from the disk
    for _ in range(runs):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    print(table(times))


def seconds(command: list[str]) -> float:
    """Return the wall time of a command in seconds. Raises CalledProcessError when it fails."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def table(times: dict[str, list[float]]) -> str:
    """Return the medians as Markdown, each with its ratio to the first."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    lines = ["| command | median, ms | ratio |", "| --- | ---: | ---: |"]
    lines += [f"| `{name}` | {1000 * median:.0f} | {median / first:.2f} |" for name, median in medians.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
