"""Arguments of the kernels: `Rounding` holds limits, scales and keys, `Packing` the layout of packed words."""

from typing import NamedTuple

import torch


class Rounding(NamedTuple):
    """Arguments of stochastic rounding for each of L segments; made by :func:`terncomm.ops.reference.rounding`.

    An element x becomes sign(x) * floor(min(|x|, limit) * lift * scale / 2^24 + u), where u is uniform in [0, 1).
    `limit` and `scale` are 0 where the shared scale is 0 or not finite.
    """

    limit: torch.Tensor  # (L,) float32: this rank's clip limit
    lift: torch.Tensor  # (L,) float32: 2^100 where the shared scale is below 2^-96, else 1; so `scale` is finite
    scale: torch.Tensor  # (L,) float32: levels * 2^24 / (shared scale * lift), rounded up
    keys: torch.Tensor  # (L, 2) int64 in [0, 2^32): keys of the noise, see `terncomm.keys`
    levels: int  # codes are in [-levels, levels]


class Packing(NamedTuple):
    """A planar base-`radix` layout: `digits` codes in each word of `word_bytes` bytes; see :mod:`terncomm.wire`."""

    low: int  # the smallest code: digit = code - low
    radix: int
    digits: int
    word_bytes: int

    def nbytes(self, count: int) -> int:
        """Bytes of `count` packed codes."""
        return -(-count // self.digits) * self.word_bytes
