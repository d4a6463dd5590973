"""From a JSONL file of questions and answers to `ollama run tutor`.

recipe -> data -> base -> train -> merge -> convert -> evaluate: each stage writes one whole-or-absent
folder under `build/<recipe>/`, and the next stage reads that folder's manifest, never the last stage's flags.
`tutor.cli.main` holds the commands, `tutor.pipeline` their order, `tutor.prompt` the prompt that all engines share.
"""
