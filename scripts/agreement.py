"""Compare greedy answers of transformers (merged model, FP16 weights in fp32) with those of llama-server (F16 GGUF).

    .venv/bin/python scripts/agreement.py data/demo.toml [PROMPTS]

Prints, for each held-out prompt, the number of equal tokens, and at the first difference both tokens and each engine's
preference for its own (difference of natural-log probabilities). A small preference on both sides is rounding noise.
Does not decide whether the models agree (the parity stage does).
"""

import sys
from dataclasses import replace
from pathlib import Path

from tutor.artifacts.layout import BuildFolder
from tutor.engines.answer_limit import with_answer_limit
from tutor.engines.hf.loading import load
from tutor.engines.hf.score import answer_logprobs
from tutor.engines.llamacpp.score import score
from tutor.engines.llamacpp.server import serve
from tutor.engines.protocol import greedy
from tutor.formats.rows.split_files import PROMPTS, read_split
from tutor.prompt.messages import conversation
from tutor.prompt.tutor_format import render
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe


def main(recipe: Recipe, build: Path, count: int) -> None:
    """Compare the engines on at most `count` prompts and print."""
    folder = BuildFolder(build, recipe.name)
    prompts = read_split(folder.stage("data"), PROMPTS)
    f16 = folder.gguf("tutor", "F16")
    engine = load(folder.stage("merge"), None, quantization="none", precision="fp32")
    tokenizer = engine.tokenizer
    recipe = with_answer_limit(recipe, folder.stage("train"))
    generation = replace(greedy(recipe.generate, recipe.seed), repetition_penalty=1.0)
    same = 0
    with serve(f16, context=recipe.generate.context, threads=2, log=folder.path / "agreement.log") as server:
        for prompt in prompts[:count]:
            messages = conversation(prompt["instruction"], recipe.system)
            texts = [each.answer(messages, generation).text for each in (engine, server)]
            ours, theirs = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
            agreed = next(
                (place for place, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)),
            )
            if ours == theirs:
                same += 1
                print(f"{len(ours):4} tokens, all equal   {prompt['instruction'][:60]}")
                continue
            prefix = [*tokenizer(render(messages))["input_ids"], *ours[:agreed]]
            eos = tokenizer.eos_token_id
            pair = [(ids[agreed] if agreed < len(ids) else eos) for ids in (ours, theirs)]
            by_hf = [row[0] for row in answer_logprobs(engine.model, [(prefix, [token]) for token in pair])]
            by_cpp = [row.logprobs[0] for row in score(f16, [(prefix, [token]) for token in pair], threads=2)]
            print(
                f"{agreed:4} tokens, then {tokenizer.decode(pair[0])!r} (transformers prefers it by "
                f"{by_hf[0] - by_hf[1]:.4f}) or {tokenizer.decode(pair[1])!r} (llama.cpp prefers it by "
                f"{by_cpp[1] - by_cpp[0]:.4f})   {prompt['instruction'][:60]}"
            )
    print(f"{same} of {len(prompts[:count])} answers equal token for token")


if __name__ == "__main__":
    main(read_recipe(Path(sys.argv[1])), Path("build"), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
