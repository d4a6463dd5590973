"""tutor.serving: ..."""
