"""``python -m vito_kernels.inspect``."""

import sys

from vito_kernels.inspect.compiled import main

if __name__ == "__main__":
    sys.exit(main())
