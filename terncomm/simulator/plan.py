"""Step time, throughput and break-even of known networks and of one's own, without training."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from terncomm.layers import Layers, clean
from terncomm.segments import Segments
from terncomm.simulator.buckets import rebuilt_buckets
from terncomm.simulator.codec_costs import FREE, Cost, measure
from terncomm.simulator.fabric import GLOO, Fabric, Software, Switched
from terncomm.simulator.links import Link
from terncomm.simulator.networks import Network
from terncomm.simulator.predict import Load, load_of, predict, sent_bytes
from terncomm.simulator.provenance import provenance
from terncomm.simulator.reductions import Coded, family, reduction_for
from terncomm.simulator.timeline import Compute, StepTime

FP16 = (
    "fp16 is PyTorch's own: model.register_comm_hook(None, "
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks.fp16_compress_hook)"
)
WORTH = 1.05  # a codec that makes steps less than this much faster is not advised
_MEASURED_RANKS = 4  # whose codes are added up where a codec's cost is measured
GENTLEST = ("none", "fp16", "int8", "terngrad")  # least noise first


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a worker computes with.

    Args:
        name: as it stands in results.
        flops_per_s: sustained in forward and backward, a multiplication and an addition counted as two.
        costs: of each codec's arithmetic.
        cores: for computing and reducing at the same time: 2 where they do not disturb each other.
        source: where the numbers are from.
    """

    name: str
    flops_per_s: float
    costs: Mapping[str, Cost]
    cores: float
    source: str


def _linear(fixed_us: tuple[float, float, float], per_element_ns: tuple[float, float, float]) -> Cost:
    a, b, c = (1e-6 * value for value in fixed_us)
    d, e, f = (1e-9 * value for value in per_element_ns)
    return Cost((a, b, c), (d, e, f))


_ASSUMED = _linear((50, 20, 20), (0.02, 0.01, 0.01))  # some ten passes over the data at 1 TB/s
DEVICES = {
    device.name: device
    for device in (
        Device(
            name="gpu",
            flops_per_s=20e12,
            costs={"fp16": _linear((10, 0, 10), (0.006, 0, 0.006)), "int8": _ASSUMED, "terngrad": _ASSUMED},
            cores=2.0,
            source="assumed: 20 TFLOP/s sustained, codecs at 1 TB/s",
        ),
        Device(
            name="cpu-core",
            flops_per_s=50e9,
            costs={
                "fp16": _linear((0, 0, 0), (0.5, 0, 0.5)),
                "int8": _linear((300, 50, 50), (1.2, 1.0, 0.7)),
                "terngrad": _linear((300, 50, 50), (1.2, 0.8, 0.7)),
            },
            cores=1.0,
            source="one core of an AMD EPYC (avx2), measured by terncomm.simulator.codec_costs",
        ),
    )
}


