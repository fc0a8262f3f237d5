"""The options of gradient averaging, the same for DDP, FSDP and training loops."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from terncomm.codecs import CodecLike, Rules
from terncomm.keys import Key, integer
from terncomm.path.bucket import check_exchange
from terncomm.path.stages import Stage, Staging
from terncomm.structure import GROUPS


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of gradient averaging. They must be equal on all ranks.

    Args:
        codec: "terngrad", "int8", "bf16", "fp16", or a codec such as `Ternary(clip=2.5)`. Or rules: a mapping from
            patterns to codecs, names of codecs, or None for uncompressed. The first pattern that matches a parameter
            wins. A pattern is a shell pattern for the name of a parameter or of a module that holds it, the class name
            of such a module, "embedding", "head" or "norm". The last pattern must be "default". Example:
            `{"embedding": "int8", "*.lm_head": "int8", "default": "terngrad"}`.
        skip: parameters to be averaged uncompressed, in addition to `exempt`: shell patterns for the names of
            parameters or modules.
        min_numel: parameters with fewer elements, and vectors, are averaged uncompressed (TernGrad's
            `size_to_binarize`). "bf16" and "fp16" compress them too.
        warmup_steps: number of first steps in which all gradients are averaged uncompressed (TernGrad's
            `floating_grad_epoch`, in steps).
        exchange: "gather" (an all-gather of the codes), "two_phase" (an all-to-all of the codes, then an all-gather of
            their sums) or "auto" (chosen by size). The result is the same, bit for bit.
        seed: seed of the rounding noise.
        exempt: "embedding", "head" or both: layers found by the model's structure, averaged uncompressed unless a rule
            names them. `()` compresses them too, as published. "bf16" and "fp16" always compress them.
        stages: each a :class:`terncomm.path.stages.Stage`, which changes the gradients of compressed layers before
            encoding, and their means afterwards. For DDP without `intra_group`, and for a `GradientAverager`.

    Raises:
        ValueError, TypeError: an option is invalid.
    """

    codec: CodecLike = "terngrad"
    skip: Collection[str] = ()
    min_numel: int = 1024
    warmup_steps: int = 0
    exchange: str = "auto"
    seed: int = 0
    exempt: Collection[str] = GROUPS
    stages: Sequence[Stage] = ()
    rules: Rules = field(init=False)  # made from `codec`

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", Rules.of(self.codec))
        for name in ("min_numel", "warmup_steps"):
            value = integer(name, getattr(self, name))
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
            object.__setattr__(self, name, value)  # one way to write each value: ranks compare them in words
        check_exchange(self.exchange)
        object.__setattr__(self, "seed", Key(self.seed).seed)
        object.__setattr__(self, "stages", Staging(self.stages).stages)

    def compared(self) -> dict[str, Any]:
        """The options that ranks compare before the first bucket, as JSON values."""
        return {
            "codec": repr(self.rules),
            "seed": self.seed,
            "min_numel": self.min_numel,
            "warmup_steps": self.warmup_steps,
            "exchange": self.exchange,
            "stages": repr(self.stages),
        }
