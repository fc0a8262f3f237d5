"""How the ranks of a hook come together, and what they tell one another when one of them fails."""

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

_POLL_S = 0.02
_NOTICE_S = 10.0  # one log line when other ranks are late by this much


class Connection:
    """A process group of our own over the ranks of another, and a board in its store for last words.

    It is not one of torch.distributed's registered groups, so it neither takes part in their numbering nor ends with
    them; nothing but the hook holds it.
    """

    def __init__(
        self,
        transport: Metered,
        group: ProcessGroupTransport,
        board: "Board",
        open_among: Callable[[str, list[int]], ProcessGroupTransport],
    ) -> None:
        self.transport = transport
        self._groups = [group]
        self._board = board
        self._open_among = open_among

    def among(self, name: str, ranks: list[int]) -> Metered:
        """A transport among some ranks, of which this is one; collective among them. It fails with this connection.

        Raises:
            RankFailed: they do not come together.
        """
        try:
            transport = self._open_among(name, ranks)
        except RuntimeError as error:
            lost = RankFailed(f"could not connect to ranks {ranks}: {error}")
            raise self.fail(lost, f"connecting {name}") from error
        self._groups.append(transport)
        return Metered(transport)

    def fail(self, error: Exception, where: str) -> Exception:
        """Tell the other ranks of an error, let go of the group, and return the error with what they have told.

        where: what this rank was doing, in words.
        """

        def let_go() -> None:  # other ranks in an exchange with this one need not wait for the timeout
            _release(error)
            for group in self._groups:
                group.close()

        return self._board.last_words(error, where, let_go)


def _release(error: BaseException | None) -> None:
    """Forget what the frames of an error hold: the group, above all, which closes when nothing holds it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class Board:
    """One note of each rank, in a store that all of them reach; it may be lost at any time."""

    def __init__(self, store: Store, ranks: list[int], rank: int, patience_s: float) -> None:
        self._store = store
        self._ranks = ranks  # global, in the order of the group
        self._rank = rank
        self._others = [other for other in range(len(ranks)) if other != rank]
        self._patience_s = patience_s  # how long to wait for the notes of others, and then for others to read ours
        self._lost = self._posted = False

    def last_words(self, error: Exception, where: str, let_go: Callable[[], None]) -> Exception:
        """Post an error, let go of what others wait for, and return the error with what they have told."""
        consequence = isinstance(error, RankFailed)
        self.post({"where": where, "text": f"{type(error).__name__}: {error}", "consequence": consequence})
        let_go()
        if consequence:
            error = RankFailed(f"{self.explain(self.read())} Here, in {where}: {error}")
        self.linger()
        return error

    def post(self, note: dict[str, Any]) -> None:
        """Leave this rank's note, if the store can still be reached. The first one stays."""
        if not self._posted:
            self._posted = True
            self._try(lambda: self._store.set(f"note/{self._rank}", json.dumps(note)))

    def read(self) -> dict[int, dict[str, Any]] | None:
        """Notes by rank, as soon as all others have left theirs or one tells a cause; `None` without a store."""
        notes: dict[int, dict[str, Any]] = {}

        def enough() -> bool:
            for rank in self._others:
                if rank not in notes and self._store.check([f"note/{rank}"]):
                    notes[rank] = json.loads(self._store.get(f"note/{rank}"))
            return len(notes) == len(self._others) or any(not note["consequence"] for note in notes.values())

        self._try(lambda: poll(enough, self._patience_s))
        return None if self._lost else notes

    def linger(self) -> None:
        """Stay until the others have read the notes, for the store may end with this rank."""

        def heard() -> bool:
            self._store.set(f"heard/{self._rank}", "")
            return all(self._store.check([f"heard/{rank}"]) for rank in self._others)

        self._try(lambda: poll(heard, self._patience_s))

    def _try(self, use: Callable[[], Any]) -> None:
        if self._lost:
            return
        try:
            within(self._patience_s + 1, use)
        except RuntimeError as error:
            self._lost = True
            _log.debug("the store is lost: %s", error)

    def explain(self, notes: dict[int, dict[str, Any]] | None) -> str:
        """What happened, as far as the others have told."""
        if notes is None:
            return "The job's store does not answer: the rank that serves it, often rank 0, has ended or is stuck."
        if causes := [rank for rank, note in notes.items() if not note["consequence"]]:
            return " ".join(
                f"{self._named(rank)} failed in {notes[rank]['where']}: {notes[rank]['text']}." for rank in causes
            )
        if silent := [rank for rank in self._others if rank not in notes]:
            names = ", ".join(map(self._named, silent))
            return f"No word from {names}: killed, ended or stuck; the output of that rank says more."
        return "The ranks lost their connections, and none of them is the cause: the network, or a timeout."

    def _named(self, rank: int) -> str:
        world = self._ranks[rank]
        return f"rank {world}" if world == rank else f"rank {world} ({rank} of its group)"


