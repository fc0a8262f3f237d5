"""What a group of processes really takes for a message: a sweep over sizes of each collective call, in lockstep."""

import math
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from terncomm.simulator.fabric import ALL_REDUCE, ALL_REDUCE_HALF, KINDS, Measured
from terncomm.transports import ProcessGroupTransport

SIZES = (1 << 10, 24 << 10, 120 << 10, 600 << 10, 2400 << 10, 7 << 20)  # bytes that a rank sends in a call
_ENOUGH = 1 << 20  # bytes that a measurement sends at least: more than a token bucket lets through at once
_ROUNDS = 7
_PAUSE_S = 0.02
_LATE_ROUNDS = 21


@dataclass(frozen=True)
class Calibration:
    """What was measured on a group.

    Args:
        fabric: seconds of each call by size, and how busy it keeps a core.
        bytes_per_s: sent by each rank in the largest all-reduce.
        round_s: of the smallest all-to-all.
    """

    fabric: Measured
    bytes_per_s: float
    round_s: float


def calibrate(group: Any, *, budget_s: float = 40.0, tell: Callable[[str], None] = lambda line: None) -> Calibration:
    """Measure a process group on the CPU that nobody else uses meanwhile. Collective: every rank calls it.

    budget_s: about how long it may take; on a slow link the largest sizes are left out.
    tell: called on every rank with a line of progress.

    Raises:
        RankFailed: a rank could not be reached.
        ValueError: the group has one rank.
    """
    transport = ProcessGroupTransport(group)
    world_size = transport.world_size
    if world_size < 2:
        raise ValueError("a group of one rank sends nothing; start at least 2")
    transport.adapt()
    points: dict[str, list[tuple[float, float]]] = {}
    busy: dict[str, float] = {}
    late: dict[str, float] = {}
    rate = 0.0
    for kind in KINDS:
        found = points[kind] = []
        ends = time.perf_counter() + budget_s / len(KINDS)
        for size in SIZES:
            nbytes = -(-size // (world_size - 1))
            if kind == "all_gather":
                nbytes += transport.at_once  # below that, it goes all to all
            if len(found) >= 2 and _left_s(ends, transport) < (1 + _ROUNDS) * _line(found, nbytes):
                break
            call = _call(kind, nbytes, transport, group)
            seconds, busy_now = _measure(call, (world_size - 1) * nbytes, transport, budget_s / len(KINDS) / len(SIZES))
            found.append((float(nbytes), seconds))
            if kind == ALL_REDUCE:
                rate = max(rate, (world_size - 1) * nbytes / seconds)
            tell(f"{kind:15} {(world_size - 1) * nbytes / 1e3:8.0f} kB in {1e3 * seconds:8.2f} ms")
        busy[kind] = min(busy_now, 1.0)
        late[kind] = _late(kind, int(found[0][0]), transport, group)
    measured = Measured(world_size, points, busy, late, transport.at_once)
    return Calibration(measured, rate, points["all_to_all"][0][1])


def _late(kind: str, nbytes: int, transport: ProcessGroupTransport, group: Any) -> float:
    """How much longer a small message takes while every rank computes on one thread more."""
    call = _call(kind, nbytes, transport, group)

    def seconds() -> float:
        found = []
        for _ in range(_LATE_ROUNDS):
            _of_all([0.0], transport)
            began = time.perf_counter()
            call()
            found.append(float(_of_all([time.perf_counter() - began], transport).amax()))
        return statistics.median(found)

    idle_s, stop = seconds(), threading.Event()
    thread = threading.Thread(target=_compute, args=(stop,), daemon=True)
    thread.start()
    try:
        return max(seconds() - idle_s, 0.0)
    finally:
        stop.set()
        thread.join()


def _compute(stop: threading.Event) -> None:
    """What a backward pass does to a core, until told to stop; it needs the interpreter as seldom."""
    torch.set_num_threads(1)
    left = torch.ones(512, 512)
    while not stop.is_set():
        left @ left


def _line(points: list[tuple[float, float]], nbytes: int) -> float:
    (n0, t0), (n1, t1) = points[-2:]
    return t1 + max(t1 - t0, 0.0) / (n1 - n0) * (nbytes - n1)


def _left_s(ends: float, transport: ProcessGroupTransport) -> float:
    """Until `ends`, on the rank that has least: all decide alike."""
    return float(_of_all([ends - time.perf_counter()], transport).amin())


def _of_all(values: list[float], transport: ProcessGroupTransport) -> torch.Tensor:
    """(W, k) float64."""
    return transport.all_gather(torch.tensor(values, dtype=torch.float64).view(torch.uint8)).view(torch.float64)


def _call(kind: str, nbytes: int, transport: ProcessGroupTransport, group: Any) -> Callable[[], object]:
    world_size = transport.world_size
    if kind == "all_to_all":
        rows = torch.zeros(world_size, nbytes, dtype=torch.uint8)
        return lambda: transport.all_to_all(rows)
    if kind == "all_gather":
        payload = torch.zeros(nbytes, dtype=torch.uint8)
        return lambda: transport.all_gather(payload)
    dtype = torch.float16 if kind == ALL_REDUCE_HALF else torch.float32
    numel = math.ceil(nbytes * world_size / 2 / dtype.itemsize)  # a ring sends 2 / W of them to the next, W - 1 times
    values = torch.zeros(numel, dtype=dtype)
    return lambda: dist.all_reduce(values, group=group)


def _measure(
    call: Callable[[], object], sent: int, transport: ProcessGroupTransport, budget_s: float
) -> tuple[float, float]:
    """Seconds of a call, and the share of a core that it kept busy: of the slowest rank, the median of some rounds."""
    began = time.perf_counter()
    call()
    first_s = max(float(_of_all([time.perf_counter() - began], transport).amax()), 1e-6)
    wanted = -(-_ENOUGH // max(sent, 1))
    repeat = max(1, min(16, wanted, int(budget_s / _ROUNDS / first_s)))
    found = []
    for _ in range(_ROUNDS):
        time.sleep(_PAUSE_S)  # as in a step: between buckets a connection is idle
        _of_all([0.0], transport)
        began, worked = time.perf_counter(), time.process_time()
        for _ in range(repeat):
            call()
        mine = [(time.perf_counter() - began) / repeat, (time.process_time() - worked) / repeat]
        found.append(_of_all(mine, transport).amax(dim=0).tolist())
    seconds, worked = (statistics.median(values) for values in zip(*found, strict=True))
    return seconds, worked / seconds
