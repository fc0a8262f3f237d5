"""How the gradients of a bucket are averaged: plainly, as float16, or through a codec, by what the hook runs."""

import ast
from dataclasses import dataclass
from typing import Protocol

import torch

from terncomm.codecs import Codec, Half, Int8, Ternary, codec_for
from terncomm.path import exchanges
from terncomm.path.account import Context
from terncomm.path.bucket import Bucket
from terncomm.path.drivers import Call
from terncomm.path.exchanges import Piece
from terncomm.path.message import Path
from terncomm.path.parts import Floats
from terncomm.path.reduce import all_reduce_mean
from terncomm.path.sums import row_edges
from terncomm.reduce import FLOATS, bucket_of, messages_of
from terncomm.segments import Segments
from terncomm.simulator.fabric import ALL_REDUCE, ALL_REDUCE_HALF

CODECS = ("none", "fp16", "bf16", "int8", "terngrad", "terngrad-noclip")


class Reduction(Protocol):
    """The path of a bucket to its mean over workers. Give :func:`simulate` one of your own to try another way."""

    def path(self, flat: torch.Tensor, coded: Segments, exact: Segments, ctx: Context) -> Path[None]:
        """Replace `flat` (n,) by its mean, the same on every worker; `coded` and `exact` are the layers in it."""

    def calls(self, coded: Segments, exact: Segments, world_size: int, itemsize: int = 4) -> list[Call]:
        """The collective calls of a bucket with these layers, of `itemsize` bytes an element: to predict time."""

    @property
    def whole(self) -> bool:
        """Whether all of a bucket is treated alike, and not its coded layers alone."""


@dataclass(frozen=True)
class Exact:
    """The mean of floats, as DDP does without a hook, or of gradients rounded to float16.

    Added in rank order in float32, where PyTorch's `fp16_compress_hook` adds in float16.
    """

    dtype: torch.dtype = torch.float32

    def path(self, flat: torch.Tensor, coded: Segments, exact: Segments, ctx: Context) -> Path[None]:
        """See :class:`Reduction`."""
        edges = row_edges(flat.numel(), ctx.world_size)
        floats = Floats(flat, Segments([flat.numel()]), edges, divisor=ctx.world_size, dtype=self.dtype)
        yield from exchanges.all_reduce([Piece([], [floats])], ctx, flat.device)

    def calls(self, coded: Segments, exact: Segments, world_size: int, itemsize: int = 4) -> list[Call]:
        """A ring all-reduce, as the back ends have it."""
        each = itemsize if self.dtype == torch.float32 else min(self.dtype.itemsize, itemsize)
        nbytes = (coded.numel + exact.numel) * each
        kind = ALL_REDUCE_HALF if each < 4 else ALL_REDUCE
        return [Call(kind, -(-2 * nbytes // world_size))]

    @property
    def whole(self) -> bool:
        """True."""
        return True


@dataclass(frozen=True)
class Coded:
    """The mean through a codec: :func:`terncomm.path.reduce.all_reduce_mean`."""

    codec: Codec

    def path(self, flat: torch.Tensor, coded: Segments, exact: Segments, ctx: Context) -> Path[None]:
        """See :class:`Reduction`."""
        yield from all_reduce_mean(flat, self._bucket(coded, exact), ctx)

    def calls(self, coded: Segments, exact: Segments, world_size: int, itemsize: int = 4) -> list[Call]:
        """See :class:`Reduction`."""
        return messages_of(self._bucket(coded, exact), world_size, itemsize=itemsize)

    def pieces(self, coded: Segments, exact: Segments, world_size: int, itemsize: int = 4) -> list[bool]:
        """For each piece of the bucket: whether it is sent in rows. Their messages are the last of `calls`."""
        cuts = self._bucket(coded, exact).cuts("auto", world_size, FLOATS[itemsize])
        return [bool(cut.rows) for cut in cuts]

    def _bucket(self, coded: Segments, exact: Segments) -> Bucket:
        if self.whole:
            return bucket_of(Segments([coded.numel + exact.numel]), self.codec)
        return bucket_of(coded, self.codec if len(coded) else None, exact)

    @property
    def whole(self) -> bool:
        """Whether the codec takes small tensors, embeddings and heads too."""
        return isinstance(self.codec, Half)


def family(name: str) -> str:
    """Of the codecs that are known by name, the one that this is a kind of: for costs, and for what is gentler.

    A codec of the user's own is a kind of its own.

    >>> family("Int8(block=512)"), family("terngrad-noclip"), family("bf16")
    ('int8', 'terngrad', 'fp16')
    """
    reduction = reduction_for(name)
    if isinstance(reduction, Coded):
        if isinstance(reduction.codec, Half):
            return "fp16"
        kinds: dict[type[Codec], str] = {Int8: "int8", Ternary: "terngrad"}
        return next((kind for cls, kind in kinds.items() if type(reduction.codec) is cls), name)
    return name


def reduction_for(name: str) -> Reduction:
    """The reduction of a name in CODECS, of a codec as it is written, "Ternary(clip=1.5)", or of "FILE.py:CLASS".

    Raises:
        ValueError: neither.

    >>> reduction_for("Int8(block=512)")
    Coded(codec=Int8(block=512, returned='int8'))
    """
    if name == "none":
        return Exact()
    if name == "fp16":
        return Exact(torch.float16)
    if name == "terngrad-noclip":
        return Coded(Ternary(clip=None))
    if name in CODECS or ":" in name:
        return Coded(codec_for(name))
    try:
        call = ast.parse(name, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError(name)
        kinds: dict[str, type[Codec]] = {"Ternary": Ternary, "Int8": Int8}
        kind = kinds[call.func.id]
        options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, KeyError, ValueError):
        known = ", ".join(CODECS)
        raise ValueError(
            f"unknown codec {name!r}; known: {known}, or as Ternary(clip=1.5), Int8(block=512), or one of yours as "
            "FILE.py:CLASS"
        ) from None
    try:
        return Coded(kind(**options))
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None
