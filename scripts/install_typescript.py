"""Install the pinned TypeScript compiler once and print its folder. The same for `make demo` and for the image."""

import sys

from tutor.graders.typescript.install import main

sys.exit(main())