@dataclass(frozen=True)
class Job:
    """A network on W workers: what is computed, in which buckets, whatever links and codecs there are.

    Args:
        network: its layers and their costs.
        batch_size: samples per worker and step.
        device: of a worker.
        compute_s: forward and backward of one worker, if it is known; else from the device's rate.
        bucket_cap_mb: as of DDP.
    """

    network: Network
    batch_size: int
    device: Device
    compute_s: float | None = None
    bucket_cap_mb: float | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.compute_s is not None and not (self.compute_s >= 0 and math.isfinite(self.compute_s)):
            raise ValueError(f"the time of computing must not be negative, got {self.compute_s} s")
        if self.bucket_cap_mb is not None and not (self.bucket_cap_mb > 0 and math.isfinite(self.bucket_cap_mb)):
            raise ValueError(f"bucket_cap_mb must be positive, got {self.bucket_cap_mb}")

    @property
    def title(self) -> str:
        """The network, its size, and how much of it is coded, in words."""
        numel = self.network.numel
        coded = sum(coded.numel for coded, _, _ in self._laid_out[1])
        size = f"{numel / 1e6:.1f} M parameters"
        name = "" if self.network.title.endswith("M parameters") else f"{self.network.title}, "
        if coded == numel:
            return f"{name}{size}"
        return f"{name}{size}, of which {coded / numel:.0%} are coded (not the output head, embeddings, small tensors)"

    def point(self, codec: str, workers: int, fabric: Fabric) -> StepTime:
        """The time of a step."""
        cost = FREE if codec == "none" else self.device.costs.get(family(codec)) or self._measured(codec)
        compute, _ = self._laid_out
        loads = self._loads(codec, workers)
        device = self.device
        return predict(compute, loads, workers, fabric, cost, cores=device.cores)

    def sent_bytes(self, codec: str, workers: int) -> int:
        """Bytes that each worker sends in a step."""
        return sent_bytes(self._loads(codec, workers), workers)

    def break_even(self, codec: str, workers: int, fabric: Switched) -> float | None:
        """The rate in bits/s up to which steps with this codec are WORTH times as fast as without; None: at no rate.

        The rate of `fabric.link` is varied from 1 kbit/s to 1 Tbit/s, all else left as it is; inf: at all of them.
        """

        def gain(log_rate: float) -> float:
            varied = replace(fabric, link=replace(fabric.link, bits_per_s=10**log_rate))
            return self.point("none", workers, varied).step_s - WORTH * self.point(codec, workers, varied).step_s

        low, high = 3.0, 12.0
        if gain(low) <= 0:
            return None
        if gain(high) > 0:
            return math.inf
        while high - low > 1e-3:
            middle = (low + high) / 2
            low, high = (middle, high) if gain(middle) > 0 else (low, middle)
        return float(10**low)

    @cached_property
    def _laid_out(self) -> tuple[Compute, list[tuple[Segments, Segments, int]]]:
        """What is computed when; layers and itemsize of each bucket, in the order in which gradients are ready."""
        network = self.network
        named = [(p.name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"))) for p in network.parameters]
        layers = Layers(named, skip=[clean(p.name) for p in network.parameters if p.kind])
        total_s = self.compute_s
        if total_s is None:
            total_s = 3 * network.flops * self.batch_size / self.device.flops_per_s
        backward_s = total_s * 2 / 3  # gradients of inputs and of weights: twice the forward pass
        done, ready_s = 0.0, dict[torch.Tensor, float]()
        for described, (_, parameter) in zip(reversed(network.parameters), reversed(named), strict=True):
            done += described.flops
            ready_s[parameter] = backward_s * done / (network.flops or 1.0)
        buckets = rebuilt_buckets(list(ready_s), self.bucket_cap_mb)
        ready = tuple(max(ready_s[parameter] for parameter in bucket) for bucket in buckets)
        return Compute(total_s / 3, ready, backward_s), [
            (*layers.of_bucket(bucket), bucket[0].itemsize) for bucket in buckets
        ]

    def _measured(self, codec: str) -> Cost:
        """The cost of a codec of the user's own, measured once, on a core of this machine."""
        if codec not in self._costs:
            reduction = reduction_for(codec)
            assert isinstance(reduction, Coded)
            self._costs[codec] = measure(reduction.codec, _MEASURED_RANKS)
        return self._costs[codec]

    @property
    def measured(self) -> list[str]:
        """The codecs whose cost was measured on this machine, because the device does not have it."""
        return list(self._costs)

    @cached_property
    def _costs(self) -> dict[str, Cost]:
        return {}

    @cached_property
    def _known(self) -> dict[tuple[str, int], list[Load]]:
        return {}

    def _loads(self, codec: str, workers: int) -> list[Load]:
        if (codec, workers) not in self._known:
            reduction = reduction_for(codec)
            self._known[codec, workers] = [
                load_of(coded, exact, reduction, workers, itemsize) for coded, exact, itemsize in self._laid_out[1]
            ]
        return self._known[codec, workers]


def plan(
    job: Job,
    *,
    workers: Sequence[int],
    links: Sequence[Link],
    codecs: Sequence[str] = ("none", "fp16", "int8", "terngrad"),
    per_node: int = 1,
    inside: Link | None = None,
    software: Software = GLOO,
) -> Iterator[dict[str, Any]]:
    """A record for each point: of workers, links and codecs, each with each.

    Raises:
        ValueError: no workers, an unknown codec.
    """
    for codec in codecs:
        reduction_for(codec)
    if bad := [count for count in workers if count < 1]:
        raise ValueError(f"workers must be at least 1, got {bad[0]}")
    told = provenance()
    for count in workers:
        sent = {codec: job.sent_bytes(codec, count) for codec in codecs}
        for link in links:
            fabric = Switched(link, per_node, inside, software)
            for codec in codecs:
                time = job.point(codec, count, fabric)
                if time.step_s == 0:
                    raise ValueError("a step of one worker that computes nothing takes no time: give what it computes")
                yield {
                    "mode": "plan",
                    "config": {
                        "network": job.network.name,
                        "workers": count,
                        "codec": codec,
                        "link": link.name,
                        "per_node": per_node,
                        "inside": inside.name if inside else None,
                        "software": software.name,
                        "batch_size": job.batch_size,
                        "device": job.device.name,
                        "device_source": job.device.source,
                        "given_compute_s": job.compute_s,
                        "bucket_cap_mb": job.bucket_cap_mb,
                    },
                    "provenance": told,
                    "bits_per_s": link.bits_per_s,
                    "delay_s": link.delay_s,
                    "parameters": job.network.numel,
                    "sent_bytes": sent[codec],
                    **time.parts(),
                    "samples_per_s": count * job.batch_size / time.step_s,
                }


def advice(steps_s: Mapping[str, float], *, near: float = 1.1) -> tuple[str, str]:
    """Which codec to use, and why, from the step times of all, "none" among them.

    The gentlest within a tenth of the quickest; and "none" where even the quickest is not WORTH it.
    """
    none_s = steps_s["none"]
    quickest = min(steps_s, key=lambda codec: steps_s[codec])
    best_s = steps_s[quickest]
    if quickest == "none":
        return "none", "keep none: no codec makes steps faster"
    if none_s < WORTH * best_s:
        return "none", f"keep none: the quickest, {quickest}, would make steps {none_s / best_s:.2f}x as fast"
    order = sorted(steps_s, key=lambda codec: (*GENTLEST, family(codec)).index(family(codec)))
    chosen = next(codec for codec in order if steps_s[codec] <= near * best_s)
    faster = f"{chosen}: steps {none_s / steps_s[chosen]:.2f}x as fast as without"
    if chosen == quickest:
        return chosen, faster
    return chosen, f"{faster}; {quickest} would be {steps_s[chosen] / best_s:.2f}x as fast again, with more noise"
