"""Which gradients DDP reduces together, and when: by PyTorch's own rule."""

import sys
from collections.abc import Sequence

import torch

from terncomm.torch_internals import bucket_assignment, first_bucket_bytes

_MB = 2**20
DEFAULT_CAP_MB = 25.0


def first_buckets(parameters: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The buckets of the first iteration: one for each dtype, whatever its size, in the order of registration."""
    return list(reversed(_cut(parameters, [sys.maxsize])))


def rebuilt_buckets(ready: Sequence[torch.Tensor], cap_mb: float | None = None) -> list[list[torch.Tensor]]:
    """The buckets of all further iterations, in the order in which they are reduced.

    ready: parameters in the order in which their gradients were ready in the first iteration.
    cap_mb: DDP's `bucket_cap_mb`; None for the default, 25 MB with a first bucket of 1 MB.
    """
    limits = [int((DEFAULT_CAP_MB if cap_mb is None else cap_mb) * _MB)]
    if cap_mb is None:
        limits.insert(0, first_bucket_bytes())
    return _cut(ready, limits)


def _cut(parameters: Sequence[torch.Tensor], limits: list[int]) -> list[list[torch.Tensor]]:
    return [[parameters[place] for place in bucket] for bucket in bucket_assignment(parameters, limits)]
