"""tutor.engines.hf: ..."""
