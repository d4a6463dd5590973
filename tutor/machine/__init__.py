"""tutor.machine: ..."""
