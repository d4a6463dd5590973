"""Programs of the pinned llama.cpp, run as child processes.

In: model folders, GGUF files, conversations, rows of token ids. Out: GGUF files, log-probabilities, answers.

build    builds llama.cpp from source and finds the build
process  starts a program: killed with its parent, no options from the environment, a complete file or none
convert  F16 GGUF of a model folder, quantizations, importance matrices
adapter  GGUF of a LoRA adapter
score    log-probabilities of given answers, KL divergence from a reference
server   llama-server as an `Engine`
trace    prompts and greedy traces of a llama-server
src/      the source of our scorer, scripts that start llama.cpp's converters

Does not import torch, does not build at run time, and does not check the content of files (the convert stage does).
"""
