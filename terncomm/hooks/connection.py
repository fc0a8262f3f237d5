"""Connects the ranks of a hook, and passes the error of a failing rank to the others."""

import json
import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from terncomm.hooks.agreement import agree_on
from terncomm.torch_internals import gloo_options_like, nccl_options, store_of, timeout_of
from terncomm.transports import Metered, ProcessGroupTransport, RankFailed
from terncomm.transports.process_group import backend_for

_log = logging.getLogger("terncomm")

T = TypeVar("T")

_POLL_S = 0.02  # longest pause between two looks into the store
_UNREADABLE = 80  # bytes of a note that is not understood that an error shows
_NOTICE_S = 10.0  # after waiting so long for other ranks, one warning is logged


class Connection:
    """A private process group over the ranks of another one, and notes in which a failing rank leaves its error.

    For gloo and NCCL the group is not registered with torch.distributed. So it does not count in the numbering of
    groups, `destroy_process_group` does not end it, and only the hook refers to it.

    Args:
        transport: over all ranks of the group.
        group: the transport inside `transport`, for closing it.
        notes: where ranks leave their errors.
        open_subgroup: makes a transport over some of the ranks; see :meth:`subgroup`.
    """

    def __init__(
        self,
        transport: Metered,
        group: ProcessGroupTransport,
        notes: "FailureNotes",
        open_subgroup: Callable[[str, list[int]], ProcessGroupTransport],
    ) -> None:
        self.transport = transport
        self._groups = [group]
        self._notes = notes
        self._open_subgroup = open_subgroup

    def subgroup(self, name: str, ranks: list[int]) -> Metered:
        """Open a transport over some of the ranks, including this one. Collective over them. :meth:`fail` closes it.

        Args:
            name: of the new group, equal on its ranks.
            ranks: numbers in this connection's group, in the order of the new group.

        Raises:
            RankFailed: these ranks could not connect.
        """
        try:
            transport = self._open_subgroup(name, ranks)
        except RuntimeError as error:
            lost = RankFailed(f"could not connect to ranks {ranks}: {error}")
            raise self.fail(lost, f"connecting the group {name!r}") from error
        self._groups.append(transport)
        return Metered(transport)

    def fail(self, error: Exception, where: str) -> Exception:
        """Post an error for the other ranks, close all groups, and return the error to raise.

        Args:
            error: a `RankFailed` is returned with what the other ranks posted, another error as it is.
            where: what this rank was doing, in words.
        """

        def close_groups() -> None:  # so that ranks that wait for this one raise now, not at the timeout
            _release(error)
            for group in self._groups:
                group.close()

        return self._notes.report(error, where, close_groups)


