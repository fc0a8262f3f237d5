"""Mean of one flat buffer over ranks, through a codec: the path of :mod:`terncomm.path.reduce` over a transport."""

from functools import lru_cache

import torch

from terncomm.codecs.base import Codec
from terncomm.keys import Key
from terncomm.path import reduce as path
from terncomm.path.account import Account, Clock, Context
from terncomm.path.bucket import EXCHANGES, Bucket
from terncomm.path.drivers import Call, blocking, counted
from terncomm.path.header import RanksDiffer, Unchecked
from terncomm.path.reduce import DTYPES
from terncomm.segments import Segments
from terncomm.transports.base import Transport

__all__ = ["DTYPES", "EXCHANGES", "RanksDiffer", "all_reduce_mean", "messages", "messages_of"]

_NONE = Segments(())
_FLOATS = {2: torch.float16, 4: torch.float32, 8: torch.float64}


@lru_cache(maxsize=1024)
def bucket_of(segments: Segments, codec: Codec | None, exact: Segments = _NONE) -> Bucket:
    """A bucket with layers under one codec, and layers that travel exactly.

    Raises:
        ValueError: segments to be coded and no codec; a layer in both.
    """
    if codec is None and len(segments):
        raise ValueError(f"{len(segments)} segments to be coded and no codec; give a codec, or name them in exact=")
    return Bucket([(segments, codec), (exact, None)])


def all_reduce_mean(
    flat: torch.Tensor,
    segments: Segments,
    codec: Codec | None,
    transport: Transport,
    *,
    key: Key | int,
    exchange: str = "auto",
    exact: Segments = _NONE,
    clock: Clock | None = None,
    later: list[Unchecked] | None = None,
) -> torch.Tensor:
    """Replace the described elements of `flat` by an estimate of their mean over ranks; the same bits on every rank.

    Args:
        flat: (n,) contiguous floats of any type, changed in place. Codes are made of the values as float32.
        segments: the layers that are coded, one scale each or finer, as the codec has it.
        codec: how; `None` only where `segments` is empty.
        transport: this rank's; every rank calls with the same arguments but `flat`.
        key: seed and step of the rounding noise; an int is `Key(seed)`. Use another step, or seed, in every call.
        exchange: "auto", "gather" or "two_phase"; all give the same bits.
        exact: layers that are averaged without a codec.
        clock: adds up the time of the phases (on CUDA, of enqueueing them).
        later: for CUDA, where checking the other ranks' headers at once would stall the device; see
            :func:`terncomm.path.reduce.agree`.

    Returns:
        flat.

    Raises:
        ValueError: the segments do not fit the buffer, or an unknown exchange.
        TypeError: `flat` is not of one of DTYPES, or the codec is none.
        RanksDiffer: ranks called with different arguments.

    >>> from terncomm import Ternary
    >>> from terncomm.transports import LocalTransport
    >>> def work(transport):
    ...     gradient = torch.full((4,), 0.5)
    ...     return all_reduce_mean(gradient, Segments([4]), Ternary(clip=None), transport, key=0).tolist()
    >>> LocalTransport.run(2, work)
    [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]
    """
    key = key if isinstance(key, Key) else Key(key)
    account = Account(clock)
    ctx = Context(key, transport.rank, transport.world_size, account)
    bucket = bucket_of(segments, codec, exact)
    steps = path.all_reduce_mean(flat, bucket, ctx, exchange=exchange, later=later)
    blocking(steps, transport, account.clock, key.bucket)
    return flat


def messages(
    segments: Segments,
    codec: Codec | None,
    world_size: int,
    *,
    exchange: str = "auto",
    exact: Segments = _NONE,
    itemsize: int = 4,
) -> list[Call]:
    """The transport's calls that :func:`all_reduce_mean` makes for such a bucket, in order, without making them.

    segments, codec, exchange, exact: as there. itemsize: bytes of an element of the buffer. For planning.

    >>> from terncomm import Ternary
    >>> [call.nbytes for call in messages(Segments([1000]), Ternary(), 2)]
    [256, 208]
    """
    return messages_of(bucket_of(segments, codec, exact), world_size, exchange=exchange, itemsize=itemsize)


def messages_of(bucket: Bucket, world_size: int, *, exchange: str = "auto", itemsize: int = 4) -> list[Call]:
    """The same for a bucket with any groups of layers."""
    flat = torch.empty(bucket.extent, dtype=_FLOATS[itemsize], device="meta")
    ctx = Context(Key(0), 0, world_size)
    return counted(path.all_reduce_mean(flat, bucket, ctx, exchange=exchange), world_size)
