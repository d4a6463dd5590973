"""llama.cpp's quantizations by name. Imports nothing: the recipe is checked without gguf and without a build."""

F16 = "F16"
AUTO = "auto"
"""Of ollama.quantization: whichever the ladder finds smallest inside the budget."""

NEED_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "IQ3_XXS", "IQ3_XS")
"""llama-quantize refuses these without an importance matrix."""

KINDS = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M"),
    *("Q6_K", "Q8_0", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", *NEED_IMATRIX),
)
"""What the pinned llama-quantize makes of a Llama and gguf-py reads back: its list but SECOND_NAMES and NOT_MADE."""

SECOND_NAMES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""llama-quantize's own: the recipe takes both, and files have the first."""

NOT_MADE = {
    **dict.fromkeys((F16, "BF16", "F32"), "is no quantization, and F16 is always made"),
    "COPY": "is no quantization",
    "MXFP4_MOE": "is for mixtures of experts, and Llama has none",
    **dict.fromkeys(("Q1_0", "Q2_0"), "cannot be read back (gguf-py does not dequantize it), so it is not made"),
}
"""What llama-quantize knows besides, and why the recipe does not take it."""


def canonical(name: str) -> str:
    """A quantization's one name here, as files have it, of a name in any case as llama-quantize takes it."""
    return SECOND_NAMES.get(name.upper(), name.upper())
