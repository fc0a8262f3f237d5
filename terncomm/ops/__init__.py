"""The kernels, and the only place that chooses between their implementations.

`reference` defines every kernel in plain torch. CPU tensors take the Numba kernels of `cpu`; other devices take the
reference. Where Numba cannot be imported the reference serves the CPU too, after one warning: it is some 80 times
slower.
"""

import importlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from terncomm.ops import reference
from terncomm.ops.reference import clip_limit, rounding, split_unit
from terncomm.ops.types import Packing, Rounding
from terncomm.segments import Segments

__all__ = [
    "Packing",
    "Rounding",
    "clip_limit",
    "compile_kernels",
    "decode",
    "encode",
    "encode_pack",
    "moments",
    "narrow",
    "pack",
    "peaks",
    "rounding",
    "split_unit",
    "unpack_decode",
    "unpack_sum",
    "widen",
]

_log = logging.getLogger("terncomm")

_LOCK_S = 60.0  # some times what compiling takes


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Hold this user's compile lock, so that one process compiles and the others find its cache.

    Not for ever: whoever holds it may have been stopped. Without it a process compiles for itself.
    """
    try:
        import fcntl

        lock = os.open(_private_folder() / "compile.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except (ImportError, OSError):  # no flock, or nowhere to lock
        yield
        return
    try:
        begin = time.monotonic()
        while time.monotonic() - begin < _LOCK_S:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        else:
            _log.warning("another process has held the compile lock for %.0f s; compiling without it", _LOCK_S)
        yield
    finally:
        os.close(lock)


def _private_folder() -> Path:
    """A folder among temporary files that only this user can write to.

    Raises:
        OSError: there is none; another user has taken the name.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"terncomm-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and (folder.is_symlink() or folder.stat().st_uid != user):
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def _import_kernels() -> ModuleType:
    try:
        return importlib.import_module("terncomm.ops.cpu")
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        import numba  # a read-only installation and no home folder: keep the cache among temporary files

        numba.config.CACHE_DIR = str(_private_folder() / "numba")  # type: ignore[attr-defined]
        return importlib.import_module("terncomm.ops.cpu")


@cache
def compile_kernels() -> ModuleType:
    """Compile the CPU kernels, or load them from Numba's cache; log how long it took. Returns their module."""
    begin = time.perf_counter()
    try:
        importlib.import_module("numba")  # not under the lock: only compiling needs to be done once
        with _one_at_a_time():
            module = _import_kernels()
    except ImportError as error:
        _log.warning("Numba is not usable (%s): encoding on the CPU falls back to plain torch, ~80x slower", error)
        return reference
    _log.info("CPU kernels ready in %.1f s", time.perf_counter() - begin)
    return module


def _for(tensor: torch.Tensor) -> ModuleType:
    return compile_kernels() if tensor.device.type == "cpu" else reference


def peaks(flat: torch.Tensor, segments: Segments) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.peaks`."""
    return _for(flat).peaks(flat, segments)  # type: ignore[no-any-return]


def moments(flat: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`terncomm.ops.reference.moments`."""
    return _for(flat).moments(flat, segments)  # type: ignore[no-any-return]


def encode(flat: torch.Tensor, segments: Segments, how: Rounding) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.encode`."""
    return _for(flat).encode(flat, segments, how)  # type: ignore[no-any-return]


def encode_pack(
    flat: torch.Tensor, segments: Segments, how: Rounding, packing: Packing, begin: int, length: int, out: torch.Tensor
) -> None:
    """See :func:`terncomm.ops.reference.encode_pack`."""
    _for(flat).encode_pack(flat, segments, how, packing, begin, length, out)


def pack(codes: torch.Tensor, how: Packing) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.pack`."""
    return _for(codes).pack(codes, how)  # type: ignore[no-any-return]


def unpack_sum(rows: torch.Tensor, how: Packing, count: int) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.unpack_sum`."""
    return _for(rows).unpack_sum(rows, how, count)  # type: ignore[no-any-return]


def decode(totals: torch.Tensor, segments: Segments, unit: torch.Tensor, begin: int, out: torch.Tensor) -> None:
    """See :func:`terncomm.ops.reference.decode`."""
    _for(out).decode(totals, segments, unit, begin, out)


def unpack_decode(
    rows: torch.Tensor,
    how: Packing,
    segments: Segments,
    unit: torch.Tensor,
    begin: int,
    end: int,
    length: int,
    out: torch.Tensor,
) -> None:
    """See :func:`terncomm.ops.reference.unpack_decode`."""
    _for(out).unpack_decode(rows, how, segments, unit, begin, end, length, out)


def narrow(totals: torch.Tensor, window: Segments, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`terncomm.ops.reference.narrow`."""
    return _for(totals).narrow(totals, window, keys)  # type: ignore[no-any-return]


def widen(codes: torch.Tensor, window: Segments, divisor: torch.Tensor) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.widen`."""
    return _for(codes).widen(codes, window, divisor)  # type: ignore[no-any-return]
