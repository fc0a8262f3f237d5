"""`python -m terncomm` is `terncomm`."""

import sys

from terncomm.cli import main

sys.exit(main())
