"""A 16-bit model folder of the GGUF that a Python package carries.

folder.py      the folder, and its weights
config.py      config.json of the GGUF's metadata
tokenizer.py   the tokenizer
"""
