"""`python -m terncomm` runs the command `terncomm`."""

import sys

from terncomm.cli import main

if __name__ == "__main__":
    sys.exit(main())
