"""Ctrl-C and its like as an exception that comes once, and not where it would lose a process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    """A context in which the first of `SIGNALS` raises `Interrupted`; later ones are ignored, so clean-up ends."""

    def __enter__(self) -> "Interrupts":
        self._held = False
        self._first: int | None = None
        self._before = {number: signal.signal(number, self._arrived) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A signal that comes in this block raises at its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._first is not None:
            raise Interrupted(self._first)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first = number
            if not self._held:
                raise Interrupted(number)
