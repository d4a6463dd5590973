"""tutor.stages.ladder: ..."""
