"""Two thousand steps take no more memory, descriptors or threads than a thousand; nor do many models in turn."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm

STEPS = 2_000


def resources():
    """Resident memory in bytes, open descriptors, Python threads, all threads; when no thread has ended for a while."""
    threads = -1
    while threads != threading.active_count():
        threads = threading.active_count()
        time.sleep(0.5)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    rss = 1024 * int(status["VmRSS"].split()[0])
    return rss, len(os.listdir("/proc/self/fd")), threading.active_count(), int(status["Threads"])


def long_run():
    """Resources after a thousand steps and at the end, of two models in turn that log their statistics now and then."""
    torch.manual_seed(0)
    models = [DistributedDataParallel(nn.Sequential(*[nn.Linear(48, 48) for _ in range(2)])) for _ in range(2)]
    states = [terncomm.register(model, codec) for model, codec in zip(models, ("terngrad", "int8"), strict=True)]
    inputs = torch.randn(4, 48, generator=torch.Generator().manual_seed(dist.get_rank()))
    for step in range(STEPS // 2):
        for model in models:
            model.zero_grad()
            model(inputs).square().mean().backward()
        if step % 100 == 0:
            [state.stats() for state in states]
        if step == 499:
            early = resources()
    return early, resources(), sum(state.stats()["steps"] for state in states)


def many_models():
    """Resources after ten models and hooks, and after sixty, each with 4 MB of gradients."""
    told = []
    for number in range(60):
        model = DistributedDataParallel(nn.Linear(1024, 1024))
        terncomm.register(model, "int8")
        model(torch.ones(1, 1024)).sum().backward()
        del model
        if number in (9, 59):
            told.append(resources())
    return told


@pytest.mark.slow
def test_thousands_of_steps_do_not_grow(on_ranks):
    for early, late, steps in on_ranks(2, long_run, limit_s=240):
        assert steps == STEPS
        assert late[0] - early[0] < 2e6, "resident memory, bytes"
        assert all(after <= before for before, after in zip(early[1:], late[1:], strict=True)), (early, late)


def test_hooks_end_with_their_models(on_ranks):
    for early, late in on_ranks(2, many_models):
        # 8-bit codes kept by each model would be 50 MB; what malloc keeps for itself differs by up to 17 MB
        assert late[0] - early[0] < 40e6, "resident memory, bytes"
        assert late[1] - early[1] <= 2, "open descriptors"
        assert late[2] - early[2] <= 1, "Python threads"
        assert late[3] - early[3] <= 4, "threads"
