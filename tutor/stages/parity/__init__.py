"""tutor.stages.parity: ..."""
