"""Every setting of a run, each default once.

In: a TOML file. Out: a frozen `Recipe` (settings.py), read and checked by reading.py; the names of llama.cpp's
quantizations (quantizations.py), and those of models in Ollama (ollama_names.py). Imports no library but pydantic,
reads no file but the recipe, and imports no stage.
"""
