"""The train stage: QLoRA on the rows of the train split.

In: data/ (train and held-out rows), base/ (the base model's folder and facts), the recipe's [train] settings, and the
plan of machine/memory/plan.py (precision, quantization, micro-batches, layers in RAM). Out: adapter/ with a PEFT LoRA
in FP16, metrics.jsonl and training.svg; checkpoints and a running log beside it.

- stage.py: the order of the steps, and the results of the stage.
- audit.py: rows as ids and labels, and the check that the trainer's collator passes them on unchanged.
- trainer.py: TRL's SFTTrainer, its arguments, the LoRA, the model loaded as planned.
- loop.py: the training itself, the best adapter, the stage's files.
- monitor.py, metrics.py, plot.py: evaluations, early stop, reports, speed and memory, the chart.
- held_out_loss.py: the loss on the held-out rows, without an effect on the training.
- checkpoint.py, checkpoint_callback.py: which checkpoint is safe to resume from; when one is saved.
- kernels/: faster or smaller implementations of parts of a step.

Does not choose the device, the precision or the micro-batches, does not merge, and does not generate answers.
"""