def _release(error: BaseException | None) -> None:
    """Clear the frames in an error's tracebacks: they refer to the group, which closes when nothing refers to it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class FailureNotes:
    """Notes of failing ranks for the others, one per rank, in a store of all ranks. The store may be lost at any time.

    Args:
        store: of the group.
        ranks: global ranks, in the order of the group.
        rank: this rank's number in the group.
        limits: `patience_s` is how long to wait for the notes of other ranks, and again for them to read this rank's.
    """

    def __init__(self, store: Store, ranks: list[int], rank: int, limits: "Limits") -> None:
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


def connect(group: dist.ProcessGroup, device: torch.device, configuration: dict[str, Any]) -> Connection:
    """Wait for all ranks of `group`, make a private group over them, and compare configurations. Collective.

    Args:
        group: the framework's process group; its timeout applies, also when it is changed later.
        device: of the gradients.
        configuration: see :func:`terncomm.hooks.agreement.agree_on`.

    Raises:
        RankFailed: a rank did not call this within the group's timeout, or failed meanwhile.
        ConfigurationsDiffer: ranks are configured differently.
    """
    theirs = backend_for(group, device)
    limits = Limits(theirs)
    rank, world_size = group.rank(), group.size()
    store = store_of(group)
    counter, whole = f"terncomm/connections/{rank}", store
    try:
        number = within(limits.timeout().total_seconds(), lambda: whole.add(counter, 1))
    except RuntimeError as error:
        raise RankFailed(
            f"the job's store cannot be reached: the rank that serves it, often rank 0, has ended or is stuck ({error})"
        ) from error
    store = PrefixStore(f"terncomm/{number}", whole)
    ranks = dist.get_process_group_ranks(group)
    notes = FailureNotes(store, ranks, rank, limits)
    try:
        _meet(store, ranks, rank, limits.timeout().total_seconds())
    except RankFailed:
        with suppress(RuntimeError):  # undo: a late rank must not count on this one, which may register again
            within(1.0, lambda: (store.delete_key(f"here/{rank}"), whole.add(counter, -1)))
        raise

    def opened(store: Store, some: list[int]) -> ProcessGroupTransport:
        own = _backend_like(theirs, store, some.index(rank), len(some), limits.timeout())
        if own is None:
            return ProcessGroupTransport(_registered([ranks[each] for each in some], limits.timeout()))
        return ProcessGroupTransport(own, limits.timeout)

    def adapted(transport: ProcessGroupTransport) -> ProcessGroupTransport:
        if theirs.name() == "gloo":
            transport.adapt()
        return transport

    def subgroup(name: str, some: list[int]) -> ProcessGroupTransport:
        return adapted(opened(PrefixStore(f"{name}/{some[0]}", store), some))

    try:
        transport = opened(store, list(range(world_size)))
    except RuntimeError as error:
        lost = RankFailed(f"could not connect to the other ranks: {error}")
        raise notes.report(lost, "connecting", lambda: None) from error
    connection = Connection(Metered(transport), transport, notes, subgroup)
    try:
        agree_on(configuration, connection.transport, device=device)
        adapted(transport)
    except RankFailed as error:
        raise connection.fail(error, "comparing configurations") from error
    return connection


def _meet(store: Store, ranks: list[int], rank: int, limit_s: float) -> None:
    """Wait at most `limit_s` seconds until all ranks have written their key into the store.

    Raises:
        RankFailed: some have not.
    """
    absent = [other for other in range(len(ranks)) if other != rank]

    def together() -> bool:
        absent[:] = [other for other in absent if not store.check([f"here/{other}"])]
        return not absent

    def names() -> str:
        return ", ".join(str(ranks[other]) for other in absent)

    lost, begin = "", time.monotonic()
    first_s = min(_NOTICE_S, limit_s)
    rest_s = limit_s - first_s
    try:
        within(first_s + 1, lambda: store.set(f"here/{rank}", ""))
        if within(first_s + 1, lambda: poll(together, first_s)):
            return
        if rest_s > 0:
            _log.warning("waiting for rank %s to register its hook, at most %.0f s more", names(), rest_s)
            if within(rest_s + 1, lambda: poll(together, rest_s)):
                return
    except RuntimeError as error:  # the rank that serves the store has ended, most likely by this same timeout
        lost = f" (the store cannot be reached: {error})"
    raise RankFailed(
        f"rank {names()} has not come within {time.monotonic() - begin:.0f} s. Every rank must call terncomm.register "
        "(or make a GradientAverager, or register terncomm.comm_hook and run backward) equally often. If a rank was "
        "killed, see its output" + lost + "."
    )


def _backend_like(theirs: Any, store: Store, rank: int, world_size: int, limit: timedelta) -> Any:
    """A gloo or NCCL backend with the options of `theirs`, over `world_size` ranks; None for other backends."""
    if theirs.name() == "gloo":
        return dist.ProcessGroupGloo(store, rank, world_size, gloo_options_like(theirs, limit))
    if theirs.name() == "nccl":
        return dist.ProcessGroupNCCL(store, rank, world_size, nccl_options(limit))
    return None


def _registered(ranks: list[int], limit: timedelta) -> Any:
    # Local synchronization: ranks outside this group need not take part.
    return dist.new_group(ranks, timeout=limit, use_local_synchronization=True)
