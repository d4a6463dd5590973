"""Programs of the pinned llama.cpp, run as child processes.

In: model folders, GGUF files, conversations, rows of token ids. Out: GGUF files, log-probabilities, answers.

build    builds llama.cpp from source and finds the build
process  starts a program: killed with its parent, no options from the environment, a complete file or none
convert  F16 GGUF of a model folder, quantizations, importance matrices
adapter  GGUF of a LoRA adapter
score    log-probabilities of given answers, KL divergence from a reference
server   llama-server as an `Engine`
trace    prompts and greedy traces of a llama-server
src/     sources of our scorer, starters of llama.cpp's converters

Nothing here imports torch or builds anything at run time, and no file is graded here: the convert stage checks files.
"""
