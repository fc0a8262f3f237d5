"""The time of a step, from what is computed, what is sent, and what joins the workers."""

from collections.abc import Sequence
from typing import NamedTuple

from terncomm.path.drivers import Call, sent
from terncomm.segments import Segments
from terncomm.simulator.codec_costs import Cost
from terncomm.simulator.fabric import Fabric
from terncomm.simulator.reductions import Coded, Reduction
from terncomm.simulator.timeline import DECODE, ENCODE, WIRE, Compute, Stage, StepTime, step_time


class Load(NamedTuple):
    """What reducing a bucket asks for: calls of the transport, in order, and elements to encode and decode.

    cost_s: seconds to encode, to add up, to decode, where they were measured on this bucket.
    rows: for each piece of the bucket, whether it is sent in rows; () if the bucket is one message, or not in pieces.
    """

    calls: tuple[Call, ...]
    elements: int
    cost_s: tuple[float, float, float] | None = None
    rows: tuple[bool, ...] = ()


def load_of(coded: Segments, exact: Segments, reduction: Reduction, world_size: int, itemsize: int = 4) -> Load:
    """The load of a bucket with these layers, of `itemsize` bytes an element."""
    elements = coded.numel + (exact.numel if reduction.whole else 0)
    rows = reduction.pieces(coded, exact, world_size, itemsize) if isinstance(reduction, Coded) else ()
    return Load(tuple(reduction.calls(coded, exact, world_size, itemsize)), elements, rows=tuple(rows))


def predict(
    compute: Compute,
    loads: Sequence[Load],
    world_size: int,
    fabric: Fabric,
    cost: Cost,
    *,
    cores: float = 2.0,
) -> StepTime:
    """The time of a step.

    Args:
        compute: of one worker; its buckets are these.
        loads: of each bucket, in the order in which they are reduced.
        world_size: W.
        fabric: what joins the workers.
        cost: of the codec's arithmetic on a worker.
        cores: that a worker has for computing and reducing at the same time.
    """
    if world_size == 1:
        return StepTime(compute.total_s)
    pieces = [(index, stages) for index, load in enumerate(loads) for stages in _stages(load, world_size, fabric, cost)]
    stages, bucket_of = [stages for _, stages in pieces], [index for index, _ in pieces]
    return step_time(compute, stages, cores=cores, bucket_of=bucket_of)


def _stages(load: Load, world_size: int, fabric: Fabric, cost: Cost) -> list[list[Stage]]:
    """The stages of each piece of a bucket: encode, the calls that lead to the sums, add up, the way back, decode.

    The first piece has the calls that come before those of all pieces, such as the header.
    """
    wires = [Stage(WIRE, fabric.seconds(call, world_size), fabric.busy(call), fabric.late(call)) for call in load.calls]
    wires.insert(0, Stage(WIRE, cost.waiting_s(load.elements) if load.elements else 0.0))
    first = len(wires) - len(load.rows) - sum(load.rows)
    last = list(zip(load.calls, wires[1:], strict=True))[max(first - 1, 0) :]
    ups = [wire for call, wire in last if call.kind == "all_to_all"]
    backs = [wire for call, wire in last if call.kind != "all_to_all"]
    if load.rows and len(ups) == sum(load.rows):
        coming = iter(ups)
        ways = [([next(coming)] if in_rows else [], [back]) for in_rows, back in zip(load.rows, backs, strict=True)]
        ways[0] = wires[:first] + ways[0][0], ways[0][1]
    else:  # not in pieces, or with the lengths of a byte coder between them
        ways = [(wires[:-1], wires[-1:])]
    costs = load.cost_s or (cost.seconds(load.elements) if load.elements else (0.0, 0.0, 0.0))
    encode, add, decode = (seconds / len(ways) for seconds in costs)
    return [[Stage(ENCODE, encode), *up, Stage(DECODE, add), *back, Stage(DECODE, decode)] for up, back in ways]


def sent_bytes(loads: Sequence[Load], world_size: int) -> int:
    """Bytes that each worker sends in a step."""
    return sent([call for load in loads for call in load.calls], world_size)
