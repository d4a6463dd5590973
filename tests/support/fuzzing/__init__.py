"""Damaged inputs made from a seed, and a guard that runs tutor on them and checks what must hold for every input."""
