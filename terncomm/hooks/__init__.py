"""Hooks: where a framework's gradients enter the path."""

from terncomm.hooks.ddp import comm_hook, register
from terncomm.hooks.state import CommState

__all__ = ["CommState", "comm_hook", "register"]
