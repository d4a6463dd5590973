"""What happens to finished models: queried, compared, published to Ollama, promoted, verified.

In: the build folder of a recipe whose stages have run, names of models, an Ollama server.
Out: answers, and comparisons of answers; builds of a model on the server, with `latest` as the one in service; records
of what was published and promoted, in the build folder.

    model_names     a name as a user writes it -> a ModelChoice
    models          a ModelChoice -> the engine that answers, and what its answers depend on
    chat            a conversation at the terminal with one engine
    evaluation      the held-out prompts answered by any model, and the answers compared (a package)
    builds          the builds of a model on an Ollama server: create, check, tag, list, roll back
    adapter         `lora/`: the adapter as a separate GGUF, with a Modelfile
    publish         a build folder -> a checked build on the server
    promote         a build -> `latest`, when its parity passed and its answers are not worse
    ollama_parity   a model in Ollama compared with the served GGUF in llama.cpp
    verify          the recorded origin of a GGUF or a published model, recomputed

Trains nothing, makes no stage folder but those of single evaluations, and parses no command line: tutor/cli does.
"""
