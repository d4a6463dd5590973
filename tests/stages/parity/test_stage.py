"""stages/parity/in_transformers.py and collect.py: how the weights get into memory. tests/end_to_end runs the stage."""

import pytest

from tutor.machine.device import DeviceMemory
from tutor.stages.parity.in_transformers import choose_way

GIGA = 1 << 30
LAYER = GIGA // 4
"""Numbers in a layer of an 8B; in fp32 with what is computed of them, 2 GiB."""


@pytest.mark.parametrize(
    ("gpu", "main", "way"),
    [
        (33, 64, "loaded"),
        (32, 64, "GPU, layer by layer"),
        (3, 64, "GPU, layer by layer"),
        (2, 64, "CPU, layer by layer"),
        (2, 2, None),
        (None, 33, "loaded"),
        (None, 16, "CPU, layer by layer"),
        (None, 2, None),
    ],
)
def test_memory_decides_how_the_weights_are_read(gpu: int | None, main: int, way: str | None) -> None:
    memory = DeviceMemory(main * GIGA, 64 * GIGA, "this machine", gpu=False)
    device = memory if gpu is None else DeviceMemory(gpu * GIGA, 80 * GIGA, "a GPU", gpu=True)
    assert choose_way(16 * GIGA, LAYER, device, memory) == way
