"""Hooks: where a framework's gradients enter the path."""

from terncomm.hooks.ddp import comm_hook, register
from terncomm.hooks.loop import GradientAverager, reduce_gradients
from terncomm.hooks.state import CommState

__all__ = ["CommState", "GradientAverager", "comm_hook", "reduce_gradients", "register"]
