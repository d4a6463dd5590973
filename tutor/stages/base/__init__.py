"""The base stage: the 16-bit model that is trained, wherever it comes from, checked before anything is spent on it.

In: `base.source` of the recipe: a hub repository at a revision, a local folder, a GGUF in a Python package, or the tiny
model of the tests. Out: base.json with the facts that later stages need, and `model/` where the model had to be made.

`stage` runs it and collects the facts, `hub` fetches a repository, `package` makes a folder of a package's GGUF,
`text_tower` extracts the text model of a multimodal checkpoint,
`tiny_model` makes the tiny Llama, `check` holds the base against llama.cpp's conversion before anything is trained.

Does not quantize, does not run code of a repository, and changes no file of a source.
"""
