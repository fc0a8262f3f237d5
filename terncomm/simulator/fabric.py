"""How long a collective call takes: by a formula for links that are only described, or from what was measured.

The model is alpha-beta (Hockney, "The communication challenge for MPP", Parallel Computing 20, 1994), for each
collective as its algorithm has it: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations
in MPICH", IJHPCA 19, 2005; the bytes per rank are those of NCCL's doc/PERFORMANCE.md.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from terncomm.path.drivers import Call
from terncomm.simulator.links import Link
from terncomm.transports.process_group import AT_ONCE, at_once_for, goes_in_steps

ALL_REDUCE = "all_reduce"  # of floats, as DDP has it without a hook
ALL_REDUCE_HALF = "all_reduce_half"  # of float16: a processor takes longer to add these


class Fabric(Protocol):
    """What joins the workers."""

    def seconds(self, message: Call, world_size: int) -> float:
        """From the call of the last worker until all have what they wait for."""

    def busy(self, message: Call) -> float:
        """Share of a core that sending and receiving takes meanwhile."""

    def late(self, message: Call) -> float:
        """Seconds that it takes longer where the processor computes meanwhile, and threads must wait for a core."""


@dataclass(frozen=True)
class Software:
    """What a message costs beside the bytes, and how well many to one share a link.

    Args:
        name: as it stands in results.
        round_s: between two messages that depend on each other, the wire's delay aside.
        message_s: of each message that one rank sends to another.
        incast: how many times as long an all-to-all of more than two ranks takes as its bytes would.
        steps: whether large rows are sent in chunks to one rank after the other, several under way at once: that
            crowds no link, and takes one latency. So does an all-gather then: no rank passes on what came.
        tree: whether an all-reduce of many ranks goes along a tree where that is quicker than a ring.
    """

    name: str
    round_s: float
    message_s: float
    incast: float = 1.0
    steps: bool = False
    tree: bool = False


# gloo's are of the order that benchmarks/validate_simulator.py measures; NCCL's are usual figures, not measured here.
GLOO = Software("gloo", round_s=100e-6, message_s=20e-6, incast=1.3, steps=True)
NCCL = Software("nccl", round_s=10e-6, message_s=2e-6, tree=True)


@dataclass(frozen=True)
class Switched:
    """Nodes on one switch, each with a link of its own, shared by the workers on it.

    Args:
        link: of a node.
        per_node: workers on a node, numbered one after the other.
        inside: between the workers of a node; `None`: it takes no time.
        software: that moves the messages.
    """

    link: Link
    per_node: int = 1
    inside: Link | None = None
    software: Software = GLOO

    def __post_init__(self) -> None:
        if self.per_node < 1:
            raise ValueError(f"per_node must be at least 1, got {self.per_node}")

    def seconds(self, message: Call, world_size: int) -> float:
        """See :class:`Fabric`."""
        if world_size == 1 or message.nbytes == 0:
            return 0.0
        near = min(self.per_node, world_size)  # on one node
        far = world_size - near
        software = self.software
        link = self.link if far else self.inside
        hop_s = software.round_s + (link.delay_s if link else 0.0)
        at_once = at_once_for(hop_s, link.payload_bytes_per_s if link else 1e12)
        sent = message.nbytes * (world_size - 1)
        if kind_of(message, at_once) == "all_to_all" or (software.steps and message.kind == "all_gather"):
            out_s = near * far * message.nbytes / self.link.payload_bytes_per_s
            in_s = (near - 1) * message.nbytes / self.inside.payload_bytes_per_s if self.inside else 0.0
            in_turn = software.steps and goes_in_steps(world_size, message.nbytes, at_once)
            crowded = software.incast if world_size > 2 and not in_turn else 1.0
            return hop_s + (world_size - 1) * software.message_s + crowded * max(out_s, in_s)
        rate = min(
            self.link.payload_bytes_per_s if far else math.inf,
            self.inside.payload_bytes_per_s if self.inside and near > 1 else math.inf,
        )
        reduces = message.kind in (ALL_REDUCE, ALL_REDUCE_HALF)
        rounds = (world_size - 1) * (2 if reduces else 1)
        ring_s = rounds * (hop_s + software.message_s) + sent / rate
        if not reduces or not software.tree:
            return ring_s
        whole = message.nbytes * world_size  # along a tree every byte goes up and down once
        tree_s = 2 * math.ceil(math.log2(world_size)) * (hop_s + software.message_s) + whole / rate
        return min(ring_s, tree_s)

    def busy(self, message: Call) -> float:
        """See :class:`Fabric`. None: what moves the bytes is not described."""
        return 0.0

    def late(self, message: Call) -> float:
        """See :class:`Fabric`. None: each worker has cores enough."""
        return 0.0


@dataclass(frozen=True)
class Measured:
    """What a group of workers was measured to take, for the world size that it has.

    points: for each of KINDS, (nbytes of a message to one other rank, seconds), ascending. Between
        two points, and beyond the last two, the line through them holds: an alpha and a beta for each range of sizes.
    busy_by_kind: for each of KINDS, the share of a core that the largest message kept busy.
    late_by_kind: for each of KINDS, the seconds by which a small message took longer while all ranks computed.
    at_once: bytes up to which all-gathers go to all ranks at the same time.
    """

    world_size: int
    points: Mapping[str, Sequence[tuple[float, float]]]
    busy_by_kind: Mapping[str, float]
    late_by_kind: Mapping[str, float]
    at_once: int = AT_ONCE

    def seconds(self, message: Call, world_size: int) -> float:
        """See :class:`Fabric`. Raises ValueError for another world size than was measured."""
        if world_size != self.world_size:
            raise ValueError(f"measured were {self.world_size} ranks, not {world_size}")
        if message.nbytes == 0:
            return 0.0
        points = self.points[kind_of(message, self.at_once)]
        place = min(max(bisect.bisect([n for n, _ in points], message.nbytes), 1), len(points) - 1)
        (n0, t0), (n1, t1) = points[place - 1], points[place]
        slope = (t1 - t0) / (n1 - n0)
        if message.nbytes > n1:
            return t1 + max(slope, 0.0) * (message.nbytes - n1)
        return max(t0 + slope * (message.nbytes - n0), 0.5 * points[0][1])

    def busy(self, message: Call) -> float:
        """See :class:`Fabric`."""
        return self.busy_by_kind[kind_of(message, self.at_once)]

    def late(self, message: Call) -> float:
        """See :class:`Fabric`."""
        return self.late_by_kind[kind_of(message, self.at_once)]


KINDS = (ALL_REDUCE, ALL_REDUCE_HALF, "all_to_all", "all_gather")  # the last: round a ring


def kind_of(message: Call, at_once: int = AT_ONCE) -> str:
    """Of KINDS: a small all-gather is sent as an all-to-all."""
    return "all_to_all" if message.kind == "all_gather" and message.nbytes <= at_once else message.kind
