"""Print the reason of each skipped test once, with the number of tests and the step that ran them.

    python3 .ci/skipped.py FOLDER              the reasons, from the JUnit reports of all steps
    python3 .ci/skipped.py FOLDER --ids TEXT   the ids of the skipped tests whose reason contains TEXT

In: the reports that .ci/run lets pytest write, NUMBER-NAME_OF_THE_STEP.xml. Standard library only.
"""

import argparse
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Skipped:
    """The steps that ran a test, and the reason of the last step that skipped it."""

    reason: str = ""
    ran: list[str] = field(default_factory=list)


def main() -> None:
    """Print what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ids", metavar="TEXT", help="print ids, of the tests whose reason contains TEXT")
    options = parser.parse_args()
    tests = {test: found for test, found in read(options.folder).items() if found.reason}
    if options.ids is None:
        shown = table(list(tests.values()))
    else:
        shown = (node_id(*test) for test, found in tests.items() if options.ids in found.reason)
    sys.stdout.writelines(f"{line}\n" for line in shown)


def read(folder: Path) -> dict[tuple[str, str], Skipped]:
    """Every test of the reports, by module and name, in the order of the steps."""
    tests: dict[tuple[str, str], Skipped] = {}
    for path in sorted(folder.glob("*.xml"), key=lambda path: int(path.name.partition("-")[0])):
        step = path.name.partition("-")[2].partition(".")[0].replace("_", " ")
        for case in ET.parse(path).getroot().iter("testcase"):  # noqa: S314 - pytest's own report
            found = tests.setdefault((case.get("classname", ""), case.get("name", "")), Skipped())
            skip = case.find("skipped")
            if skip is None:
                found.ran.append(step)
            else:
                found.reason = skip.get("message", "")
    return tests


def table(skipped: list[Skipped]) -> Iterator[str]:
    """A line for each reason, and one for each step that ran some of its tests."""
    for reason, count in Counter(each.reason for each in skipped).most_common():
        yield f"{count:4}  {reason}"
        steps = Counter(each.ran[-1] if each.ran else "" for each in skipped if each.reason == reason)
        yield from (f"      {number} of them ran in: {step}" for step, number in steps.items() if step)
        if steps[""]:
            yield f"      {steps['']} of them ran in NO step"
    if not skipped:
        yield "none"


def node_id(module: str, name: str) -> str:
    """The id by which pytest selects a test function."""
    return f"{module.replace('.', '/')}.py::{name}"


if __name__ == "__main__":
    main()
