"""tutor.engines.llamacpp: ..."""
