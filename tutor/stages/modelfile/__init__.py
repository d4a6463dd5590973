"""tutor.stages.modelfile: ..."""
