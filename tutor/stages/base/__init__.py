"""tutor.stages.base: ..."""