def within(limit_s: float, call: Callable[[], T]) -> T:
    """The result of a call that may never return, as one to a store whose process is stopped.

    Raises:
        RuntimeError: there is none after `limit_s`, or what the call raised.
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
    """Whether `condition` came true within `limit_s`."""
    begin = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - begin
        if waited_s > limit_s:
            return False
        time.sleep(min(_POLL_S, waited_s / 4 + 1e-3))
    return True


def connect(group: dist.ProcessGroup, device: torch.device, configuration: dict[str, Any]) -> Connection:
    """Meet the other ranks of `group`, make a group of our own, compare configurations. Collective.

    Raises:
        RankFailed: a rank does not come within the group's timeout, or is lost on the way.
        ConfigurationsDiffer: ranks are configured differently.
    """
    theirs = backend_for(group, device)
    limit = timeout_of(theirs)
    patience_s = min(5.0, limit.total_seconds() / 10)  # to hear what others tell; twice, still within the timeout
    rank, world_size = group.rank(), group.size()
    store = store_of(group)
    counter, whole = f"terncomm/connections/{rank}", store
    store = PrefixStore(f"terncomm/{whole.add(counter, 1)}", whole)
    ranks = dist.get_process_group_ranks(group)
    board = Board(store, ranks, rank, patience_s)
    limit -= timedelta(seconds=2 * patience_s)
    try:
        _meet(store, ranks, rank, limit.total_seconds())
    except RankFailed:
        with suppress(RuntimeError):  # who comes later must not take this rank for present, and it may come again
            within(1.0, lambda: (store.delete_key(f"here/{rank}"), whole.add(counter, -1)))
        raise
    try:
        own = _backend_like(theirs, store, rank, world_size, limit) or _registered(ranks)
    except RuntimeError as error:
        lost = RankFailed(f"could not connect to the other ranks: {error}")
        raise board.last_words(lost, "connecting", lambda: None) from error
    transport = ProcessGroupTransport(own)
    del own

    def adapted(transport: ProcessGroupTransport) -> ProcessGroupTransport:
        if theirs.name() == "gloo":
            transport.adapt()
        return transport

    def among(name: str, some: list[int]) -> ProcessGroupTransport:
        apart = PrefixStore(f"{name}/{some[0]}", store)
        part = _backend_like(theirs, apart, some.index(rank), len(some), limit) or _registered([ranks[r] for r in some])
        return adapted(ProcessGroupTransport(part))

    connection = Connection(Metered(transport), transport, board, among)
    try:
        agree_on(configuration, connection.transport, device=device)
        adapted(transport)
    except RankFailed as error:
        raise connection.fail(error, "comparing configurations") from error
    return connection


def _meet(store: Store, ranks: list[int], rank: int, limit_s: float) -> None:
    """Wait until all ranks are here."""
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
    except RuntimeError as error:  # the rank that serves the store has ended, most likely for want of the others
        lost = f" (the store is gone: {error})"
    raise RankFailed(
        f"rank {names()} has not come within {time.monotonic() - begin:.0f} s. Every rank must call terncomm.register "
        "(or make a GradientAverager, or register terncomm.comm_hook and run backward), equally often; or it was killed"
        + lost
        + "."
    )


def _backend_like(theirs: Any, store: Store, rank: int, world_size: int, limit: timedelta) -> Any:
    """A backend of the same kind over the same ranks; `None` for a kind that we cannot make."""
    if theirs.name() == "gloo":
        return dist.ProcessGroupGloo(store, rank, world_size, gloo_options_like(theirs, limit))
    if theirs.name() == "nccl":
        return dist.ProcessGroupNCCL(store, rank, world_size, nccl_options(limit))
    return None


def _registered(ranks: list[int]) -> Any:
    # Synchronized among these ranks only: a sub-group must not need the rest of the world.
    return dist.new_group(ranks, use_local_synchronization=True)
