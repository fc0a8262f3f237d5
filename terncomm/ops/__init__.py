"""The kernels, and the only place that chooses between their implementations.

`reference` defines every kernel in plain torch. A table gives each device type a back end; what a back end lacks, and
device types without one, the reference serves. The CPU has the Numba kernels of `cpu`, device type "meta" the shapes of
`shapes`, and :func:`use` registers others. Where Numba cannot be imported the reference serves the CPU too, after one
warning: it is some 80 times slower.
"""

import importlib
import itertools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from terncomm.ops import reference, shapes
from terncomm.ops.reference import rounding, split_unit
from terncomm.ops.types import Packing, Rounding
from terncomm.segments import Segments

__all__ = [
    "Packing",
    "Rounding",
    "clip_limit",
    "compile_kernels",
    "decode",
    "decode_rows",
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
    "use",
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


class _Kernels:
    """The back end of the CPU: `cpu`, or `reference` without Numba; compiled when a function is first asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(compile_kernels(), name)


_back_ends: dict[str, object] = {"cpu": _Kernels(), "meta": shapes}
_found: dict[tuple[str, str], Callable[..., Any]] = {}  # by device type and name, until a back end changes
_told: set[tuple[str, str]] = set()


def use(device_type: str, back_end: object | None) -> object | None:
    """Let `back_end` serve the tensors of a device type, such as "cuda"; returns what did before, for another call.

    A back end is a module or an object with some of the functions of :mod:`terncomm.ops.reference`, of the same
    arguments. What it lacks the reference does. `None`: the reference does everything.

    >>> class Mine:
    ...     def peaks(self, flat, segments):
    ...         return torch.zeros(len(segments))
    >>> before = use("cpu", Mine())
    >>> peaks(torch.ones(4), Segments([4]))
    tensor([0.])
    >>> mine = use("cpu", before)
    """
    before = _back_ends.pop(device_type, None)
    if back_end is not None:
        _back_ends[device_type] = back_end
    _found.clear()
    return before


def _function(name: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The function that serves the device of `tensor`."""
    device_type = tensor.device.type
    function = _found.get((device_type, name))
    if function is None:
        function = getattr(_back_ends.get(device_type), name, None)
        if function is None:
            function = getattr(reference, name)
            _tell_fallback(device_type, name)
        _found[device_type, name] = function
    return function


def _tell_fallback(device_type: str, name: str) -> None:
    """Log once that plain torch does what a device has no kernel for; the CPU says it of all its kernels at once."""
    if device_type in ("cpu", "meta") or (device_type, name) in _told:
        return
    _told.add((device_type, name))
    _log.warning(
        "no kernel for %s on %s: plain torch does it, in some 30 passes over the gradients instead of one",
        name,
        device_type,
    )


def _check_width(rows: torch.Tensor, how: Packing, length: int) -> None:
    if rows.shape[1] < how.nbytes(length):
        raise ValueError(f"{length} codes take rows of {how.nbytes(length)} bytes, got {tuple(rows.shape)}")


def _check_edges(edges: Sequence[int], rows: int, segments: Segments, length: int) -> None:
    if len(edges) != rows + 1:
        raise ValueError(f"{rows} rows have {rows + 1} edges, got {len(edges)}")
    fits = all(0 <= end - begin <= length for begin, end in itertools.pairwise(edges))
    if not fits or edges[0] < 0 or edges[-1] > segments.numel:
        raise ValueError(
            f"edges must rise from 0 or more to at most {segments.numel}, by at most {length}, got {list(edges)}"
        )


def _check_top(top: int) -> None:
    if not 1 <= top <= 127:
        raise ValueError(f"code + top is kept in 8 bits: top must be in 1..127, got {top}")


def peaks(flat: torch.Tensor, segments: Segments) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.peaks`."""
    return _function("peaks", flat)(flat, segments)  # type: ignore[no-any-return]


def moments(flat: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`terncomm.ops.reference.moments`."""
    return _function("moments", flat)(flat, segments)  # type: ignore[no-any-return]


def clip_limit(
    peak: torch.Tensor, total: torch.Tensor, squares: torch.Tensor, lengths: torch.Tensor, clip: float
) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.clip_limit`."""
    if peak.is_meta:
        return shapes.clip_limit(peak)
    return reference.clip_limit(peak, total, squares, lengths, clip)


def encode(flat: torch.Tensor, segments: Segments, how: Rounding) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.encode`."""
    return _function("encode", flat)(flat, segments, how)  # type: ignore[no-any-return]


def encode_pack(
    flat: torch.Tensor,
    segments: Segments,
    how: Rounding,
    packing: Packing,
    edges: Sequence[int],
    length: int,
    out: torch.Tensor,
) -> None:
    """See :func:`terncomm.ops.reference.encode_pack`."""
    _check_width(out, packing, length)
    _check_edges(edges, len(out), segments, length)
    out = out[:, : packing.nbytes(length)]
    _function("encode_pack", flat)(flat, segments, how, packing, edges, length, out)


def pack(codes: torch.Tensor, how: Packing, out: torch.Tensor | None = None) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.pack`."""
    if out is not None and out.shape != (how.nbytes(len(codes)),):
        raise ValueError(f"{len(codes)} codes take {how.nbytes(len(codes))} bytes, got room for {tuple(out.shape)}")
    return _function("pack", codes)(codes, how, out)  # type: ignore[no-any-return]


def unpack_sum(rows: torch.Tensor, how: Packing, count: int) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.unpack_sum`."""
    _check_width(rows, how, count)
    return _function("unpack_sum", rows)(rows, how, count)  # type: ignore[no-any-return]


def decode(totals: torch.Tensor, segments: Segments, unit: torch.Tensor, begin: int, out: torch.Tensor) -> None:
    """See :func:`terncomm.ops.reference.decode`."""
    _function("decode", out)(totals, segments, unit, begin, out)


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
    _check_width(rows, how, length)
    _check_edges((begin, end), 1, segments, length)
    _function("unpack_decode", out)(rows, how, segments, unit, begin, end, length, out)


def decode_rows(
    rows: torch.Tensor,
    how: Packing,
    segments: Segments,
    unit: torch.Tensor,
    edges: Sequence[int],
    length: int,
    out: torch.Tensor,
) -> None:
    """See :func:`terncomm.ops.reference.decode_rows`."""
    _check_width(rows, how, length)
    _check_edges(edges, len(rows), segments, length)
    _function("decode_rows", out)(rows, how, segments, unit, edges, length, out)


def narrow(totals: torch.Tensor, window: Segments, keys: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`terncomm.ops.reference.narrow`."""
    _check_top(top)
    return _function("narrow", totals)(totals, window, keys, top)  # type: ignore[no-any-return]


def widen(codes: torch.Tensor, window: Segments, divisor: torch.Tensor, top: int) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.widen`."""
    _check_top(top)
    return _function("widen", codes)(codes, window, divisor, top)  # type: ignore[no-any-return]
