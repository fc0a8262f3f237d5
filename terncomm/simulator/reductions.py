"""How the gradients of a bucket are averaged: plainly, as float16, or through a codec, by what the hook runs."""

import ast
from dataclasses import dataclass
from typing import Protocol

import torch

from terncomm import exchange as exchanges
from terncomm.codecs import Codec, Int8, Ternary, codec_for
from terncomm.exchange import ALL_REDUCE, ALL_REDUCE_HALF, Message
from terncomm.keys import Key
from terncomm.reduce import all_reduce_mean, messages
from terncomm.segments import Segments
from terncomm.transports.base import Transport

CODECS = ("none", "fp16", "int8", "terngrad", "terngrad-noclip")


class Reduction(Protocol):
    """Replaces a bucket by its mean over workers. Give :func:`simulate` one of your own to try another way."""

    def reduce(self, flat: torch.Tensor, coded: Segments, exact: Segments, transport: Transport, key: Key) -> None:
        """Replace `flat` (n,) by its mean, the same on every worker; `coded` and `exact` are the layers in it."""

    def messages(self, coded: Segments, exact: Segments, world_size: int, itemsize: int = 4) -> list[Message]:
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

    def reduce(self, flat: torch.Tensor, coded: Segments, exact: Segments, transport: Transport, key: Key) -> None:
        """See :class:`Reduction`."""
        sent = flat.to(self.dtype)
        exchanges.all_reduce_float_mean(sent, transport)
        if sent is not flat:
            flat.copy_(sent)

    def messages(self, coded: Segments, exact: Segments, world_size: int, itemsize: int = 4) -> list[Message]:
        """A ring all-reduce, as the back ends have it."""
        each = itemsize if self.dtype == torch.float32 else min(self.dtype.itemsize, itemsize)
        nbytes = (coded.numel + exact.numel) * each
        kind = ALL_REDUCE_HALF if each < 4 else ALL_REDUCE
        return [Message(kind, -(-2 * nbytes // world_size))]

    @property
    def whole(self) -> bool:
        """True."""
        return True


@dataclass(frozen=True)
class Coded:
    """The mean through a codec: :func:`terncomm.reduce.all_reduce_mean`."""

    codec: Codec

    def reduce(self, flat: torch.Tensor, coded: Segments, exact: Segments, transport: Transport, key: Key) -> None:
        """See :class:`Reduction`."""
        codec = self.codec if len(coded) else None
        all_reduce_mean(flat, coded, codec, transport, key=key, exact=exact)

    def messages(self, coded: Segments, exact: Segments, world_size: int, itemsize: int = 4) -> list[Message]:
        """See :class:`Reduction`."""
        return messages(coded, self.codec if len(coded) else None, world_size, exact=exact, itemsize=itemsize)

    @property
    def whole(self) -> bool:
        """False: exact layers need no arithmetic."""
        return False


def family(name: str) -> str:
    """Of the codecs that are known by name, the one that this is a kind of: for costs, and for what is gentler.

    >>> family("Int8(block=512)"), family("terngrad-noclip")
    ('int8', 'terngrad')
    """
    reduction = reduction_for(name)
    if isinstance(reduction, Coded):
        return "int8" if isinstance(reduction.codec, Int8) else "terngrad"
    return name


def reduction_for(name: str) -> Reduction:
    """The reduction of a name in CODECS, or of a codec as it is written: "Ternary(clip=1.5)".

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
    if name in CODECS:
        return Coded(codec_for(name))
    try:
        call = ast.parse(name, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError(name)
        kind = {"Ternary": Ternary, "Int8": Int8}[call.func.id]
        options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, KeyError, ValueError):
        known = ", ".join(CODECS)
        raise ValueError(f"unknown codec {name!r}; known: {known}, or as Ternary(clip=1.5), Int8(block=512)") from None
    try:
        return Coded(kind(**options))
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None
