"""File formats: what other programs and users write, read and checked; and text for pages and the terminal.

In: files of users (rows, Markdown in their texts), of model repositories (Hugging Face folders, safetensors) and of
llama.cpp (GGUF). Out: plain Python values, or one error that names the file and the next step.

`rows/` has the JSON Lines of users and of the data stage, `models/` the formats of weights and their metadata.
`markdown` finds fenced code blocks, `html` renders pages, `chart` computes the geometry of charts. `visible` escapes
control characters and removes secrets; `terminal` alone writes to stdout and stderr.

Does not run a model, start a program or know a stage. The import order within the package is free; of the rest of
tutor it uses artifacts, recipe, prompt and errors alone.
"""
