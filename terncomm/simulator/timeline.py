"""When a step ends: one thread computes, another reduces the buckets in order, and both want the processor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

ENCODE, WIRE, DECODE = "encode", "exchange", "decode"


class Stage(NamedTuple):
    """A part of reducing a bucket.

    Args:
        kind: ENCODE or DECODE, which keep the processor busy, or WIRE.
        seconds: that it takes on its own.
        busy: share of a core that it needs meanwhile.
        late: seconds that it takes longer where it begins while others compute, and threads must wait to be run.
    """

    kind: str
    seconds: float
    busy: float = 1.0
    late: float = 0.0


@dataclass(frozen=True)
class Compute:
    """What a worker computes in a step, in seconds when nothing else runs on it.

    Args:
        forward_s: until the backward pass begins.
        ready_s: for each bucket in order, from the beginning of the backward pass until its last gradient is there.
        backward_s: the backward pass.
        after_s: what follows the reduction, such as the optimizer's update.
    """

    forward_s: float
    ready_s: tuple[float, ...]
    backward_s: float
    after_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.forward_s + self.backward_s + self.after_s


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, in parts that add up: computing, and what of the reduction computing does not hide."""

    compute_s: float
    encode_s: float = 0.0
    exchange_s: float = 0.0
    decode_s: float = 0.0

    @property
    def step_s(self) -> float:
        """From one step's beginning to the next one's."""
        return self.compute_s + self.encode_s + self.exchange_s + self.decode_s

    def parts(self) -> dict[str, float]:
        """For a record."""
        return {
            "step_s": self.step_s,
            "compute_s": self.compute_s,
            "encode_s": self.encode_s,
            "exchange_s": self.exchange_s,
            "decode_s": self.decode_s,
        }


def step_time(compute: Compute, buckets: Sequence[Sequence[Stage]], *, cores: float = 2.0) -> StepTime:
    """The time of a step in which buckets are reduced in order, each by its stages, as soon as its gradients are there.

    Args:
        compute: of one worker.
        buckets: their stages, in the order in which they are reduced.
        cores: for one worker's two threads; with less than 2 they slow each other down where both are busy.

    Raises:
        ValueError: another number of buckets than of times at which they are ready, or no cores.
    """
    if len(buckets) != len(compute.ready_s):
        raise ValueError(f"{len(buckets)} buckets, but {len(compute.ready_s)} times at which they are ready")
    if not cores > 0:
        raise ValueError(f"cores must be positive, got {cores}")
    alone = min(1.0, cores)
    spent = {ENCODE: 0.0, WIRE: 0.0, DECODE: 0.0}
    work, computed = compute.backward_s, 0.0  # left to compute, and done
    for ready, stages in zip(compute.ready_s, buckets, strict=True):
        ahead = min(max(ready - computed, 0.0), work)  # nothing to reduce meanwhile
        computed, work = computed + ahead, work - ahead
        for kind, seconds, busy, late in stages:
            left = seconds + (late if work > 0 else 0.0)
            if work > 0 and left > 0:
                mine, other = _rates(busy, cores, alone)
                both = min(left / other, work / mine)
                computed, work, left = computed + mine * both, max(work - mine * both, 0.0), left - other * both
                spent[kind] += (1 - mine) * both
            spent[kind] += max(left, 0.0)
    return StepTime(compute.total_s, spent[ENCODE], spent[WIRE], spent[DECODE])


def _rates(busy: float, cores: float, alone: float) -> tuple[float, float]:
    """How fast computing and a stage go side by side, relative to how fast each goes alone.

    Cores are shared fairly: who wants less than half of them gets what it wants.
    """
    if 1 + busy <= cores or busy == 0:
        return 1.0, 1.0
    half = cores / 2
    stage = min(busy, half)
    return min(1.0, cores - stage) / alone, stage / min(busy, cores)
