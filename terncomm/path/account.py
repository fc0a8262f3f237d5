"""What a path writes down as it goes: the time of its phases and the bytes of its parts."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from torch.profiler import record_function

from terncomm.keys import Key


class Clock:
    """Seconds spent in each phase of the path, and the phase it is in.

    A phase inside another is counted for itself alone. Each is a range in profiles, "terncomm encode, bucket 3".
    """

    def __init__(self) -> None:
        self.encode_s = self.exchange_s = self.decode_s = 0.0
        self.wire_s = 0.0  # of the pipeline's thread that owns the wire, which nobody else writes
        self.phase = ""  # after an error: the phase in which it came
        self._since = 0.0

    @contextmanager
    def __call__(self, phase: str, bucket: int, part: str = "") -> Iterator[None]:
        """Add the time inside to `<phase>_s`. part: a narrower name, for profiles."""
        outer = self.phase
        self._enter(phase)
        with record_function(f"terncomm {part or phase}, bucket {bucket}"):
            yield
        self._enter(outer)

    def _enter(self, phase: str) -> None:
        now = time.perf_counter()
        if self.phase:
            name = f"{self.phase}_s"
            setattr(self, name, getattr(self, name) + now - self._since)
        self.phase, self._since = phase, now


class Account:
    """The clock, and how many bytes this rank has sent for each kind of part: "exact", "scales", or a codec's name."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.sent_bytes: Counter[str] = Counter()


@dataclass(frozen=True)
class Context:
    """One reduction on one rank: which it is, who takes part, and where time and bytes are written down."""

    key: Key
    rank: int
    world_size: int
    account: Account = field(default_factory=Account)
    piece: int | None = None  # elements of a bucket's pieces; equal on all ranks, and no bit depends on it

    def phase(self, name: str, part: str = "") -> AbstractContextManager[None]:
        """The time inside is of this phase: "encode", "exchange" or "decode". part: a narrower name, for profiles."""
        return self.account.clock(name, self.key.bucket, part)

    def count(self, label: str, nbytes: int) -> None:
        """This rank sends so many bytes to each other rank."""
        self.account.sent_bytes[label] += (self.world_size - 1) * nbytes
