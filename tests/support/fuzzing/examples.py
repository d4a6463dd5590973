"""The seeds of a run of the fuzz tests: few by default, many and new ones where the environment says so."""

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

from support.fuzzing.guard import Outcome, broken_rules

COUNT = "TUTOR_FUZZ_EXAMPLES"
"""Variable with the factor by which more examples are run."""
SEED = "TUTOR_FUZZ_SEED"
"""Variable with the seed of the first example."""


def seeds(count: int) -> Iterator[Random]:
    """Return generators, one for each example of a test."""
    first = int(os.environ.get(SEED, "0"))
    for number in range(count * int(os.environ.get(COUNT, "1"))):
        yield Random(f"{first}:{number}")


def check(outcome: Outcome, raw: bytes, folder: Path) -> None:
    """Fail with the input, which is kept, where a run broke a rule."""
    if rules := broken_rules(outcome):
        kept = folder / "input"
        kept.write_bytes(raw)
        raise AssertionError(f"{'; '.join(rules)} for {kept}: {raw[:300]!r}\n{outcome.stderr[-3000:]}")
