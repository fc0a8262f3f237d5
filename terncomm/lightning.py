"""A Lightning callback: gradients of a `DDPStrategy` travel as codes.

    from terncomm.lightning import CompressGradients

    trainer = Trainer(strategy="ddp", devices=4, callbacks=[CompressGradients("terngrad")])

Lightning's own `DDPStrategy(ddp_comm_hook=...)` is ignored on CPU, without a word; this is not. With Fabric, register
the module that it returns: `terncomm.register(fabric.setup(model, optimizer)[0], "terngrad")`.
"""

import logging
import sys
from pathlib import Path
from typing import Any

from terncomm.codecs import Codec
from terncomm.hooks import register
from terncomm.hooks.averaging import Averaging
from terncomm.watch import Watch

_log = logging.getLogger("terncomm")


def _callback() -> Any:
    """The base class, of `lightning` or of the older `pytorch_lightning`, whichever the program uses."""
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
        options: of :func:`terncomm.register`.

    Attributes:
        state: what :func:`terncomm.register` returned, once training has started.

    Raises:
        ModuleNotFoundError: Lightning is not installed.
        TypeError: at the start of training, where :func:`terncomm.register` does not take the strategy's model. On one
            process there is nothing to compress, and nothing is done.
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
        self.state: Averaging | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Register; go on where the checkpoint, or the last `fit`, was."""
        if trainer.world_size == 1:
            _log.info("one process: there is nothing to compress")
            return
        model, before = trainer.strategy.model, self._saved or self.state_dict()
        if self.state is None or model is not self._model:  # a second fit() has another
            self._model = model
            self.state = register(model, self._codec, **self._options)
        if before:
            self.state.load_state_dict(before)
        self._saved = None
        self._watch = Watch(self.state, **self._watching)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close what was watched."""
        if self._watch is not None:
            self._watch.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close what was watched."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint."""
        return self.state.state_dict() if self.state is not None else self._saved or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoint."""
        self._saved = state_dict
