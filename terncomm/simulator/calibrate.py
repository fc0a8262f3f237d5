"""What a group of processes really takes for a message: a sweep over sizes of each collective call, in lockstep."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from terncomm.simulator.fabric import KINDS, Measured
from terncomm.transports.process_group import AT_ONCE, ProcessGroupTransport

SIZES = (1 << 10, 24 << 10, 120 << 10, 600 << 10, 2400 << 10, 7 << 20)  # bytes that a rank sends in a call
_CPU = torch.device("cpu")
_ENOUGH = 1 << 20  # bytes that a measurement sends at least: more than a token bucket lets through at once
_ROUNDS = 5


@dataclass(frozen=True)
class Calibration:
    """What was measured on a group.

    Args:
        fabric: seconds of each call by size.
        wire_busy: share of a core that a rank's process used while large messages were on their way.
        bytes_per_s: sent by each rank in the largest all-reduce.
        round_s: of the smallest all-to-all.
    """

    fabric: Measured
    wire_busy: float
    bytes_per_s: float
    round_s: float


def calibrate(
    group: Any,
    *,
    budget_s: float = 30.0,
    device: torch.device = _CPU,
    tell: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Measure a process group that nobody else uses meanwhile. Collective: every rank calls it.

    budget_s: about how long it may take; on a slow link the largest sizes are left out.
    device: of the tensors that are sent.
    tell: called on every rank with a line of progress.

    Raises:
        RankFailed: a rank could not be reached.
    """
    transport = ProcessGroupTransport(group)
    world_size = transport.world_size
    if world_size < 2:
        raise ValueError("a group of one rank sends nothing; start at least 2")
    points: dict[str, list[tuple[float, float]]] = {}
    busy = rate = 0.0
    for kind in KINDS:
        points[kind] = []
        expected_s = 0.0
        for size in SIZES:
            nbytes = -(-size // (world_size - 1))
            if kind == "all_gather":
                nbytes += AT_ONCE  # below that, it goes all to all
            if expected_s * nbytes > budget_s / len(KINDS) and len(points[kind]) >= 2:
                break
            call = _call(kind, nbytes, transport, group, device)
            seconds, busy_now = _measure(call, (world_size - 1) * nbytes, transport, device)
            points[kind].append((float(nbytes), seconds))
            expected_s = 5 * _ROUNDS * seconds / nbytes
            if kind == "all_reduce":
                rate = max(rate, (world_size - 1) * nbytes / seconds)
            busy = busy_now
            tell(f"{kind:10} {(world_size - 1) * nbytes / 1e3:8.0f} kB in {1e3 * seconds:8.2f} ms")
    return Calibration(Measured(world_size, points), min(busy, 1.0), rate, points["all_to_all"][0][1])


def _call(
    kind: str, nbytes: int, transport: ProcessGroupTransport, group: Any, device: torch.device
) -> Callable[[], object]:
    world_size = transport.world_size
    if kind == "all_to_all":
        rows = torch.zeros(world_size, nbytes, dtype=torch.uint8, device=device)
        return lambda: transport.all_to_all(rows)
    if kind == "all_gather":
        payload = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        return lambda: transport.all_gather(payload)
    values = torch.zeros(
        math.ceil(nbytes * world_size / 2 / 4), device=device
    )  # a ring sends 2 / W of them to the next, W - 1 times
    return lambda: dist.all_reduce(values, group=group)


def _measure(
    call: Callable[[], object], sent: int, transport: ProcessGroupTransport, device: torch.device
) -> tuple[float, float]:
    """Seconds of a call, and the share of a core that it kept busy: of the slowest rank, the median of some rounds."""
    repeat = max(1, min(16, -(-_ENOUGH // max(sent, 1))))
    call()
    found = []
    for _ in range(_ROUNDS):
        transport.all_gather(torch.zeros(8, dtype=torch.uint8, device=device))
        began, worked = time.perf_counter(), time.process_time()
        for _ in range(repeat):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        mine = [(time.perf_counter() - began) / repeat, (time.process_time() - worked) / repeat]
        all_ranks = transport.all_gather(torch.tensor(mine, dtype=torch.float64, device=device).view(torch.uint8)).view(
            torch.float64
        )
        found.append(all_ranks.amax(dim=0).tolist())
    seconds, worked = (statistics.median(values) for values in zip(*found, strict=True))
    return seconds, worked / seconds
