"""The evaluate stage: the base and the tutor answer the held-out prompts; graders give verdicts; rates are computed.

In: data/ (prompts.jsonl, train.jsonl, held_out.jsonl), base/, gguf/ (the quantized files), ladder/served.json, adapter/
(its longest answer), and the file that the recipe's evaluate.paraphrases may name.
Out: `eval/answers.json`, `eval/paraphrased.json`, and in the manifest rates, differences and findings.

stage.py            the stage
answers.py          generation of all answers, with restarts of a crashed engine and a journal of a killed run
rates.py            verdicts as rates with intervals, and the change between two models
generalization.py   copied training text, paraphrased prompts, and the findings

Does not: grade (tutor/graders does), start the servers of other engines (tutor/serving does, and uses this package),
decide whether a model is good enough, import another stage.
"""
