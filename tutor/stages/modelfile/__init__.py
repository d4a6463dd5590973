"""The modelfile stage: the recipe and the served GGUF as a Modelfile and as the JSON of Ollama's POST /api/create.

In: gguf/ (the quantized files of the convert stage), ladder/served.json (which of them is served), adapter/
(its longest answer), the recipe (system text, [generate], [ollama]), the prompt contract (tutor/prompt.py) and the
repository's `Modelfile.j2`.
Out: `model/Modelfile` (for people and `ollama create -f`) and `model/create.json` (the same content as a request).

spec.py     `ModelSpec`, and every check of what Ollama would refuse or silently alter
parse.py    a Modelfile as Ollama's own parser reads it
render.py   a spec as the text of a Modelfile, read back by parse.py and compared with the spec
stage.py    the stage, and the request body that tutor/serving sends

Does not: talk to an Ollama server (tutor/engines/ollama does), publish (tutor/serving does), choose the quantization
(the ladder stage does), import another stage.
"""
