"""tutor.stages.data: ..."""
