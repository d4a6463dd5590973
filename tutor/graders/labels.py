"""Texts of the verdicts, for tables and reports.

In: nothing. Out: LABELS. Grades nothing, and imports no grader: a summary needs the texts alone.
"""

LABELS = {
    "passed": "all that was asked",
    "spanish": "in Spanish",
    "stopped": "stopped by itself",
    "answered": "not empty",
    "code_block": "with code",
    "fences_closed": "code fences closed",
    "no_loop": "without a loop",
    "no_leak": "no template text",
    "usual_length": "length as trained",
    "compiles": "code compiles",
    "expected": "as expected",
}
"""Texts of the boolean verdicts, true is good, in the order in which they are shown."""
