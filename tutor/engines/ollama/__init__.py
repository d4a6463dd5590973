"""tutor.engines.ollama: ..."""
