"""Faster or smaller implementations of parts of a training step. Loss and gradients stay those of the plain parts.

In: a PEFT model and TRL's batches. Out: the model with a part replaced, or a loss.

- packed_attention.py: several rows in one sequence, without padding and without attention across rows.
- chunked_loss.py: cross entropy on the CPU in tiles, instead of all logits at once.
- fast_dropout.py: dropout on the CPU from a parallel random source.
- fused_layers.py: a decoder layer on the CPU as two functions with their own backward pass, made of
  causal_attention.py (grouped queries, row by row) and lora_linear.py (a frozen layer and its adapter), with the
  products of engines/hf/products.py.
- layer_streaming.py: frozen weights of some layers stay in RAM and are copied to the GPU when they are used.

Does not decide when a kernel is used: trainer.py and the memory plan do. Does not read recipes or rows.
"""
