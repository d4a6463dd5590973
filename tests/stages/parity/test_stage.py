"""stages/parity/stage.py: the precision of transformers. tests/end_to_end runs the stage, with collect.py."""

import pytest


def test_transformers_precision_depends_on_free_memory() -> None:
    pytest.importorskip("torch")
    from tutor.stages.parity.stage import transformers_precision

    giga = 1 << 30
    assert [transformers_precision(16 * giga, free * giga) for free in (40, 33, 32, 17, 16, 0)] == [
        "fp32",
        "fp32",
        "bf16",
        "bf16",
        None,
        None,
    ]
