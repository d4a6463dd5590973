"""tutor.stages.evaluate: ..."""
