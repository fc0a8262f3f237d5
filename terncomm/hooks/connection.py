"""Connects the ranks of a hook, and passes the error of a failing rank to the others."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from terncomm.hooks.agreement import agree_on
from terncomm.hooks.meeting import meet
from terncomm.hooks.notes import FailureNotes, Limits
from terncomm.torch_internals import default_group, gloo_options_like, nccl_options
from terncomm.transports import Metered, ProcessGroupTransport, RankFailed, Transport
from terncomm.transports.process_group import backend_for


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
        notes: FailureNotes,
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
    store = meet(group, limits.timeout().total_seconds())
    rank, world_size = group.rank(), group.size()
    ranks = dist.get_process_group_ranks(group)
    notes = FailureNotes(store, ranks, rank, limits)

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


@contextmanager
def telling_refusal(others: Transport | dist.ProcessGroup | None, device: torch.device | None = None) -> Iterator[None]:
    """A context in which a rank checks its options and prepares to connect.

    If it raises, it first tells the other ranks, which connect meanwhile. They raise `ConfigurationsDiffer` at once and
    do not wait for their timeout.

    Args:
        others: what the ranks connect over; None: the default process group.
        device: of the message; by default one that the process group can send from.
    """
    try:
        yield
    except Exception as error:
        why = str(error) if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: {error}"
        with suppress(Exception):  # this rank raises its own error, whatever becomes of the others
            if others is None or isinstance(others, dist.ProcessGroup):
                group = others or default_group()
                connect(group, device or _device_of(group), {"refused": why})
            else:
                agree_on({"refused": why}, Metered(others), device=device or torch.device("cpu"))
        raise


def _device_of(group: dist.ProcessGroup) -> torch.device:
    of_cuda = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if of_cuda else torch.device("cpu")


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
