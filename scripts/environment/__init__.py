"""The set-up behind scripts/install.py, on the standard library alone: it runs before any package is installed.

steps       the order: virtual environment, installer, sets of packages, llama.cpp and TypeScript beside them
state       sets of pins, their markers in .venv, the space that they need
installers  commands of uv and of pip; pip's configuration (index, certificates) in uv's variables
jobs        child processes: relayed, ended together
output      progress in place on a terminal, as plain lines elsewhere; readers of the programs' lines
faults      one line for each known way to fail
"""
