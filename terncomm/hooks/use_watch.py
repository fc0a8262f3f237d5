"""Notices a model that trains although none of its gradients is averaged: a hook that DDP never calls, for example."""

import weakref
from collections.abc import Callable
from typing import Any

import torch

PASSES = 100  # backward passes without a reduction before it is told

DDP_ALONE = (
    "DDP calls its hook only if the forward pass goes through the DistributedDataParallel object, and not through "
    "model.module or inside no_sync()"
)
LOOP_ALONE = "a GradientAverager averages gradients when reduce() is called, on every rank, after the backward pass"


class UseWatch:
    """Counts the backward passes of a model until its first reduction, and complains once if there are too many.

    A parameter's hook counts them. It is removed at the first reduction.
    """

    def __init__(self) -> None:
        self._passes = 0
        self._remove: Callable[[], None] = lambda: None

    def watch(self, parameter: torch.Tensor, warn: Callable[[str], None], advice: str) -> None:
        """Begin to count.

        Args:
            parameter: one that requires a gradient.
            warn: a bound method; its object is not kept alive.
            advice: how gradients come to be averaged in this engine, in words.
        """
        self.stop()
        told, myself = weakref.WeakMethod(warn), weakref.ref(self)

        def count(_: torch.Tensor) -> None:
            if (watch := myself()) is None:
                return
            watch._passes += 1
            if watch._passes == PASSES:
                watch.stop()
                if (say := told()) is not None:
                    say(
                        f"{PASSES} backward passes, and no gradient was averaged over ranks yet: {advice}. If you "
                        "accumulate gradients over more passes than that, all is well"
                    )

        hook: Any = parameter.register_post_accumulate_grad_hook(count)  # type: ignore[no-untyped-call]
        self._remove = hook.remove

    def stop(self) -> None:
        """Stop counting: gradients are being averaged."""
        self._remove()
        self._remove = lambda: None
