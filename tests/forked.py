"""Jobs of rank processes that may die: for tests of faults, where `ranks.py` keeps its processes for the next test.

A server process that has imported torch and the kernels forks the ranks, so a job starts in a moment.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from terncomm.cluster import namespaces


class Ended(NamedTuple):
    """How a rank ended: its exit status (-9: killed), what it wrote, and seconds since the job began."""

    status: int
    text: str
    seconds: float


def run_job(
    world_size: int,
    target: Callable[..., None],
    *args: Any,
    directory: Path,
    timeout_s: float = 10.0,
    limit_s: float = 60.0,
    names: list[str] | None = None,
    stopped: int | None = None,
) -> list[Ended]:
    """`target(*args)` on every rank of a gloo world; rank 0 serves the store. Fails if a rank outlives `limit_s`.

    names: paths of network namespaces, one per rank, to run in.
    stopped: a rank that stops itself, which is not waited for.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["forked_server", target.__module__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    warm = context.Process(target=os.getpid)  # starts the server, if it is not running; it takes its paths from here
    warm.start()
    warm.join()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    logs = [directory / f"rank-{rank}.log" for rank in range(world_size)]
    began = time.monotonic()
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, timeout_s, log, target, args, names))
        for rank, log in enumerate(logs)
    ]
    ended: dict[int, float] = {}
    try:
        for process in processes:
            process.start()
        while len(ended) < world_size - (stopped is not None) and time.monotonic() - began < limit_s:
            for rank, process in enumerate(processes):
                if rank not in ended and process.exitcode is not None:
                    ended[rank] = time.monotonic() - began
            time.sleep(0.01)
    finally:
        for process in processes:
            if process.is_alive():  # on SIGABRT faulthandler writes where it is
                os.kill(
                    process.pid,
                    signal.SIGKILL if stopped is not None and process is processes[stopped] else signal.SIGABRT,
                )
            process.join()
    texts = [log.read_text(errors="replace") if log.exists() else "" for log in logs]
    late = [rank for rank in range(world_size) if rank not in ended and rank != stopped]
    assert not late, f"rank {late} still ran after {limit_s} s:\n" + "\n".join(texts)
    return [
        Ended(p.exitcode, text, ended.get(r, limit_s)) for r, (p, text) in enumerate(zip(processes, texts, strict=True))
    ]


def _rank(rank, world_size, port, timeout_s, log, target, args, names):
    import faulthandler

    import torch
    import torch.distributed as dist

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
    faulthandler.enable(sys.stderr)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if names:
        namespaces.enter(names[rank])
        os.environ["GLOO_SOCKET_IFNAME"] = namespaces.INTERFACE
    master = namespaces.address(0) if names else "127.0.0.1"
    os.environ |= {"MASTER_ADDR": master, "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(world_size)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    try:
        target(*args)
    except Exception:
        traceback.print_exc()
        sys.exit(1)  # as a script ends: with its groups not destroyed, at interpreter exit
    dist.barrier()
    dist.destroy_process_group()
