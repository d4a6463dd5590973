"""Memory of a training: its estimate, and the plan that fits the device.

In: a model's shape, a recipe's train settings, the rows' lengths, the device's memory. Out: bytes by part, and a
`TrainingPlan` or a refusal.

    plan           the decisions: quantization, checkpointing, resident layers, tokens of a micro-batch
    estimate       peak bytes of a training step, by part
    row_lengths    tokens of each row: counted, or estimated from characters
    shapes         sizes of Llama models
    batching       split of an optimizer step's rows into micro-batches

Reads no device (machine/device.py does) and loads no weights.
"""
