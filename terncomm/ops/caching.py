"""Whether the kernels of `_numba` are kept in Numba's cache on disk, and where that is."""

import os
from pathlib import Path

enabled = True  # set to False before `_numba` is imported, if the cache cannot be used


def folder() -> Path:
    """The folder of the cache: that of NUMBA_CACHE_DIR, or beside the source."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    return Path(given) if given else Path(__file__).parent / "__pycache__"
