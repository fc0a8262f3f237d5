"""Keys of the rounding noise: (seed, step, layer, rank, world size) -> key of a counter-based random stream.

Rounding noise is a pure function of its key and of the element's index inside its layer. No random generator is used.
So there is no generator state to seed or to save, and PyTorch's global generators are not touched.

Keys are derived with the finalizer of SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014). The stream has the structure of SplitMix, in 32 bits: a mixer of a Weyl sequence. Here the
mixer gets two Weyl sequences; each starts at one half of the key. Their increments are those of Philox's keys, from
the golden ratio and the square root of 3: 0x9e3779b9 and 0xbb67ae85 (Salmon, Moraes, Dror, Shaw, "Parallel Random
Numbers: As Easy as 1, 2, 3", SC 2011). The mixer is lowbias32 (Wellons, "Prospecting for Hash Functions", 2018;
constants 0x21f0aaad, 0x735a2d97). The second sequence is added again between the mixer's rounds, as in Squares
(Widynski, "Squares: A Fast Counter-Based RNG", 2020). See `noise` in `terncomm.ops.reference`.
"""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
NO_RANK = 2**32 - 1  # in place of a rank, for noise that is equal on all ranks


def _mix(x: int) -> int:
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _M1) & _MASK
    x = ((x ^ (x >> 27)) * _M2) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _shift(x: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mix_tensor(x: torch.Tensor) -> torch.Tensor:
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift(x, 30)) * _signed(_M1)
    x = (x ^ _shift(x, 27)) * _signed(_M2)
    return x ^ _shift(x, 31)


def integer(name: str, value: Any) -> int:
    """`value` as an int, also if it is an integer of NumPy.

    Raises:
        TypeError: it is no integer; `name` says in the message what it is for.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return int(value)


@dataclass(frozen=True)
class Key:
    """Identifies one reduction: the seed and step of its rounding noise, and its bucket.

    Args:
        seed: chosen by the user; must be equal on all ranks.
        step: number of the optimizer step.
        bucket: index of the reduction in this step. It is compared across ranks, but does not change the noise.

    >>> Key(1).streams(torch.tensor([0, 1]), rank=0, world_size=2).shape
    torch.Size([2, 2])
    """

    seed: int
    step: int = 0
    bucket: int = 0

    def __post_init__(self) -> None:
        for name in ("seed", "step", "bucket"):
            value = integer(name, getattr(self, name))
            object.__setattr__(self, name, value)
            if not -(2**63) <= value < 2**63:
                raise ValueError(f"{name} must fit in 64 bits, got {value}")

    def streams(self, layers: torch.Tensor, *, rank: int, world_size: int) -> torch.Tensor:
        """Noise keys of layers.

        Args:
            layers: (L,) int64 layer numbers.
            rank: whose noise; `NO_RANK` for noise that is equal on all ranks.
            world_size: W.

        Returns:
            (L, 2) int64 in [0, 2**32): two 32-bit key words for each layer.
        """
        state = _mix(self.seed & _MASK)
        for word in (self.step, rank, world_size):
            state = _mix(state ^ (word & _MASK))
        mixed = _mix_tensor(_mix_tensor(layers) ^ _signed(state))
        return torch.stack([mixed & 0xFFFFFFFF, _shift(mixed, 32)], dim=1)
