"""Things of the user's that are named on a command line: "FILE.py:NAME" or "MODULE:NAME"."""

import importlib
import importlib.util
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_loading = threading.RLock()


def attribute(text: str) -> Any:
    """What has this name in a file or module. What is beside the file can be imported while it is loaded.

    Raises:
        ValueError: there is no such file, module or name, or it raised an error.
    """
    where, _, name = text.rpartition(":")
    path = Path(where)
    if path.suffix == ".py" and not path.is_file():
        raise ValueError(f"{where} is not a file; wanted: FILE.py:{name or 'NAME'}")
    try:
        with importing_beside(where):
            module = _load_file(path) if path.suffix == ".py" else importlib.import_module(where)
    except Exception as error:
        raise ValueError(f"{text}: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"{where} has no {name!r}")
    return getattr(module, name)


@contextmanager
def importing_beside(where: str) -> Iterator[None]:
    """Inside, what is beside the file `where` can be imported; for a module, what is in the current folder."""
    path = Path(where)
    folder = str(path.parent.resolve() if path.suffix == ".py" else Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _load_file(path: Path) -> Any:
    """The module in a file, whatever others have its name."""
    name = f"{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    with _loading:  # ranks may be threads
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]
