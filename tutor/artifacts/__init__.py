"""tutor.artifacts: ..."""
