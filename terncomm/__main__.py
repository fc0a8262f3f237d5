"""`python -m terncomm` is `terncomm`."""

import sys

from terncomm.cli import main

if __name__ == "__main__":
    sys.exit(main())
