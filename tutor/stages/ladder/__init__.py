"""The ladder stage: a quantization benchmark, and the choice of the quantization to serve.

In: data/held_out.jsonl, base/ (its tokenizer), gguf/ (F16 and its quantizations), convert.budget of the recipe.
Out: `ladder/ladder.json` and `ladder/ladder.svg` (loss, KL divergence and size of each quantization; two runs give
equal bytes), `ladder/served.json` (the quantization to serve); speed and memory in the manifest's results.

stage.py   the stage: scoring, timing, the choice
plot.py    the SVG

Does not: quantize (the convert stage does), generate answers (the evaluate stage does), import another stage.
"""
