"""A Lightning callback that compresses the gradients of a `DDPStrategy`.

    from terncomm.lightning import CompressGradients

    trainer = Trainer(strategy="ddp", devices=4, callbacks=[CompressGradients("terngrad")])

Lightning ignores its own `DDPStrategy(ddp_comm_hook=...)` on CPU, without a warning; this callback works there. With
Fabric, register the module that it returns: `terncomm.register(fabric.setup(model, optimizer)[0], "terngrad")`.
"""

import sys
from pathlib import Path
from typing import Any

from terncomm.codecs import Codec
from terncomm.hooks import register
from terncomm.hooks.reducer import GradientReducer
from terncomm.transports.launched import tell_of_one_process
from terncomm.watch import Watch


def _callback() -> Any:
    """The class `Callback` of `lightning` or of the older `pytorch_lightning`, whichever the program uses.

    Raises:
        ModuleNotFoundError: neither is installed.
    """
    try:
        if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
            raise ModuleNotFoundError("lightning")
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        try:
            from pytorch_lightning import Callback
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"terncomm.lightning needs Lightning ({error}): pip install lightning") from None
    return Callback


class CompressGradients(_callback()):  # type: ignore[misc]
    """Registers the hook when training starts, and keeps its step in Lightning's checkpoints.

    Args:
        codec: "terngrad", "int8", or a codec such as `Ternary(clip=2.5)`.
        jsonl, tensorboard, log_every: see :class:`terncomm.Watch`.
        options: see :func:`terncomm.register`.

    Attributes:
        state: what :func:`terncomm.register` returned, once training has started.

    Raises:
        ModuleNotFoundError: Lightning is not installed.
        TypeError: at the start of training, if :func:`terncomm.register` does not accept the strategy's model. With one
            process nothing is registered; if a launcher has started more, a warning says so.
    """

    def __init__(
        self,
        codec: str | Codec = "terngrad",
        *,
        jsonl: str | Path | None = None,
        tensorboard: Any = None,
        log_every: int = 100,
        **options: Any,
    ) -> None:
        self._codec, self._options = codec, options
        self._watching = {"jsonl": jsonl, "tensorboard": tensorboard, "log_every": log_every}
        self._watch: Watch | None = None
        self._saved: dict[str, Any] | None = None
        self._model: Any = None
        self.state: GradientReducer | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Register the hook, and continue after the last step of the checkpoint or of the last `fit`."""
        if trainer.world_size == 1:
            tell_of_one_process("Lightning", 'Give Trainer(strategy="ddp", devices=..., num_nodes=...)')
            return
        model, before = trainer.strategy.model, self._saved or self.state_dict()
        if self.state is None or model is not self._model:  # a second fit() has another DDP model
            self._model = model
            self.state = register(model, self._codec, **self._options)
        if before:
            self.state.load_state_dict(before)
        self._saved = None
        self._watch = Watch(self.state, **self._watching)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the :class:`terncomm.Watch`."""
        if self._watch is not None:
            self._watch.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the :class:`terncomm.Watch`."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint: that of `state`; before training starts, what was loaded, or {}."""
        return self.state.state_dict() if self.state is not None else self._saved or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what was in Lightning's checkpoint until training starts."""
        self._saved = state_dict
