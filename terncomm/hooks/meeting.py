"""How the ranks of a group find each other through its store, before they open a private group."""

import hashlib
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from terncomm.torch_internals import store_of
from terncomm.transports import RankFailed

_log = logging.getLogger("terncomm")

T = TypeVar("T")

_POLL_S = 0.02  # longest pause between two looks into the store
_NOTICE_S = 10.0  # after waiting so long for other ranks, one warning is logged

_counting = threading.Lock()
_meetings: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()  # how often this process has met a group


def meet(group: dist.ProcessGroup, limit_s: float) -> Store:
    """Wait at most `limit_s` seconds until all ranks of a group have come. Collective.

    Each rank writes a token that was never written before. As soon as a rank has read a token of every rank, it writes
    that it has seen this set. The ranks have met when each of them has seen the same set. A store may outlive its
    processes, as torchrun's does. But nobody has seen what an ended process has left together with the tokens of the
    processes that live now. So ranks meet after any restart, also with another number of ranks.

    Returns:
        The part of the store that belongs to this meeting alone.

    Raises:
        RankFailed: a rank has not come, or the store cannot be reached.
    """
    with _counting:
        number = _meetings[group] = _meetings.get(group, 0) + 1
    store = PrefixStore(f"terncomm/{number}", store_of(group))
    meeting = Meeting(store, dist.get_process_group_ranks(group), group.rank())
    try:
        return meeting.wait(limit_s)
    except RankFailed:
        with _counting:
            _meetings[group] -= 1  # a late rank must not count on this one, which may come again
        meeting.leave()
        raise


class Meeting:
    """One meeting of all ranks of a group; see :func:`meet`.

    Args:
        store: processes that have ended may have met in it, too.
        ranks: global ranks, in the order of the group.
        rank: this rank's number in the group.
    """

    def __init__(self, store: Store, ranks: list[int], rank: int) -> None:
        self._store = store
        self._ranks = ranks
        self._rank = rank
        self._token = uuid.uuid4().hex
        self._seen = ""  # the set of tokens that this rank has seen
        self._absent = list(range(len(ranks)))  # ranks without a token; later those that have not seen this set

    def wait(self, limit_s: float) -> Store:
        """See :func:`meet`."""
        lost, begin = "", time.monotonic()
        first_s = min(_NOTICE_S, limit_s)
        rest_s = limit_s - first_s
        try:
            within(limit_s, self._come)
        except RuntimeError as error:
            raise RankFailed(
                f"the job's store cannot be reached: the rank that serves it, often rank 0, has ended or is stuck "
                f"({error})"
            ) from error
        try:
            if within(first_s + 1, lambda: poll(self._met, first_s)):
                return self._own_part()
            if rest_s > 0:
                _log.warning("waiting for rank %s to register its hook, at most %.0f s more", self._names(), rest_s)
                if within(rest_s + 1, lambda: poll(self._met, rest_s)):
                    return self._own_part()
        except RuntimeError as error:  # the rank that serves the store has ended, most likely by this same timeout
            lost = f" (the store cannot be reached: {error})"
        raise RankFailed(
            f"rank {self._names()} has not come within {time.monotonic() - begin:.0f} s. Every rank must call "
            "terncomm.register (or make a GradientAverager, or register terncomm.comm_hook and run backward) equally "
            f"often. If a rank was killed, see its output{lost}."
        )

    def _come(self) -> None:
        self._store.set(f"token/{self._rank}", self._token)
        self._store.get(f"token/{self._rank}")  # `set` alone does not notice that the store is gone

    def _own_part(self) -> Store:
        return PrefixStore(f"group/{self._seen}", self._store)  # NCCL reads the key "0" there: it must not exist

    def leave(self) -> None:
        """Take back what this rank has written, if the store can still be reached."""
        keys = [f"seen/{self._seen}/{self._rank}"] if self._seen else []
        with suppress(RuntimeError):
            within(1.0, lambda: [self._store.delete_key(key) for key in (*keys, f"token/{self._rank}")])

    def _met(self) -> bool:
        if self._seen:
            self._look_for(f"seen/{self._seen}")
            if not self._absent:
                return True  # first of all: a rank that knows it may be at its next meeting by now
        else:
            self._look_for("token")
        everyone = range(len(self._ranks))
        keys = [f"token/{rank}" for rank in everyone]
        if self._store.check(keys):
            seen = hashlib.sha256(b"".join(self._store.multi_get(keys))).hexdigest()
            if seen != self._seen:
                self._store.set(f"seen/{seen}/{self._rank}", "")
                self._seen, self._absent = seen, list(everyone)
                self._look_for(f"seen/{seen}")
                return not self._absent
        return False

    def _look_for(self, what: str) -> None:
        """Look which ranks have written this. Those that once had are not absent: they may have given up since."""
        self._absent = [rank for rank in self._absent if not self._store.check([f"{what}/{rank}"])]

    def _names(self) -> str:
        """The absent ranks; all others if each of them has been there, and some have given up."""
        absent = self._absent or [rank for rank in range(len(self._ranks)) if rank != self._rank]
        return ", ".join(str(self._ranks[rank]) for rank in absent)


def within(limit_s: float, call: Callable[[], T]) -> T:
    """Return the result of a call that may never return, such as a request to a store whose process is stopped.

    The call runs on a thread of its own, which is left behind if it does not return.

    Raises:
        RuntimeError: no result after `limit_s` seconds.
        Exception: whatever the call raised.
    """
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((call(), None))
        except Exception as error:
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = outcome.get(timeout=limit_s)
    except queue.Empty:
        raise RuntimeError(f"the store has not answered for {limit_s:.0f} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def poll(condition: Callable[[], bool], limit_s: float) -> bool:
    """Wait at most `limit_s` seconds until `condition` is true. Returns whether it became true."""
    begin = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - begin
        if waited_s > limit_s:
            return False
        time.sleep(min(_POLL_S, waited_s / 4 + 1e-3))
    return True
