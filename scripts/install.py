"""Make or update the environment .venv, with llama.cpp and TypeScript where asked; `make` calls it.

In: a set of packages (light, build, demo, dev, lock), the pins of requirements/. Out: .venv with a marker for the set.
Runs with any Python 3, so that an old one gets an error line and no traceback: no new syntax before the check.
Does not run stages or tests.
"""

import sys
from shutil import which

OLDEST = (3, 11)
"""Oldest supported version of Python, that of pyproject.toml."""
NEWEST = 20
"""Largest minor version of Python 3 that is looked for on PATH."""
OLD_PYTHON = 4
"""Exit code for an old Python: this machine lacks something."""


def main() -> int:
    """Check the version of Python, then run the set-up; return the exit code."""
    if sys.version_info[:2] < OLDEST:
        names = [f"python3.{minor}" for minor in range(NEWEST, OLDEST[1] - 1, -1)]
        found = [name for name in names if which(name)]
        step = f"add PYTHON={found[0]} to the make command" if found else "install a newer Python"
        version = ".".join(str(number) for number in sys.version_info[:3])
        sys.stderr.write(f"Error: {sys.executable} is Python {version}; tutor needs 3.11 or newer: {step}\n")
        return OLD_PYTHON
    from environment.steps import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
