"""tutor.cli: ..."""
