"""tutor.formats: ..."""
