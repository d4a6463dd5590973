"""Formats of models: Hugging Face folders, safetensors files, GGUF files, and what one implies for another.

In: model folders and files, none of them trusted. Out: facts, headers, tensors, and lists of differences.

`base_source` knows where a base may come from, `model_folder` the folder and its tokenizer, `safetensors` the headers
of weight files, `tensor_streams` their data piece by piece. `gguf` reads GGUF files, `gguf_metadata` and `gguf_weights`
compare one with the folder it was made of, `pre_tokenizer` names how a tokenizer splits. `served_quantization` has the
one rule for which quantization is served.

Does not download, convert, quantize or load a model for inference.
"""
