"""tutor.stages.merge: ..."""
