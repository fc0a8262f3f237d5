"""Codecs: gradients to small integers under a shared scale, and back."""

from terncomm.codecs.base import Codec
from terncomm.codecs.int8 import Int8
from terncomm.codecs.ternary import Ternary

__all__ = ["Codec", "Int8", "Ternary", "codec_for"]

_NAMED = {"terngrad": Ternary(clip=2.5), "int8": Int8(block=2048)}


def codec_for(codec: "str | Codec") -> Codec:
    """A codec from its name: "terngrad" is `Ternary(clip=2.5)` as published, "int8" is `Int8(block=2048)`.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a codec.

    >>> codec_for("int8")
    Int8(block=2048, returned='int8')
    """
    if isinstance(codec, Codec):
        return codec
    if not isinstance(codec, str):
        raise TypeError(f"codec must be a name or a terncomm codec, got {codec!r}")
    if codec not in _NAMED:
        raise ValueError(f"unknown codec {codec!r}; known: {', '.join(sorted(_NAMED))}, or a codec such as Ternary()")
    return _NAMED[codec]
