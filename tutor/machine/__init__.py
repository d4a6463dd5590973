"""What a run takes, and whether this machine has it: memory, disk, time, precision, processes.

In: a recipe, a build folder, and the machine (/proc, nvidia-smi, docker, PyTorch). Out: plain values, a `TrainingPlan`,
a report for `tutor doctor`, or a HostError with the next step.

Modules, each using only those below it:

    doctor         the report of `tutor doctor`
    preflight      requirements of the Compose stack on this host
    capacity       whether a recipe fits; the plan of its training
    run_cost       disk space and time by stage; the check of free disk space
    memory.plan    quantization, checkpointing, resident layers, tokens of a micro-batch: decided once
    memory         estimate of a training step, row lengths, shapes of models, micro-batches
    device         precision and available memory: decided once
    matmul_rate    rate of matrix products on the CPU, measured
    container_host Docker, the kind of its daemon, the Compose project of this checkout
    host           GPUs, memory, processor and disks, read without torch
    distributed    processes of one training: rank, world size, broadcast, all_gather
    watchdog       finds work that hangs in native code

A forecast is made before the base is fetched, from the rows' characters, and refuses what certainly cannot run. The
plan is made once, right before the train stage, when the rows can be counted with the base's tokenizer.

Runs no stage, loads no model, changes nothing. `device`, `matmul_rate` and `distributed` import torch when needed.
"""
