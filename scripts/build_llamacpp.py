"""Build the pinned llama.cpp once and print its folder. The same for `make demo` and for the converter's image."""

import sys

from tutor.engines.llamacpp.source_build import main

sys.exit(main())
