"""The time of a step, from what is computed, what is sent, and what joins the workers."""

from collections.abc import Sequence
from typing import NamedTuple

from terncomm.path.drivers import Call, sent
from terncomm.segments import Segments
from terncomm.simulator.codec_costs import Cost
from terncomm.simulator.fabric import Fabric
from terncomm.simulator.reductions import Reduction
from terncomm.simulator.timeline import DECODE, ENCODE, WIRE, Compute, Stage, StepTime, step_time


class Load(NamedTuple):
    """What reducing a bucket asks for: calls of the transport, in order, and elements to encode and decode.

    cost_s: seconds to encode, to add up, to decode, where they were measured on this bucket.
    """

    calls: tuple[Call, ...]
    elements: int
    cost_s: tuple[float, float, float] | None = None


def load_of(coded: Segments, exact: Segments, reduction: Reduction, world_size: int, itemsize: int = 4) -> Load:
    """The load of a bucket with these layers, of `itemsize` bytes an element."""
    elements = coded.numel + (exact.numel if reduction.whole else 0)
    return Load(tuple(reduction.calls(coded, exact, world_size, itemsize)), elements)


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
    buckets = [_stages(load, world_size, fabric, cost) for load in loads]
    return step_time(compute, buckets, cores=cores)


def _stages(load: Load, world_size: int, fabric: Fabric, cost: Cost) -> list[Stage]:
    """What happens to a bucket, in order: encode, the calls that lead to the sums, add up, their way back, decode."""
    wires = [Stage(WIRE, fabric.seconds(call, world_size), fabric.busy(call), fabric.late(call)) for call in load.calls]
    wires.insert(0, Stage(WIRE, cost.waiting_s(load.elements) if load.elements else 0.0))
    encode, add, decode = load.cost_s or (cost.seconds(load.elements) if load.elements else (0.0, 0.0, 0.0))
    return [Stage(ENCODE, encode), *wires[:-1], Stage(DECODE, add), *wires[-1:], Stage(DECODE, decode)]


def sent_bytes(loads: Sequence[Load], world_size: int) -> int:
    """Bytes that each worker sends in a step."""
    return sent([call for load in loads for call in load.calls], world_size)
