"""The eleven stages of the pipeline, one package each.

In: a recipe and the folders of earlier stages. Out: one stage folder each: files, and results for its manifest.
`stage.py` of a package holds `run(recipe, inputs, out)`, which writes into `out` and returns the results; the other
modules of the package are its parts. A stage imports no other stage: they share files, not code. What two stages need
lies below them, in machine, engines, graders or formats.

data       checks the rows and splits them                     ladder     quantization benchmark: size, loss, speed
base       fetches or makes the base model                     parity     compares transformers, llama.cpp and files
train      trains the LoRA adapter                             modelfile  renders the Modelfile
merge      merges the adapter into the 16-bit base             forgetting scores general texts with base and tutor
convert    makes the GGUF files                                evaluate   answers the held-out prompts and grades them
                                                               report     writes the page and the model card

The stages do not decide whether they run (tutor.pipeline does) and do not load anything into Ollama (tutor.serving).
"""
