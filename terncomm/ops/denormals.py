"""Denormal numbers are kept on every rank, so that ranks which compute the same sum get the same bits.

`torch.set_flush_denormal(True)` makes a thread take float32 numbers below 1.2e-38 for zeros, and a job may call it on
some ranks only. Each thread has this mode for itself; a new thread begins with that of the thread which starts it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def keep() -> None:
    """Keep denormal numbers on this thread from now on."""
    torch.set_flush_denormal(False)


@contextmanager
def kept() -> Iterator[None]:
    """Inside, denormal numbers are kept on this thread; afterwards its mode is as before.

    If the mode was another, torch computes on one thread meanwhile, for the threads of its pool may have it, too.
    """
    if sys.float_info.min / 2 > 0:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep()
    try:
        yield
    finally:
        torch.set_flush_denormal(True)
        torch.set_num_threads(threads)
