"""The merge stage: LoRA adapter + base model -> one model folder in 16 bits.

In: base/ (the base model's folder and facts), adapter/ (the train stage's LoRA and manifest), the recipe's [merge]
settings. Out: merged/ with weight files of the same names and tensors as the base's, its configuration with the new
dtype, its tokenizer files unchanged, and our chat template.

- stage.py: take the base weights (original, or NF4 as training saw them), write the shards, copy the other files.
- weights.py: the merged tensors, computed in pieces when they are needed, checked for overflow.
- peft_adapter.py: read a PEFT LoRA adapter (DoRA and rsLoRA included) and compute the rows that it changes.

Does not load a model into memory, does not train, does not quantize the output, and does not merge an adapter variant
whose arithmetic is not implemented: such a variant is an error that names the setting.
"""
