"""The kernels. This module chooses between their implementations; no other module does.

`reference` defines every kernel in plain torch. A table maps each device type to a back end: "cpu" to the Numba kernels
of `cpu`, "meta" to the shapes of `shapes`. :func:`use` registers others. The reference runs if a device type has no
back end, or if neither its back end nor the built-in one has the kernel. If Numba cannot be imported, the reference
runs on the CPU too, about 80 times slower, and one warning is logged.
"""

import importlib
import itertools
import logging
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from terncomm.ops import caching, reference, shapes
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

_LOCK_S = 60.0  # several times the usual compile time


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Hold this user's compile lock, so that one process compiles and the others load its cache.

    Waits at most _LOCK_S seconds, because the process that holds the lock may hang. Then compiles without the lock.
    """
    try:
        import fcntl

        lock = os.open(_private_folder() / "compile.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except (ImportError, OSError):  # no flock, or no folder for the lock file
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
    """A folder in the temporary directory that only this user can write to; made if missing.

    Raises:
        OSError: the folder cannot be made; or it is no folder, belongs to another user, or others can write to it.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"terncomm-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid"):
        found = folder.lstat()  # one look, which does not follow a link
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022:
            raise PermissionError(
                f"{folder} is not a folder that only you can write to: remove it, or set TMPDIR to a directory of your "
                "own"
            )
    return folder


def _import_kernels() -> ModuleType:
    """Import `cpu`. If Numba cannot keep its cache beside the package: in the temporary folder, or not at all."""
    try:
        return importlib.import_module("terncomm.ops.cpu")
    except ImportError:
        raise
    except Exception as error:  # such as a full disk, a file of the cache that is cut off, or no folder for it
        failed, folder = error, caching.folder()
    if isinstance(failed, RuntimeError) and "cannot cache" in str(failed):  # read-only installation, and no home folder
        try:
            folder = str(_private_folder() / "numba")
            importlib.import_module("numba").config.CACHE_DIR = folder
            return importlib.import_module("terncomm.ops.cpu")
        except Exception as error:
            failed = error
    caching.enabled = False
    for name in ("cpu", "_numba"):
        sys.modules.pop(f"terncomm.ops.{name}", None)
    module = importlib.import_module("terncomm.ops.cpu")
    _log.warning(
        "Numba's cache in %s cannot be used (%s: %s). This process compiles its kernels without it. If a file there is "
        "damaged, remove the folder",
        folder,
        type(failed).__name__,
        failed,
    )
    return module


