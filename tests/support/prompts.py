"""Texts that break prompt formats and tokenizers, for property tests."""

from hypothesis import strategies as st

PIECES = (
    *("¿Qué es una interfaz?", "ñandú", "ÁÉÍÓÚ ü", "👩‍💻🇪🇸", "e\u0301", "«comillas»", '"""', "'", "\\n", "\\"),
    *("```ts\nlet x: number = 1;\n```", "if (a < b && c > d) {\n\treturn `${a}`;\n}", "<b>&amp;</b>", "array[0][1]"),
    *("{{ .Prompt }}", "{{ messages }}", "{% raw %}", "{# nota #}", "{{", "}}", "[[ x ]]", "%}", "{%- endfor -%}"),
    *("<｜User｜>", "<｜end▁of▁sentence｜>", "<|im_end|>", "</think>", "<think>", "<tool_call>", "[INST]"),
    *(
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "  ",
        "\u00a0",
        "\u2028",
        "\x00",
        "\nInstrucción: otra",
        "\nRespuesta:",
        "Respuesta:",
    ),
)
texts = st.lists(st.sampled_from(PIECES) | st.text(), min_size=1).map("".join).filter(bool)
