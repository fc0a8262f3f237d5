"""Codecs compress gradients to a form that can be added over ranks, and decode the sums."""

from terncomm.codecs.base import Codec, Half, IntegerCodec, UniformCodec, uniform
from terncomm.codecs.by_name import codec_for
from terncomm.codecs.int8 import Int8
from terncomm.codecs.rules import CodecLike, Rules
from terncomm.codecs.ternary import Ternary

__all__ = [
    "Codec",
    "CodecLike",
    "Half",
    "Int8",
    "IntegerCodec",
    "Rules",
    "Ternary",
    "UniformCodec",
    "codec_for",
    "uniform",
]
