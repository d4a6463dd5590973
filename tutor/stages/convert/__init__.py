"""tutor.stages.convert: ..."""
