"""transformers as an engine: the reference that the other engines are compared with.

In: model folders on this disk (the base, a merged model), a PEFT adapter folder, a precision and a quantization that
the caller has decided (machine/device.py). Out: answers of the `Engine` protocol, log-probabilities of given answers,
greedy traces with their most probable tokens.

- engine.py: answers a conversation; streams the text and ends at EOS or at a stop text.
- loading.py: loads a model folder in NF4, in int8 or in 16 or 32 bits, with an adapter on it or without.
- score.py: teacher-forced log-probabilities of a loaded model.
- trace.py: scores and greedy traces in the form that the parity stage compares.
- streaming_score.py: log-probabilities of a model that is never in memory as a whole, one decoder layer at a time.
- products.py: matrix products on the CPU by the faster library.
- nf4.py: NF4 quantization and dequantization of one weight, in pieces.

Does not fetch, train or merge a model, does not choose the device's precision, and never runs code that a model folder
brings.
"""
