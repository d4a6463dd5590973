"""The convert stage: the merged model as GGUF files, F16 and quantized, each read back and compared.

In: data/ (train.jsonl: its hash, and the text of an importance matrix), base/ (its facts, and its 16-bit weights),
adapter/ (its hash), merged/, the recipe's [convert].
Out: `gguf/tutor-F16.gguf`, `gguf/tutor-<Q>.gguf` for each quantization, with convert.base `gguf/base-<Q>.gguf`, with
convert.imatrix the importance matrices; in the manifest size, error and kept share of the LoRA update of each file.

stage.py                the stage
quantization_error.py   the error of a quantized file by type, and the share of the LoRA update that survives
lineage.py              the key-values `tutor.*` of a GGUF file: hashes of its origin, versions of the software

Does not: merge, choose the quantization to serve (the ladder stage does), publish, import another stage.
"""
