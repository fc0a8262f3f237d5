"""What a user chooses of the averaging of gradients, the same for every engine."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from terncomm.codecs import CodecLike, Rules
from terncomm.keys import Key
from terncomm.layers import GROUPS
from terncomm.path.bucket import check_exchange
from terncomm.path.stages import Stage, Staging


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the averaging of gradients; equal on all ranks.

    Args:
        codec: "terngrad", "int8", "bf16", "fp16", or a codec such as `Ternary(clip=2.5)`. Or rules, of which the first
            match wins: a mapping from patterns to codecs, names of codecs, or None for exactly. A pattern is a name or
            shell pattern of parameters or modules, a class of modules, "embedding", "head" or "norm"; the last is
            "default". As in `{"embedding": "int8", "*.lm_head": "int8", "default": "terngrad"}`.
        skip: parameters that travel exactly, beside those exempt by rule: names, names of modules, shell patterns.
        min_numel: parameters with fewer elements, or with one dimension, travel exactly (TernGrad's
            `size_to_binarize`); "bf16" and "fp16" take them too.
        warmup_steps: first steps in which everything travels exactly (TernGrad's `floating_grad_epoch`, in steps).
        exchange: "auto", "gather" or "two_phase"; the result is the same bits.
        seed: of the rounding noise.
        exempt: groups found by the model's structure that travel exactly unless a rule names them, of "embedding" and
            "head"; `()` codes them too, as published. "bf16" and "fp16" take them too.
        stages: :class:`terncomm.path.stages.Stage`: what is done to the gradients of coded layers before they are
            coded, and to their means. Under DDP without `intra_group`, and in a `GradientAverager`.

    Raises:
        ValueError, TypeError: an option that cannot be.
    """

    codec: CodecLike = "terngrad"
    skip: Collection[str] = ()
    min_numel: int = 1024
    warmup_steps: int = 0
    exchange: str = "auto"
    seed: int = 0
    exempt: Collection[str] = GROUPS
    stages: Sequence[Stage] = ()
    rules: Rules = field(init=False)  # what `codec` says

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", Rules.of(self.codec))
        for name in ("min_numel", "warmup_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        check_exchange(self.exchange)
        Key(self.seed)
        Staging(self.stages)

    def compared(self) -> dict[str, Any]:
        """What ranks compare before the first bucket."""
        return {
            "codec": repr(self.rules),
            "seed": self.seed,
            "min_numel": self.min_numel,
            "warmup_steps": self.warmup_steps,
            "exchange": self.exchange,
            "stages": repr(tuple(self.stages)),
        }
