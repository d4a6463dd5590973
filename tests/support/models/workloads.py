"""Shapes of models and workloads of training steps, shared by the tests of machine."""

from hypothesis import strategies as st

from tutor.machine.memory.estimate import StepWorkload
from tutor.machine.memory.shapes import SHAPES, Shape

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

LARGE = SHAPES["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]

DEMO = Shape(576, 30, 1536, 9, 3, 64, 49152, tied=True)

TINY = SHAPES["tiny"]

SPECIFIED = StepWorkload(
    tokens=1024,
    longest=1024,
    quantization="nf4",
    precision="bf16",
    rank=8,
    targets=ATTENTION,
    dropout=True,
    checkpointing=True,
    head="tiled",
    gpu=True,
)
"""data/tutor.toml on a GPU."""

workloads = st.builds(
    StepWorkload,
    tokens=st.integers(16, 8192),
    longest=st.integers(16, 2048),
    quantization=st.sampled_from(["nf4", "int8", "none"]),
    precision=st.sampled_from(["bf16", "fp16", "fp32"]),
    rank=st.integers(1, 64),
    targets=st.sampled_from([ATTENTION, ALL, ("q_proj",)]),
    dropout=st.booleans(),
    checkpointing=st.booleans(),
    head=st.sampled_from(["tiled", "chunked"]),
    gpu=st.booleans(),
)
