"""tutor.stages.train.kernels: ..."""
