"""tutor.pipeline: ..."""
