"""Time and byte counters of a path: seconds per phase, and bytes sent per kind of part."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from torch.profiler import record_function

from terncomm.keys import Key


class Clock:
    """Seconds spent in each phase of the path, and the current phase.

    The time of a nested phase is not counted in the outer phase. Each phase is a range in torch.profiler, such as
    "terncomm encode, bucket 3".
    """

    def __init__(self) -> None:
        self.encode_s = self.exchange_s = self.decode_s = 0.0
        self.wire_s = 0.0  # seconds in which one or more wire threads of the pipeline were in a call
        self.phase = ""  # the current phase; after an error, the phase in which it was raised
        self._since = 0.0
        self._lock = threading.Lock()
        self._calls, self._called_at = 0, 0.0  # calls that wire threads are in, and when the first of them began

    @contextmanager
    def __call__(self, phase: str, bucket: int, part: str = "") -> Iterator[None]:
        """Add the time of the `with` block to `<phase>_s`. part: a more exact name, for profiles only."""
        outer = self.phase
        self._enter(phase)
        with record_function(f"terncomm {part or phase}, bucket {bucket}"):
            yield
        self._enter(outer)

    @contextmanager
    def wire(self) -> Iterator[None]:
        """Count the time of the `with` block. Of blocks that overlap, on several wire threads, it counts once."""
        with self._lock:
            self._calls += 1
            if self._calls == 1:
                self._called_at = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if self._calls == 0:
                    self.wire_s += time.perf_counter() - self._called_at

    def _enter(self, phase: str) -> None:
        now = time.perf_counter()
        if self.phase:
            name = f"{self.phase}_s"
            setattr(self, name, getattr(self, name) + now - self._since)
        self.phase, self._since = phase, now


class Account:
    """The clock, and the bytes that this rank has sent, by label.

    A label is a codec's name, "exact" (no codec), "scales", "checks" (headers), "lengths" or "intra" (inside a node).
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.sent_bytes: Counter[str] = Counter()
        self.rhythms: list[int] = []  # that the ranks have sent with the last header


@dataclass(frozen=True)
class Context:
    """One reduction on one rank: its key, the rank, the world size, and the account of time and bytes."""

    key: Key
    rank: int
    world_size: int
    account: Account = field(default_factory=Account)
    piece: int | None = None  # elements per piece (default PIECE); equal on all ranks; does not change the result
    rhythm: int = 0  # is sent to the other ranks, see terncomm.hooks.rhythm

    def phase(self, name: str, part: str = "") -> AbstractContextManager[None]:
        """Count the time of a `with` block for phase `name`: "encode", "exchange" or "decode". part: see `Clock`."""
        return self.account.clock(name, self.key.bucket, part)

    def count(self, label: str, nbytes: int) -> None:
        """Record that this rank sends `nbytes` to each other rank."""
        self.account.sent_bytes[label] += (self.world_size - 1) * nbytes
