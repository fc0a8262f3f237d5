"""Checks the option `intra_group` over all ranks, and opens the transports inside and between nodes."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from terncomm.hooks.connection import Connection
from terncomm.transports import Metered


class NodeTransports(NamedTuple):
    """A rank's two transports: to the ranks of its node, and to the ranks with the same place in every node."""

    inside: Metered
    between: Metered


def node_of(group: dist.ProcessGroup, intra_group: dist.ProcessGroup) -> list[int]:
    """The ranks of this node, by their numbers in `group`, ascending.

    Raises:
        TypeError: `intra_group` is not a process group that contains this rank.
        ValueError: `intra_group` has ranks that are not in `group`.
    """
    if not isinstance(intra_group, dist.ProcessGroup):
        raise TypeError(
            f"intra_group: wanted the process group of this node's ranks, got {intra_group!r}; "
            "torch.distributed.new_subgroups(ranks_per_node)[0] makes one"
        )
    everyone, here = dist.get_process_group_ranks(group), dist.get_process_group_ranks(intra_group)
    if strange := sorted(set(here) - set(everyone)):
        raise ValueError(f"intra_group: rank {strange[0]} is not in the model's process group")
    return sorted(map(everyone.index, here))


def connect_nodes(connection: Connection, node: list[int], device: torch.device) -> NodeTransports:
    """Open the transports inside and between nodes. Collective over all ranks.

    Args:
        connection: of all ranks.
        node: the ranks of this rank's node, see :func:`node_of`; equally many on every rank.
        device: where the message is allocated.

    Raises:
        ValueError: ranks of one node gave different groups. Every rank raises.
        RankFailed: another rank failed meanwhile.
    """
    mine = torch.tensor(node, dtype=torch.int64, device=device)
    nodes = connection.transport.all_gather(mine.view(torch.uint8)).cpu().view(torch.int64).tolist()
    rank = connection.transport.rank
    if any(
        member not in nodes[member] or nodes[other] != nodes[member]
        for member in range(len(nodes))
        for other in nodes[member]
    ):
        told = "; ".join(f"{ranks} on rank {rank}" for rank, ranks in enumerate(nodes))
        raise ValueError(f"intra_group: every rank must give the group of its own node's ranks, got {told}")
    place = node.index(rank)
    counterparts = [ranks[place] for first, ranks in enumerate(nodes) if ranks[0] == first]
    return NodeTransports(connection.subgroup("inside", node), connection.subgroup("between", counterparts))
