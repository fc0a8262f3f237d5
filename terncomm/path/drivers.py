"""Who moves the messages of a path: one after the other, W ranks in lockstep, or nobody, to count them.

:mod:`terncomm.path.pipeline` has the driver that runs many paths side by side.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch

from terncomm.path.account import Clock
from terncomm.path.message import Message, Path, Start, Turn
from terncomm.transports.base import Transport

T = TypeVar("T")
Transports = Mapping[str, Transport]  # by the group of a message


def blocking(path: Path[T], transport: Transport | Transports, clock: Clock | None = None, bucket: int = 0) -> T:
    """Run a path over transports, each message by a call that blocks.

    Args:
        path: to be run to its end.
        transport: of all ranks, or one for each group of ranks that the path names.
        clock: where the time of the calls goes, as "exchange".
        bucket: for profiles.

    Returns:
        What the path returns.

    Raises:
        Exception: whatever the path or a transport raises.
    """
    transports = transport if isinstance(transport, Mapping) else {"all": transport}

    def send(message: Message) -> torch.Tensor:
        with clock("exchange", bucket, message.kind) if clock else nullcontext():
            return call(transports[message.group], message)

    return _in_turn(path, send)


def _in_turn(path: Path[T], send: Callable[[Message], torch.Tensor]) -> T:
    """Run a path to its end, each message sent, and answered, when it is asked for."""
    answer: Any = None
    while True:
        try:
            request = path.send(answer)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if isinstance(request, Message):
            answer = send(request)
        elif isinstance(request, Start):
            answer = [send(request.message)]
        else:
            answer = None if isinstance(request, Turn) else request.pop()
        del request


def call(transport: Transport, message: Message) -> torch.Tensor:
    """Send a message by a call that blocks; (W, k) uint8."""
    if message.kind == "all_gather":
        return transport.all_gather(message.payload)
    return transport.all_to_all(message.payload)


def lockstep(
    paths: Sequence[Path[T]], nodes: Sequence[int] | None = None, calls: "list[Call] | None" = None
) -> list[T]:
    """Run the paths of W ranks in one thread, without a transport: for simulations and tests.

    Args:
        paths: in rank order.
        nodes: each rank's node, for paths whose messages stay among the ranks of a node, or of a place in it.
        calls: where rank 0's messages are noted.

    Returns:
        What the paths return, in rank order.

    Raises:
        RuntimeError: ranks asked for different messages.
        Exception: whatever a path raises; the others are closed.

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
                    requests.append(path.send(answers[rank]))
                except StopIteration as end:
                    results[rank] = end.value
            if not requests:
                return results
            if len(requests) < len(paths) or len({type(request) for request in requests}) > 1:
                raise RuntimeError("some ranks asked for a message and others did not")
            if not isinstance(requests[0], (Message, Start)):
                answers = [None if isinstance(request, Turn) else request.pop() for request in requests]
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
    """For each group of ranks that a message may name, the members of each rank's."""
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
    """The messages of a path on meta tensors, without sending them: no second formula tells their sizes.

    The path is rank 0's, and all its messages are among `world_size` ranks.
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
