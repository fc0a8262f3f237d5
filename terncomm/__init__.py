"""Compressed gradient communication for distributed training: TernGrad and 8-bit quantization as DDP hooks."""

import importlib
from typing import Any

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

# Some import what not all users have.
_ON_FIRST_USE = ("horovod", "lightning", "reduce", "simulator", "testing", "transformers")


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"terncomm.{name}")
    raise AttributeError(f"module 'terncomm' has no attribute {name!r}")
