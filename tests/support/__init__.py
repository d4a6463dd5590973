"""Code that several test files share.

processes    run `tutor` and Docker; kill, interrupt and observe processes
fakes        Ollama, Docker, nvidia-smi, llama.cpp's programs, the TypeScript compiler
models       small models, tokenizers, weights and GGUF files
outputs      rows, prompts, records and folders in the form in which the stages write them
shared       folders that are made once a test run
tolerances   bounds of rounding errors
files, json_values, html_pages: small helpers; tiny.toml: the recipe of the tiny model; go_template: Go's renderer
"""
