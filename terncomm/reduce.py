"""Average one flat buffer over ranks through a codec: runs :mod:`terncomm.path.reduce` over a transport."""

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
FLOATS = {2: torch.float16, 4: torch.float32, 8: torch.float64}


@lru_cache(maxsize=1024)
def bucket_of(segments: Segments, codec: Codec | None, exact: Segments = _NONE) -> Bucket:
    """A bucket with layers under one codec, and layers that are averaged without a codec.

    Raises:
        ValueError: `segments` is not empty but `codec` is None; or a layer is in both `segments` and `exact`.
    """
    if codec is None and len(segments):
        raise ValueError(f"{len(segments)} segments are given with no codec: give codec=, or pass them as exact=")
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
    """Replace elements of `flat` by an estimate of their mean over ranks; the same bits on every rank.

    Elements outside `segments` and `exact` are not changed.

    Args:
        flat: (n,), contiguous, of a dtype in DTYPES; changed in place. An integer codec reads it as float32.
        segments: the layers that go through `codec`. The codec decides whether a layer has one scale or several.
        codec: the codec; `None` only if `segments` is empty.
        transport: of this rank. All ranks must pass equal arguments, except `flat` and `transport`.
        key: seed and step of the rounding noise; an int is `Key(seed)`. Use a new step, or seed, in every call.
        exchange: "auto", "gather" or "two_phase"; all give the same bits.
        exact: layers that are averaged without a codec.
        clock: adds up the seconds of each phase (on CUDA: of launching its kernels).
        later: for CUDA: a list that receives the headers to be checked later, so that the host does not wait for the
            device; see :func:`terncomm.path.reduce.agree`.

    Returns:
        flat.

    Raises:
        ValueError: the segments overlap or do not fit the buffer, they have no codec, or the exchange is unknown.
        TypeError: `flat` has a dtype that is not in DTYPES, or `codec` is not a codec.
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
    steps = path.all_reduce_mean(flat, bucket, ctx, exchange=exchange, unchecked=later)
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
    """The collective calls that :func:`all_reduce_mean` would make, in order. Nothing is sent; for planning.

    segments, codec, exchange, exact: as there. itemsize: bytes of an element of the buffer: 2, 4 or 8.

    >>> from terncomm import Ternary
    >>> [call.nbytes for call in messages(Segments([1000]), Ternary(), 2)]
    [256, 208]
    """
    return messages_of(bucket_of(segments, codec, exact), world_size, exchange=exchange, itemsize=itemsize)


def messages_of(bucket: Bucket, world_size: int, *, exchange: str = "auto", itemsize: int = 4) -> list[Call]:
    """As :func:`messages`, for a bucket with any groups of layers."""
    flat = torch.empty(bucket.extent, dtype=FLOATS[itemsize], device="meta")
    ctx = Context(Key(0), 0, world_size)
    return counted(path.all_reduce_mean(flat, bucket, ctx, exchange=exchange), world_size)
