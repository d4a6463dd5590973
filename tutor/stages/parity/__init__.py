"""The parity stage, a gate: every engine on the way from training to serving gets equal conversations.

In: data/held_out.jsonl, base/, adapter/, merged/, gguf/, ladder/served.json, the recipe's [parity].
Out: `parity/reference.json` (the observations of every engine), `parity/parity.json` (the hand-offs from engine to
engine with their figures, and the refusal where one diverges).

stage.py           the stage: base + adapter -> merged -> F16 -> each quantization
conversations.py   the conversations: held-out rows, and texts that often break tokenizers and templates
collect.py         the observations of transformers and of llama.cpp
compare.py         the comparison of two engines, figure by figure
gate.py            tolerances, hand-offs, the refusal with its likeliest cause
record.py          observations as JSON

Does not: call Ollama (tutor/serving/ollama_parity.py compares the published model with reference.json), change a
tolerance, import another stage.
"""
