"""The forgetting stage: base and tutor predict texts about other subjects, in the served quantization.

In: base/ (its tokenizer), gguf/, ladder/served.json, the texts of the recipe's evaluate.general.
Out: in the manifest the change of the loss with its interval, by language too, and a sentence about it.

stage.py            the stage

A stage of its own, because its texts are scored by llama.cpp, while questions may be asked to any engine.
Does not: generate text, decide whether a model is good enough, import another stage.
"""
