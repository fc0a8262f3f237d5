"""Drivers, which run paths: with blocking calls, for W ranks in lockstep without a network, or to count messages.

:mod:`terncomm.path.pipeline` has the driver that runs many paths concurrently.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch

from terncomm.ops.denormals import kept
from terncomm.path.account import Clock
from terncomm.path.message import Message, Path, Start, WaitForTurn
from terncomm.transports.base import Transport, beside

T = TypeVar("T")
Transports = Mapping[str, Transport]  # message group -> transport


def blocking(path: Path[T], transport: Transport | Transports, clock: Clock | None = None, bucket: int = 0) -> T:
    """Run a path to its end over transports, with one blocking call for each message.

    Args:
        path: the path.
        transport: over all ranks, or a mapping from message groups to transports.
        clock: counts the time of the calls as "exchange".
        bucket: index of the bucket, for profiles.

    Returns:
        What the path returns.

    Raises:
        Exception: whatever the path or a transport raises.
    """
    transports = transport if isinstance(transport, Mapping) else {"all": transport}

    def send(message: Message) -> torch.Tensor:
        with clock("exchange", bucket, message.kind) if clock else nullcontext():
            return call(channel(transports, message), message)

    return _in_turn(path, send)


def _in_turn(path: Path[T], send: Callable[[Message], torch.Tensor]) -> T:
    """Run a path to its end. Each message is sent as soon as the path asks for it; `send` returns the answer."""
    answer: Any = None
    while True:
        try:
            with kept():
                request = path.send(answer)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if isinstance(request, Message):
            answer = send(request)
        elif isinstance(request, Start):
            answer = [send(request.message)]
        else:
            answer = None if isinstance(request, WaitForTurn) else request.pop()
        del request


def channel(transports: Transports, message: Message) -> Transport:
    """The transport that carries a message: that of its group, or for a message that goes ahead, the one beside it.

    The same for all drivers: then messages of ranks that use different drivers are paired, too.
    """
    transport = transports[message.group]
    return (beside(transport) or transport) if message.ahead else transport


def call(transport: Transport, message: Message) -> torch.Tensor:
    """Send a message with a blocking call; returns the received rows, (W, k) uint8."""
    if message.kind == "all_gather":
        return transport.all_gather(message.payload)
    return transport.all_to_all(message.payload)


def lockstep(
    paths: Sequence[Path[T]], nodes: Sequence[int] | None = None, calls: "list[Call] | None" = None
) -> list[T]:
    """Run the paths of W ranks in one thread, without a transport: for simulations and tests.

    Args:
        paths: one for each rank, in rank order.
        nodes: the node number of each rank, for paths with messages in the groups "node" and "between"; by default all
            ranks are on one node.
        calls: a list to which rank 0's messages are appended.

    Returns:
        What the paths return, in rank order.

    Raises:
        RuntimeError: paths asked for different messages, or some ended early.
        Exception: whatever a path raises; the other paths are closed.

    >>> def path(number):
    ...     rows = yield Message("all_gather", torch.tensor([number], dtype=torch.uint8))
    ...     return rows.flatten().tolist()
    >>> lockstep([path(3), path(5)])
    [[3, 5], [3, 5]]
    """
    groups = _groups(len(paths), nodes)
    answers: list[Any] = [None] * len(paths)
    results: list[Any] = [None] * len(paths)
    try:
        while True:
            requests = []
            for rank, path in enumerate(paths):
                try:
                    with kept():
                        requests.append(path.send(answers[rank]))
                except StopIteration as end:
                    results[rank] = end.value
            if not requests:
                return results
            if len(requests) < len(paths) or len({type(request) for request in requests}) > 1:
                raise RuntimeError(
                    "some ranks asked for a message and others did not; all ranks' paths must yield the same requests"
                )
            if not isinstance(requests[0], (Message, Start)):
                answers = [None if isinstance(request, WaitForTurn) else request.pop() for request in requests]
                continue
            starts = isinstance(requests[0], Start)
            messages = [request.message for request in requests] if starts else requests
            if calls is not None:
                calls.append(Call(messages[0].kind, messages[0].nbytes))
            answers = _answers(messages, groups)
            if starts:
                answers = [[rows] for rows in answers]
    finally:
        for path in paths:
            path.close()


def _groups(world_size: int, nodes: Sequence[int] | None) -> dict[str, list[list[int]]]:
    """Message group -> for each rank, the ranks of its group, ascending."""
    world = range(world_size)
    node = nodes or [0] * world_size
    place = [sum(node[other] == node[rank] for other in range(rank)) for rank in world]
    return {
        "all": [list(world)] * world_size,
        "node": [[other for other in world if node[other] == node[rank]] for rank in world],
        "between": [[other for other in world if place[other] == place[rank]] for rank in world],
    }


def _answers(messages: Sequence[Message], groups: dict[str, list[list[int]]]) -> list[torch.Tensor]:
    asked = {(message.kind, message.group) for message in messages}
    if len(asked) > 1:
        raise RuntimeError(f"ranks asked for different messages: {', '.join(map(str, sorted(asked)))}")
    found = []
    for rank, message in enumerate(messages):
        members = groups[message.group][rank]
        payloads = [messages[other].payload for other in members]
        if len({payload.shape for payload in payloads}) > 1:
            raise RuntimeError(f"ranks sent different sizes: {[tuple(payload.shape) for payload in payloads]}")
        mine = members.index(rank)
        found.append(torch.stack(payloads if message.kind == "all_gather" else [rows[mine] for rows in payloads]))
    return found


class Call(NamedTuple):
    """One collective call: each rank sends `nbytes` to each other rank."""

    kind: str
    nbytes: int


def counted(path: Path[Any], world_size: int) -> list[Call]:
    """The messages of a path on meta tensors; nothing is sent.

    So planning runs the same code as training, and needs no second formula for message sizes. The path must be that of
    rank 0, with all messages among `world_size` ranks.
    """
    calls: list[Call] = []

    def note(message: Message) -> torch.Tensor:
        calls.append(Call(message.kind, message.nbytes))
        return message.payload.new_empty(world_size, message.nbytes)

    _in_turn(path, note)
    return calls


def sent(calls: Sequence[Call], world_size: int) -> int:
    """Bytes that each rank sends in these calls."""
    return sum((world_size - 1) * call.nbytes for call in calls)
