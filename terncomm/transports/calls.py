"""The calls of a transport that goes over a library: what happens when one of them fails."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from terncomm.transports.base import RankFailed

_abandoned: dict[str, list[Any]] = {}  # by library: buffers of failed calls, to which it may still write


def has_failed(library: str) -> bool:
    """Whether a call over a library has failed in this process."""
    return library in _abandoned


class Calls:
    """The calls of one transport. After a failed or interrupted one, every later one is refused.

    Calls cannot be taken back. A later call could receive what belongs to the failed one, and the library may still
    read or write the buffers of all calls that are under way. These are kept until the process ends.

    Args:
        library: its name, for messages.
        errors: exceptions of the library that are raised as `RankFailed`.
    """

    def __init__(self, library: str, errors: tuple[type[Exception], ...] = ()) -> None:
        self._library = library
        self._errors = (*errors, TimeoutError, ConnectionError)
        self._broken = ""
        self._under_way: dict[int, tuple[Any, ...]] = {}
        self._begun = 0

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Start a call, or wait for one: any error here, an interrupt too, is the end of all calls.

        Raises:
            RankFailed: an earlier call has failed, or one of the library's errors.
        """
        if self._broken:
            raise RankFailed(f"an earlier exchange over {self._library} failed, so none can follow: {self._broken}")
        try:
            yield
        except BaseException as error:
            self._broken = str(error) or type(error).__name__
            _abandoned.setdefault(self._library, []).append(self._under_way)
            if isinstance(error, self._errors):
                raise RankFailed(f"the exchange with other ranks broke off: {self._broken}") from error
            raise

    def hold(self, *objects: Any) -> int:
        """Keep the buffers of a call alive until it is released; returns the number of the call, from 1."""
        self._begun += 1
        self._under_way[self._begun] = objects
        return self._begun

    def release(self, number: int) -> None:
        """The library has ended a call and does not touch its buffers any more."""
        del self._under_way[number]


def poll(
    done: Callable[[], bool],
    *,
    timeout_s: float,
    world_size: int,
    pause_s: float,
    look: Callable[[], None] = lambda: None,
    look_s: float = 0.5,
) -> None:
    """Return when `done()` is true; call `look` from time to time meanwhile, which may raise.

    Raises:
        TimeoutError: it is not true within `timeout_s`.
    """
    began, next_look_s = time.monotonic(), look_s
    while not done():
        waited_s = time.monotonic() - began
        if waited_s > next_look_s:
            next_look_s += look_s
            look()
        if waited_s > timeout_s:
            raise TimeoutError(f"not all of {world_size} ranks have come within {timeout_s:g} s")
        time.sleep(pause_s)
