"""tutor.formats.models: ..."""
