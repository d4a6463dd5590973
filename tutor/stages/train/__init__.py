"""tutor.stages.train: ..."""
