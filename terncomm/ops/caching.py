"""Whether the kernels of `_numba` are kept in Numba's cache on disk, and where that is."""

import os

enabled = True  # set to False before `_numba` is imported, if the cache cannot be used


def folder() -> str:
    """The folder of the cache, as Numba chooses it for the files of this package."""
    try:
        from numba.core.caching import FunctionCache

        return str(FunctionCache(folder).cache_path)  # type: ignore[no-untyped-call]
    except Exception:  # this version of Numba does not say, or has no folder
        return os.environ.get("NUMBA_CACHE_DIR") or os.path.join(os.path.dirname(__file__), "__pycache__")
