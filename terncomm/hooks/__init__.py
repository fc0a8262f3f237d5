"""Hooks: they take the gradients of a framework (DDP, FSDP, a training loop) and average them over ranks."""

from terncomm.hooks.ddp import comm_hook, register
from terncomm.hooks.loop import GradientAverager, reduce_gradients
from terncomm.hooks.state import CommState

__all__ = ["CommState", "GradientAverager", "comm_hook", "reduce_gradients", "register"]
