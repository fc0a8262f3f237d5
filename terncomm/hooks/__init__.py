"""Hooks: where a framework's gradients enter the path."""

from terncomm.hooks.ddp import CommState, comm_hook, register

__all__ = ["CommState", "comm_hook", "register"]
