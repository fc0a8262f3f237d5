"""THE PATH between nodes: floats inside a node, over its fast links, and codes between nodes.

    row = mean(everyone's row of flat), inside         # exact; a rank for each row
    row = all_reduce_mean(row), between                # coded, over the ranks of that row on all nodes
    flat = everyone's rows, inside

A node sends to others what one rank alone would. A layer that lies in several rows has clip limit and scale in each, so
a non-finite element spoils what its row has of the layer.
"""

import zlib
from functools import lru_cache
from typing import NamedTuple

import torch

from terncomm import exchange as exchanges
from terncomm.codecs.base import Codec
from terncomm.keys import Key
from terncomm.reduce import Clock, Header, Unchecked, all_reduce_mean, exact_traffic, share
from terncomm.scatter import Shards
from terncomm.segments import Segments
from terncomm.transports import Metered
from terncomm.transports.base import Transport


class Levels(NamedTuple):
    """A rank's transports: to the ranks of its node, and to those of its place on every node."""

    inside: Metered
    between: Metered


@lru_cache(maxsize=1024)
def _own(segments: Segments, exact: Segments, numel: int, rank: int, ranks: int) -> tuple[Segments, Segments, int]:
    """The coded and the exact layers of this rank's row of a buffer, and the checksum of all."""
    table = torch.cat([segments.table, exact.table], dim=1)
    coded = torch.arange(table.shape[1]) < len(segments)
    order = table[0].argsort()
    offsets, sizes, layers, bases = table[:, order].tolist()
    if any(bases):
        raise ValueError("layers must be whole")
    row = -(-numel // ranks)
    shards = Shards.in_a_row(sizes, offsets, layers, coded[order].tolist(), row, ranks)
    return *shards.own(rank), shards.checksum


def all_reduce_mean_between(
    flat: torch.Tensor,
    segments: Segments,
    codec: Codec | None,
    inside: Transport,
    between: Transport,
    *,
    key: Key,
    exchange: str = "auto",
    exact: Segments,
    clock: Clock,
    later: list[Unchecked] | None = None,
) -> int:
    """As :func:`terncomm.reduce.all_reduce_mean`, coded between nodes alone.

    Args:
        inside: the ranks of this node, equally many on all nodes.
        between: the ranks that have this one's place on every node.
        flat, segments, codec, key, exchange, exact, clock, later: see there; together the layers are all of `flat`.

    Returns:
        Bytes that this rank has sent as floats.
    """
    coded_row, exact_row, checksum = _own(segments, exact, flat.numel(), inside.rank, inside.world_size)
    with clock("exchange", key, "reduce inside"):
        kind = zlib.crc32(f"{codec!r} {flat.dtype} {exchange} between {between.world_size}".encode())
        header = Header(key.seed, key.step, key.bucket, flat.numel(), segments.numel, kind, checksum)
        share(torch.zeros(0, device=flat.device), header, inside, later)
        width = -(-flat.numel() // inside.world_size)
        padded = torch.nn.functional.pad(flat, (0, width * inside.world_size - flat.numel()))
        received = inside.all_to_all(padded.view(torch.uint8).view(inside.world_size, -1))
        row = exchanges.ordered_mean(exchanges.floats_of(received, flat))
        del padded, received
    coding = codec if len(coded_row) else None
    all_reduce_mean(
        row, coded_row, coding, between, key=key, exchange=exchange, exact=exact_row, clock=clock, later=later
    )
    with clock("exchange", key, "gather inside"):
        rows = inside.all_gather(row.view(torch.uint8))
        flat.copy_(exchanges.floats_of(rows, flat).flatten()[: flat.numel()])
    itemsize = flat.element_size()
    return exact_traffic(exact_row, itemsize, between.world_size) + 2 * (inside.world_size - 1) * width * itemsize
