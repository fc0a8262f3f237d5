"""How long a module computes."""

import statistics
import time
from typing import Any

import torch
from torch import nn


def time_module(module: nn.Module, example: Any, *, rounds: int = 5) -> float:
    """Seconds of a forward and a backward pass on an example input; the gradients are dropped again.

    The loss is the sum of all floating-point outputs.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    found = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        outputs = module(*inputs)
        tensors = [outputs] if isinstance(outputs, torch.Tensor) else list(_tensors(outputs))
        torch.autograd.backward(sum((tensor.float().sum() for tensor in tensors), torch.zeros(())))
        found.append(time.perf_counter() - began)
        for parameter in module.parameters():
            parameter.grad = None
    return statistics.median(found[1:])


def _tensors(outputs: Any) -> Any:
    values = outputs.values() if isinstance(outputs, dict) else outputs
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield value
        elif isinstance(value, (tuple, list, dict)):
            yield from _tensors(value)
