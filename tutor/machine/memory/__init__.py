"""tutor.machine.memory: ..."""
