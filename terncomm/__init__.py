"""Compressed gradient communication for distributed training: TernGrad and 8-bit quantization as DDP hooks."""

from terncomm.codecs import Codec, Int8, Ternary
from terncomm.hooks import CommState, GradientAverager, comm_hook, reduce_gradients, register
from terncomm.version import __version__
from terncomm.watch import Watch

__all__ = [
    "Codec",
    "CommState",
    "GradientAverager",
    "Int8",
    "Ternary",
    "Watch",
    "__version__",
    "comm_hook",
    "reduce_gradients",
    "register",
]
