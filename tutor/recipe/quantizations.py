"""Names of llama.cpp's quantizations.

In: a name as a person writes it. Out: the name that files have. Imports nothing: a recipe is checked without gguf and
without a build of llama.cpp.
"""

F16 = "F16"
BF16 = "BF16"
"""In place of F16 for families whose activations F16 cannot hold (formats/architectures.py)."""
AUTO = "auto"
"""Value of ollama.quantization: the smallest quantization that the benchmark finds within the budget."""

NEED_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "IQ3_XXS", "IQ3_XS")
"""Quantizations that llama-quantize makes only with an importance matrix."""

KINDS = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M"),
    *("Q6_K", "Q8_0", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", *NEED_IMATRIX),
)
"""Quantizations that the pinned llama-quantize makes of a Llama and gguf-py reads back."""

SECOND_NAMES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""Other names that llama-quantize takes, each with the name that files have; a recipe may use both."""

NOT_MADE = {
    **dict.fromkeys((F16, BF16, "F32"), "is no quantization, and a 16-bit file is always made"),
    "COPY": "is no quantization",
    "MXFP4_MOE": "is for mixtures of experts, and Llama has none",
    **dict.fromkeys(("Q1_0", "Q2_0"), "cannot be read back (gguf-py does not dequantize it), so it is not made"),
}
"""Types of llama-quantize that a recipe may not name, each with the reason."""


def canonical(name: str) -> str:
    """The name that files have, of a name in any case that llama-quantize takes."""
    return SECOND_NAMES.get(name.upper(), name.upper())
