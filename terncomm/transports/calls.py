"""Error handling of transports that use a communication library."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from terncomm.transports.base import RankFailed

_buffers_of_failed_calls: dict[str, list[Any]] = {}  # by library, which may still write to them


def has_failed(library: str) -> bool:
    """Whether a call of this library has failed in this process."""
    return library in _buffers_of_failed_calls


class Calls:
    """The calls of one transport. After a failed or interrupted call, every later call raises `RankFailed`.

    A call that has started cannot be cancelled. A later call could receive data of the failed one. The library may
    still read or write the buffers of all calls in flight, so these are kept until the process ends.

    Args:
        library: its name, for error messages.
        errors: exceptions of the library that are raised as `RankFailed`, besides TimeoutError and ConnectionError.
    """

    def __init__(self, library: str, errors: tuple[type[Exception], ...] = ()) -> None:
        self._library = library
        self._errors = (*errors, TimeoutError, ConnectionError)
        self._broken = ""
        self._under_way: dict[int, tuple[Any, ...]] = {}
        self._begun = 0

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Context in which a call is started or waited for. After any error in it, Ctrl-C included, no call follows.

        Raises:
            RankFailed: an earlier call has failed, or one of `errors` was raised. Other errors are raised unchanged.
        """
        if self._broken:
            raise RankFailed(f"an earlier exchange over {self._library} failed, so none can follow: {self._broken}")
        try:
            yield
        except BaseException as error:
            self._broken = str(error) or type(error).__name__
            _buffers_of_failed_calls.setdefault(self._library, []).append(self._under_way)
            if isinstance(error, self._errors):
                raise RankFailed(f"the exchange with other ranks broke off: {self._broken}") from error
            raise

    def hold(self, *objects: Any) -> int:
        """Keep the buffers of a new call alive until :meth:`release`; returns the number of the call, from 1."""
        self._begun += 1
        self._under_way[self._begun] = objects
        return self._begun

    def release(self, number: int) -> None:
        """Forget the buffers of a completed call, which the library no longer uses."""
        del self._under_way[number]


def poll(
    done: Callable[[], bool],
    *,
    timeout_s: float,
    world_size: int,
    pause_s: float,
    check: Callable[[], None] = lambda: None,
    check_interval_s: float = 0.5,
) -> None:
    """Wait until `done()` is true.

    Args:
        done: is called again and again.
        timeout_s: how long to wait at most.
        world_size: number of ranks, for the error message.
        pause_s: pause between two calls of `done`.
        check: is called every `check_interval_s` seconds meanwhile; it may raise to end the wait.
        check_interval_s: see there.

    Raises:
        TimeoutError: `done()` was not true within `timeout_s`.
    """
    began, next_check_s = time.monotonic(), check_interval_s
    while not done():
        waited_s = time.monotonic() - began
        if waited_s > next_check_s:
            next_check_s += check_interval_s
            check()
        if waited_s > timeout_s:
            raise TimeoutError(f"not all of {world_size} ranks have come within {timeout_s:g} s")
        time.sleep(pause_s)
