"""Notes in which a failing rank leaves its error for the others, and how long ranks wait for them."""

import json
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from terncomm.hooks.meeting import poll, within
from terncomm.torch_internals import timeout_of
from terncomm.transports import RankFailed

_log = logging.getLogger("terncomm")

_UNREADABLE = 80  # bytes of a note that is not understood that an error shows


class Limits:
    """How long the private group may wait: so long that a failure is told within the timeout of the framework's group.

    That timeout may be changed at any time, so it is read again for each use.

    Args:
        theirs: the backend of the framework's group.
    """

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    @property
    def patience_s(self) -> float:
        """Seconds for each of two waits of a failing rank; see :class:`FailureNotes`."""
        return _patience_s(timeout_of(self._theirs))

    def timeout(self) -> timedelta:
        """The timeout of the private group."""
        whole = timeout_of(self._theirs)
        return whole - 2 * timedelta(seconds=_patience_s(whole))


def _patience_s(timeout: timedelta) -> float:
    return min(5.0, timeout.total_seconds() / 10)


class FailureNotes:
    """Notes of failing ranks for the others, one per rank, in a store of all ranks. The store may be lost at any time.

    Args:
        store: of the group.
        ranks: global ranks, in the order of the group.
        rank: this rank's number in the group.
        limits: `patience_s` is how long to wait for the notes of other ranks, and again for them to read this rank's.
    """

    def __init__(self, store: Store, ranks: list[int], rank: int, limits: Limits) -> None:
        self._store = store
        self._ranks = ranks
        self._rank = rank
        self._others = [other for other in range(len(ranks)) if other != rank]
        self._limits = limits
        self._lost = self._posted = False

    def report(self, error: Exception, where: str, close_groups: Callable[[], None]) -> Exception:
        """Post an error for the other ranks, call `close_groups`, and return the error to raise.

        A `RankFailed` is the consequence of an error elsewhere: its message gets what the other ranks posted.

        Args:
            error: of this rank.
            where: what this rank was doing, in words.
            close_groups: closes what the other ranks wait for.
        """
        consequence = isinstance(error, RankFailed)
        self.post({"where": where, "text": f"{type(error).__name__}: {error}", "consequence": consequence})
        close_groups()
        if consequence:
            error = RankFailed(f"{self.explain(self.read())} The error on this rank, in {where}: {error}")
        self.wait_until_read()
        return error

    def post(self, note: dict[str, Any]) -> None:
        """Write this rank's note, if the store can still be reached. Only the first call writes."""
        if not self._posted:
            self._posted = True
            self._try(lambda: self._store.set(f"note/{self._rank}", json.dumps(note)))

    def read(self) -> dict[int, dict[str, Any]] | None:
        """Wait for the other ranks' notes, until all are there, one names a cause, or time is up.

        Returns:
            Notes by rank in the group; None if the store is lost.
        """
        notes: dict[int, dict[str, Any]] = {}

        def enough() -> bool:
            for rank in self._others:
                if rank not in notes and self._store.check([f"note/{rank}"]):
                    notes[rank] = _note(self._store.get(f"note/{rank}"))
            return len(notes) == len(self._others) or any(not note["consequence"] for note in notes.values())

        self._try(lambda: poll(enough, self._limits.patience_s))
        return None if self._lost else notes

    def wait_until_read(self) -> None:
        """Wait a while until the others have read the notes: this process may serve the store."""

        def heard() -> bool:
            self._store.set(f"heard/{self._rank}", "")
            return all(self._store.check([f"heard/{rank}"]) for rank in self._others)

        self._try(lambda: poll(heard, self._limits.patience_s))

    def _try(self, use: Callable[[], Any]) -> None:
        if self._lost:
            return
        try:
            within(self._limits.patience_s + 1, use)
        except RuntimeError as error:
            self._lost = True
            _log.debug("the store is lost: %s", error)

    def explain(self, notes: dict[int, dict[str, Any]] | None) -> str:
        """What happened, in words, from the notes of :meth:`read`."""
        if notes is None:
            return "The job's store does not answer: the rank that serves it, often rank 0, has ended or is stuck."
        if causes := [rank for rank, note in notes.items() if not note["consequence"]]:
            return " ".join(
                f"{self._named(rank)} failed in {notes[rank]['where']}: {notes[rank]['text']}." for rank in causes
            )
        if silent := [rank for rank in self._others if rank not in notes]:
            names = ", ".join(map(self._named, silent))
            return f"No word from {names}: killed, ended or stuck. See the output of that rank."
        return (
            "All ranks lost their connections, and no rank reported another error: check the network, and the timeout "
            "of the process group."
        )

    def _named(self, rank: int) -> str:
        world = self._ranks[rank]
        return f"rank {world}" if world == rank else f"rank {world} ({rank} of its group)"


def _note(received: bytes) -> dict[str, Any]:
    """A rank's note, as it was posted; without control characters, for it is printed on other ranks' terminals."""
    try:
        note = json.loads(received)
        where, text, consequence = note["where"], note["text"], bool(note["consequence"])
    except (ValueError, KeyError, TypeError):
        where, text, consequence = "a step", f"its note cannot be read: {received[:_UNREADABLE]!r}", False
    return {"where": _printable(str(where)), "text": _printable(str(text)), "consequence": consequence}


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in text)
