"""How long a simulated job's step would take on links: computing and codecs timed here, messages by formula."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from terncomm.simulator import codec_costs
from terncomm.simulator.codec_costs import FREE
from terncomm.simulator.fabric import GLOO, Software, Switched
from terncomm.simulator.links import Link
from terncomm.simulator.predict import Load, load_of, predict
from terncomm.simulator.reductions import Coded, reduction_for
from terncomm.simulator.simulate import Experiment, Run, make_workload
from terncomm.simulator.timeline import Compute

_ROUNDS = 7
_FABRIC = ("link", "per_node", "inside", "software")


@dataclass(frozen=True)
class Profile:
    """One worker's step: what it computes, and what each bucket asks for. A worker is a core of this machine."""

    compute: Compute
    loads: tuple[Load, ...]
    workers: int

    def on(
        self, link: Link, *, per_node: int = 1, inside: Link | None = None, software: Software = GLOO
    ) -> dict[str, Any]:
        """The predicted time of a step on a link, as a part of a record."""
        fabric = Switched(link, per_node, inside, software)
        step = predict(self.compute, self.loads, self.workers, fabric, FREE, cores=1.0)
        described = {"link": link.name, "bits_per_s": link.bits_per_s, "delay_s": link.delay_s}
        nodes = {"per_node": per_node, "inside": inside.name if inside else None, "software": software.name}
        return {**described, **nodes, **step.parts()}


def profile(experiment: Experiment) -> Profile:
    """Time one virtual worker with one torch thread, and its codec, on this machine. Leave the machine to it meanwhile.

    Raises:
        DataError: the data are not as wanted.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(experiment.seed)
        return _profile(experiment)
    finally:
        torch.set_num_threads(threads)


def _profile(experiment: Experiment) -> Profile:
    run = Run(experiment, make_workload(experiment), reduction_for(experiment.codec))
    workers, reduction = run.workers, run.workers.reduction
    batches = [batch for _, batch in zip(range(_ROUNDS + 2), _forever(run), strict=False)]
    workers.step(lambda rank: [run.loss_of(batches[rank % len(batches)])])  # the buckets are DDP's after this
    buckets = workers.buckets
    ready_at: dict[Tensor, float] = {}

    def note(parameter: Tensor) -> None:
        ready_at[parameter] = time.perf_counter()

    handles = [
        parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
        for parameter in workers.parameters
    ]
    found = []
    for batch in batches:
        for parameter in workers.parameters:
            parameter.grad = None
        began = time.perf_counter()
        loss = run.loss_of(batch)()
        forward = time.perf_counter()
        torch.autograd.backward(loss)
        backward = time.perf_counter()
        run.optimizer.step()
        after = time.perf_counter()
        ready = [max(ready_at.get(p, backward) for p in bucket.parameters) - forward for bucket in buckets]
        found.append([forward - began, backward - forward, after - backward, *ready])
    for handle in handles:
        handle.remove()
    forward_s, backward_s, after_s, *ready_s = (statistics.median(column) for column in zip(*found[2:], strict=True))
    forward_s += (experiment.accumulate - 1) * (forward_s + backward_s)
    loads = []
    for bucket in buckets:
        coded, exact = bucket.layers()
        load = load_of(coded, exact, reduction, experiment.workers)
        if isinstance(reduction, Coded) and coded.numel and experiment.workers > 1:
            cost_s = codec_costs.of_bucket(reduction.codec, coded, experiment.workers)
        elif experiment.codec == "fp16":
            cost_s = codec_costs.measure_cast(numel=bucket.end - bucket.begin).seconds(load.elements)
        else:
            cost_s = (0.0, 0.0, 0.0)
        loads.append(load._replace(cost_s=cost_s))
    return Profile(Compute(forward_s, tuple(ready_s), backward_s, after_s), tuple(loads), experiment.workers)


def _forever(run: Run) -> Any:
    while True:
        yield from islice(run.batches(0), run.steps)


def time_records(
    records: Sequence[dict[str, Any]], experiments: Sequence[Experiment], links: Sequence[Link], **fabric: Any
) -> Iterator[dict[str, Any]]:
    """Put the predicted step times on `links` into the records of these experiments; yield each that had them not.

    Runs that differ in their seed alone are timed once.
    """
    known: dict[str, Profile] = {}
    for record, experiment in zip(records, experiments, strict=True):
        inside = fabric.get("inside")
        asked = fabric.get("per_node", 1), inside.name if inside else None, fabric.get("software", GLOO).name
        known_for = [tuple(link[name] for name in _FABRIC) for link in record.get("links", [])]
        if known_for == [(link.name, *asked) for link in links]:
            continue
        identity = repr({**experiment.config(), "seed": 0})
        if identity not in known:
            known[identity] = profile(experiment)
        record["links"] = [known[identity].on(link, **fabric) for link in links]
        yield record
