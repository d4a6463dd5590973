"""tutor.engines.llamacpp.src: ..."""