def _resident_mb() -> float:
    """Resident memory of this process in MB; 0 where /proc does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, ValueError):
        return 0.0


@cache
def compile_kernels() -> ModuleType:
    """Compile the CPU kernels, or load them from Numba's cache, and log what it took of time and memory.

    Returns:
        Module `cpu`; or `reference`, after a warning, if Numba cannot be imported.
    """
    begin, before_mb = time.perf_counter(), _resident_mb()
    try:
        importlib.import_module("numba")  # before the lock is taken: only compiling needs it
        with _one_at_a_time():
            module = _import_kernels()
    except ImportError as error:
        _log.warning("Numba is not usable (%s): encoding on the CPU falls back to plain torch, ~80x slower", error)
        return reference
    grown_mb = _resident_mb() - before_mb
    _log.info("CPU kernels ready in %.1f s; Numba takes %.0f MB of memory", time.perf_counter() - begin, grown_mb)
    return module


class _Kernels:
    """The back end of the CPU: `cpu`, or `reference` without Numba. The first access to a kernel compiles them all."""

    def __getattr__(self, name: str) -> Any:
        return getattr(compile_kernels(), name)


# What a back end may have. `rounding`, `split_unit` and `clip_limit` are no kernels: they run on one number per layer.
_KERNELS = (
    *("peaks", "moments", "encode", "encode_pack", "pack", "unpack_sum", "decode", "unpack_decode", "decode_rows"),
    *("narrow", "widen"),
)
_BUILT_IN: dict[str, object] = {"cpu": _Kernels(), "meta": shapes}
_back_ends: dict[str, object] = dict(_BUILT_IN)
_found: dict[tuple[str, str], Callable[..., Any]] = {}  # by device type and kernel; cleared when a back end changes
_told: set[tuple[str, str]] = set()


def use(device_type: str, back_end: object | None) -> object | None:
    """Use the kernels of `back_end` for tensors of a device type, such as "cuda".

    Args:
        device_type: as in `torch.device.type`.
        back_end: a module or an object with some of the kernels of :mod:`terncomm.ops.reference`, with the same
            arguments: peaks, moments, encode, encode_pack, pack, unpack_sum, decode, unpack_decode, decode_rows,
            narrow, widen. What it lacks, the built-in kernels do on the CPU, and the reference elsewhere; they do not
            call the kernels of `back_end`. None: the reference runs for all.

    Returns:
        The back end that was registered before, or None; give it to `use` to restore it.

    Raises:
        ValueError: `device_type` is not the name of a device type.
        TypeError: `back_end` has none of the kernels.

    >>> class Mine:
    ...     def peaks(self, flat, segments):
    ...         return torch.zeros(len(segments))
    >>> before = use("cpu", Mine())
    >>> peaks(torch.ones(4), Segments([4]))
    tensor([0.])
    >>> mine = use("cpu", before)
    """
    try:
        known = torch.device(device_type).type == device_type
    except RuntimeError:
        known = False
    if not known:
        raise ValueError(f"wanted a device type, such as 'cpu' or 'cuda', got {device_type!r}")
    if back_end is not None and not any(hasattr(back_end, name) for name in _KERNELS):
        raise TypeError(f"wanted an object with one of the kernels {', '.join(_KERNELS)}, got {back_end!r}")
    before = _back_ends.pop(device_type, None)
    if back_end is not None:
        _back_ends[device_type] = back_end
    _found.clear()
    return before


def _function(name: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The kernel `name` for the device of `tensor`, from its back end or the reference."""
    device_type = tensor.device.type
    function = _found.get((device_type, name))
    if function is None:
        back_end = _back_ends.get(device_type)
        function = getattr(back_end, name, None)
        if function is None and back_end is not None:
            function = getattr(_BUILT_IN.get(device_type), name, None)
        if function is None:
            function = getattr(reference, name)
            _tell_fallback(device_type, name)
        _found[device_type, name] = function
    return function


def _tell_fallback(device_type: str, name: str) -> None:
    """Warn, once per device type and kernel, that plain torch runs. For the CPU, `compile_kernels` has warned."""
    if device_type in ("cpu", "meta") or (device_type, name) in _told:
        return
    _told.add((device_type, name))
    _log.warning(
        "no kernel for %s on %s: plain torch runs instead, with about 30 passes over the gradients instead of one",
        name,
        device_type,
    )


def _check_width(rows: torch.Tensor, how: Packing, length: int) -> None:
    if rows.shape[1] < how.nbytes(length):
        raise ValueError(f"{length} codes take rows of {how.nbytes(length)} bytes, got shape {tuple(rows.shape)}")


def _check_edges(edges: Sequence[int], rows: int, segments: Segments, length: int) -> None:
    if len(edges) != rows + 1:
        raise ValueError(f"{rows} rows need {rows + 1} edges, got {len(edges)}")
    fits = all(0 <= end - begin <= length for begin, end in itertools.pairwise(edges))
    if not fits or edges[0] < 0 or edges[-1] > segments.numel:
        raise ValueError(
            f"edges must ascend within 0..{segments.numel}, in steps of at most {length}, got {list(edges)}"
        )


def _check_top(top: int) -> None:
    if not 1 <= top <= 127:
        raise ValueError(f"code + top is stored in 8 bits: top must be in 1..127, got {top}")


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
        raise ValueError(f"{len(codes)} codes take {how.nbytes(len(codes))} bytes, out has shape {tuple(out.shape)}")
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
