"""Codecs: gradients to something smaller that adds over ranks, and back."""

from terncomm.codecs.base import Codec, Half, IntegerCodec
from terncomm.codecs.int8 import Int8
from terncomm.codecs.named import codec_for
from terncomm.codecs.rules import CodecLike, Rules
from terncomm.codecs.ternary import Ternary

__all__ = ["Codec", "CodecLike", "Half", "Int8", "IntegerCodec", "Rules", "Ternary", "codec_for"]
