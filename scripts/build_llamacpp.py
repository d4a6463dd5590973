"""Build the pinned llama.cpp once and print its folder. The same for `make demo` and for the converter's image."""

import sys

from tutor.engines.llamacpp.source_build import main
from tutor.machine import host

memory = host.memory()
sys.exit(main(host.usable_cores(), memory.total if memory else None))
