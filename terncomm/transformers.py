"""A callback for the Trainer of Hugging Face transformers that compresses gradients.

    from terncomm.transformers import CompressGradients

    trainer = Trainer(model=model, args=args, ...)
    trainer.add_callback(CompressGradients(trainer, "terngrad"))

With Accelerate alone, register the model that it returns: `terncomm.register(accelerator.prepare(model), "terngrad")`.
"""

from pathlib import Path
from typing import Any

from terncomm.codecs import Codec
from terncomm.hooks import register
from terncomm.hooks.reducer import GradientReducer
from terncomm.transports.launched import tell_of_one_process
from terncomm.watch import Watch

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"terncomm.transformers needs transformers ({missing}): pip install 'transformers[torch]'"
    ) from None


class CompressGradients(TrainerCallback):  # type: ignore[misc]
    """Registers the hook when training starts.

    The rounding noise is a function of the Trainer's step, so nothing else is saved for resuming. The state of `stages`
    is not saved.

    Args:
        trainer: the Trainer to which this callback is added.
        codec: "terngrad", "int8", or a codec such as `Ternary(clip=2.5)`.
        jsonl, tensorboard, log_every: see :class:`terncomm.Watch`.
        options: see :func:`terncomm.register`.

    Attributes:
        state: what :func:`terncomm.register` returned, once training has started.

    Raises:
        TypeError: at the start of training, if :func:`terncomm.register` does not accept the Trainer's model. With one
            process nothing is registered; if a launcher has started more, a warning says so.
    """

    def __init__(
        self,
        trainer: Any,
        codec: str | Codec = "terngrad",
        *,
        jsonl: str | Path | None = None,
        tensorboard: Any = None,
        log_every: int = 100,
        **options: Any,
    ) -> None:
        self._trainer, self._codec, self._options = trainer, codec, options
        self._watching = {"jsonl": jsonl, "tensorboard": tensorboard, "log_every": log_every}
        self._watch: Watch | None = None
        self._model: Any = None
        self.state: GradientReducer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Register the hook, and continue at the Trainer's step."""
        if args.world_size == 1:
            tell_of_one_process("the Trainer", "On CPU, give TrainingArguments(use_cpu=True)")
            return
        self.on_train_end(args, state, control)  # closes the Watch of a training that was interrupted
        if self.state is None or self._model is not self._trainer.model_wrapped:  # train() may be called again
            self._model = self._trainer.model_wrapped
            self.state = register(self._model, self._codec, **self._options)
        self.state.load_state_dict({"step": state.global_step - 1, "seed": self.state.seed})
        self._watch = Watch(self.state, **self._watching)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the :class:`terncomm.Watch`."""
        if self._watch is not None:
            self._watch.close()
