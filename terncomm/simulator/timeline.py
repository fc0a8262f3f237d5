"""When a step ends: the backward pass, the codec and the messages overlap, and share the processor's cores."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_NOTHING_S = 1e-12

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


def step_time(
    compute: Compute, buckets: Sequence[Sequence[Stage]], *, cores: float = 2.0, bucket_of: Sequence[int] | None = None
) -> StepTime:
    """The time of a step whose buckets are reduced as the pipelined driver does, each when its gradients are there.

    One thread encodes and decodes, the earliest bucket first. The wire sends all messages of a bucket, then those of
    the next one. So a bucket is encoded while those before it are sent. Pieces of one bucket do not wait for each
    other. Simplified: the driver encodes a bucket after its header's answer, and overlaps the latency of messages.

    Args:
        compute: of one worker.
        buckets: the stages of each bucket, or piece of one, in order.
        cores: of one worker, for computing, encoding and sending at the same time; they are shared fairly.
        bucket_of: for each entry of `buckets`, the index of its bucket, ascending; by default each is a bucket.

    Raises:
        ValueError: the number of buckets differs from the number of times at which they are ready, or `cores` is not
            positive.
    """
    of = list(range(len(buckets))) if bucket_of is None else list(bucket_of)
    count = max(of, default=-1) + 1
    if count != len(compute.ready_s):
        raise ValueError(f"{count} buckets, but {len(compute.ready_s)} times at which they are ready")
    if not cores > 0:
        raise ValueError(f"cores must be positive, got {cores}")
    alone = min(1.0, cores)
    spent = {ENCODE: 0.0, WIRE: 0.0, DECODE: 0.0}
    jobs = deque(
        _Job(number, deque(stages), bucket, compute.ready_s[bucket])
        for number, (stages, bucket) in enumerate(zip(buckets, of, strict=True))
    )
    later = deque(sorted(compute.ready_s))
    work, computed = compute.backward_s, 0.0  # left to compute, and done
    while True:
        while jobs and not jobs[0].stages:
            jobs.popleft()
        active = _active(jobs, computed if work > 0 else math.inf)
        for job in active:
            if job.left is None:
                job.left = job.stages[0].seconds + (job.stages[0].late if work > 0 else 0.0)
        if work <= 0 and not active:
            return StepTime(compute.total_s, spent[ENCODE], spent[WIRE], spent[DECODE])
        wanted = [min(job.stages[0].busy, cores) for job in active]
        got = _shares([*wanted, *([1.0] if work > 0 else [])], cores)
        rates = [share / want if want else 1.0 for share, want in zip(got, wanted, strict=False)]
        mine = got[-1] / alone if work > 0 else 0.0
        ends = [job.left / rate for job, rate in zip(active, rates, strict=True)]  # type: ignore[operator]
        if work > 0:
            while later and later[0] <= computed:
                later.popleft()
            ends.append((min(work, later[0] - computed) if later else work) / mine)
        took = min(ends)
        for job, rate in zip(active, rates, strict=True):
            job.left = max(job.left - rate * took, 0.0)  # type: ignore[operator]
        if active:
            first = min(active, key=lambda job: job.number)
            spent[first.stages[0].kind] += took - mine * took
        computed, work = computed + mine * took, work - mine * took
        if work <= _NOTHING_S:
            work = 0.0
        for job in active:
            if job.left is not None and job.left <= _NOTHING_S:
                job.stages.popleft()
                job.left = None


@dataclass(eq=False)
class _Job:
    """The stages that remain of a bucket, or of a piece of one. left: seconds of the first; None: not begun."""

    number: int
    stages: deque[Stage]
    bucket: int
    ready_s: float
    left: float | None = None


def _active(jobs: Iterable[_Job], computed: float) -> list[_Job]:
    """The job whose stage is computed now, and the one whose message is sent; either may be missing."""
    computing = sending = None
    blocked, bucket = False, None  # whether later messages must wait, and the bucket that sends
    for job in jobs:
        ready = job.ready_s <= computed + _NOTHING_S
        if job.stages and ready and computing is None and job.stages[0].kind != WIRE:
            computing = job
        if not blocked and sending is None and any(stage.kind == WIRE for stage in job.stages):
            bucket = job.bucket if bucket is None else bucket
            if job.bucket != bucket or not ready:
                blocked = True
            elif job.stages[0].kind == WIRE:
                sending = job
        if computing is not None and (blocked or sending is not None):
            break
    return [job for job in (computing, sending) if job is not None]


def _shares(wanted: Sequence[float], cores: float) -> list[float]:
    """Fair shares of the cores: who wants less than an equal share gets it, and the others share the rest."""
    got = [0.0] * len(wanted)
    rest = cores
    for waiting, place in enumerate(sorted(range(len(wanted)), key=wanted.__getitem__)):
        got[place] = min(wanted[place], rest / (len(wanted) - waiting))
        rest -= got[place]
    return got
