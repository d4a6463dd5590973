"""scripts/penalty.py: corrections come first, and kept names are counted in corrections alone."""

import sys
from typing import Any

import pytest
from support.processes.command import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import penalty


def record(*, corrects: bool, dropped: bool = False, no_loop: bool = True) -> dict[str, Any]:
    verdicts = {"stopped": True, "no_loop": no_loop, "language": True, "compiles": False}
    return {
        "corrects": corrects, "verdicts": verdicts, "code": {"dropped": ["suma"] if dropped else []}, "passed": False,
    }  # fmt: skip


def test_corrections_come_first_and_the_other_categories_in_turn() -> None:
    prompts = [{"category": category, "place": place} for place, category in enumerate("aaabb")]
    prompts.insert(2, {"category": penalty.CORRECTION, "place": 9})
    assert [prompt["place"] for prompt in penalty.chosen(prompts, 4)] == [9, 0, 3, 1]


@pytest.mark.parametrize(("count", "verdict"), [(12, "worse"), (2, "no difference shown")])
def test_table_counts_names_in_corrections_alone(count: int, verdict: str) -> None:
    before = [record(corrects=True, no_loop=False)] * count + [record(corrects=False)]
    after = [record(corrects=True, dropped=True)] * count + [record(corrects=False, dropped=True)]
    lines = penalty.table({1.0: before, 1.15: after}, seed=1).splitlines()
    names = next(line for line in lines if line.startswith("| names kept"))
    assert names.startswith(f"| names kept | {count}/{count} | 0/{count} | -100 points")
    assert names.endswith(f": {verdict} |")
    assert any(line.startswith(f"| without a loop | 1/{count + 1} | {count + 1}/{count + 1} |") for line in lines)
