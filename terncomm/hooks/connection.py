"""How the ranks of a hook come together, and what they tell one another when one of them fails."""

import json
import logging
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from terncomm.hooks.agreement import agree_on
from terncomm.transports import Metered, ProcessGroupTransport, RankFailed
from terncomm.transports.process_group import backend_for

_log = logging.getLogger("terncomm")

_POLL_S = 0.02
_NOTICE_S = 10.0  # one log line when other ranks are late by this much


class Connection:
    """A process group of our own over the ranks of another, and a board in its store for last words.

    It is not one of torch.distributed's registered groups, so it neither takes part in their numbering nor ends with
    them; nothing but the hook holds it.
    """

    def __init__(self, transport: Metered, group: ProcessGroupTransport, board: "Board", patience_s: float) -> None:
        self.transport = transport
        self._group = group
        self._board = board
        self._patience_s = patience_s

    def fail(self, error: Exception, where: str) -> Exception:
        """Tell the other ranks of an error, let go of the group, and return the error with what they have told.

        where: what this rank was doing, in words.
        """
        consequence = isinstance(error, RankFailed)
        self._board.post({"where": where, "text": f"{type(error).__name__}: {error}", "consequence": consequence})
        self._group.close()  # other ranks in an exchange with this one need not wait for the timeout
        failure = error
        if consequence:
            failure = RankFailed(f"{self._board.explain(self._board.read(self._patience_s))} Here, in {where}: {error}")
        self._board.linger(self._patience_s, everyone=not consequence)
        return failure


class Board:
    """One note of each rank, in a store that all of them reach."""

    def __init__(self, store: Store, ranks: list[int], rank: int) -> None:
        self._store = store
        self._ranks = ranks  # global, in the order of the group
        self._rank = rank
        self._others = [other for other in range(len(ranks)) if other != rank]

    def post(self, note: dict[str, Any]) -> None:
        """Leave this rank's note, if the store can still be reached."""
        try:
            self._store.set(f"note/{self._rank}", json.dumps(note))
        except RuntimeError as error:
            _log.debug("no note left: %s", error)

    def read(self, patience_s: float) -> dict[int, dict[str, Any]] | None:
        """Notes by rank, as soon as all others have left theirs or one tells a cause; `None` without a store."""
        notes: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + patience_s
        try:
            while True:
                for rank in self._others:
                    if rank not in notes and self._store.check([f"note/{rank}"]):
                        notes[rank] = json.loads(self._store.get(f"note/{rank}"))
                told_why = any(not note["consequence"] for note in notes.values())
                if told_why or len(notes) == len(self._others) or time.monotonic() > deadline:
                    return notes
                time.sleep(_POLL_S)
        except RuntimeError:
            return None

    def linger(self, patience_s: float, *, everyone: bool) -> None:
        """Stay until the others have read what they need, for the store may end with this rank.

        everyone: wait also for ranks that have left no note yet.
        """
        deadline = time.monotonic() + patience_s
        try:
            self._store.set(f"heard/{self._rank}", "")
            while time.monotonic() < deadline:
                awaited = [r for r in self._others if everyone or self._store.check([f"note/{r}"])]
                if all(self._store.check([f"heard/{r}"]) for r in awaited):
                    return
                time.sleep(_POLL_S)
        except RuntimeError:
            return

    def explain(self, notes: dict[int, dict[str, Any]] | None) -> str:
        """What happened, as far as the others have told."""
        if notes is None:
            return "Another rank has ended, and with it the store: it is the rank that serves it, in most jobs rank 0."
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


def connect(group: dist.ProcessGroup, device: torch.device, configuration: dict[str, Any]) -> Connection:
    """Meet the other ranks of `group`, make a group of our own, compare configurations. Collective.

    Raises:
        RankFailed: a rank does not come within the group's timeout, or is lost on the way.
        ConfigurationsDiffer: ranks are configured differently.
    """
    theirs = backend_for(group, device)
    limit = _timeout(theirs)
    patience_s = min(5.0, limit.total_seconds() / 10)  # to hear what others tell; twice, still within the timeout
    rank, world_size = group.rank(), group.size()
    store = dist.distributed_c10d._get_process_group_store(group)
    count = store.add(f"terncomm/connections/{rank}", 1)
    store = PrefixStore(f"terncomm/{count}", store)
    ranks = dist.get_process_group_ranks(group)
    board = Board(store, ranks, rank)
    limit -= timedelta(seconds=2 * patience_s)
    _meet(store, ranks, rank, limit.total_seconds())
    own = _backend_like(theirs, store, rank, world_size, limit) or _registered(group)
    transport = ProcessGroupTransport(own)
    del own
    connection = Connection(Metered(transport), transport, board, patience_s)
    try:
        agree_on(configuration, connection.transport, device=device)
    except RankFailed as error:
        raise connection.fail(error, "comparing configurations") from error
    return connection


def _meet(store: Store, ranks: list[int], rank: int, limit_s: float) -> None:
    """Wait until all ranks are here."""
    store.set(f"here/{rank}", "")
    begin = time.monotonic()
    noticed = False
    absent = [other for other in range(len(ranks)) if other != rank]
    while True:
        try:
            absent = [other for other in absent if not store.check([f"here/{other}"])]
            lost = ""
        except RuntimeError as error:  # the rank that serves the store has ended, most likely for want of the others
            lost = f" (the store is gone: {error})"
        if not absent:
            return
        waited_s = time.monotonic() - begin
        names = ", ".join(str(ranks[other]) for other in absent)
        if lost or waited_s > limit_s:
            raise RankFailed(
                f"rank {names} has not come within {waited_s:.0f} s. Every rank must call terncomm.register on its DDP "
                f"model, or register terncomm.comm_hook and run backward, equally often; or it was killed{lost}."
            )
        if waited_s > _NOTICE_S and not noticed:
            noticed = True
            _log.warning("waiting for rank %s to register its hook, at most %.0f s more", names, limit_s - waited_s)
        time.sleep(min(_POLL_S, waited_s / 4 + 1e-3))


def _backend_like(theirs: Any, store: Store, rank: int, world_size: int, limit: timedelta) -> Any:
    """A backend of the same kind over the same ranks; `None` for a kind that we cannot make."""
    try:
        if theirs.name() == "gloo":
            return dist.ProcessGroupGloo(store, rank, world_size, limit)
        if theirs.name() == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            return dist.ProcessGroupNCCL(store, rank, world_size, options)
    except RuntimeError as error:
        raise RankFailed(f"could not connect to the other ranks: {error}") from error
    return None


def _registered(group: dist.ProcessGroup) -> Any:
    # Synchronized among these ranks only: a sub-group must not need the rest of the world.
    return dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)


def _timeout(backend: Any) -> timedelta:
    """How long the user's group waits."""
    options = getattr(backend, "options", None)
    return getattr(options, "_timeout", None) or dist.default_pg_timeout
