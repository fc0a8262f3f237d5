"""Training with W virtual workers: loss and accuracy against steps and against bytes that were really counted."""

import math
import statistics
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from terncomm.simulator.provenance import provenance
from terncomm.simulator.reductions import Reduction, reduction_for
from terncomm.simulator.virtual import VirtualWorkers
from terncomm.simulator.workloads import Options, Workload, cosine, load


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training run: what is trained, by how many workers, and how gradients travel.

    Args:
        data: a name of `terncomm.simulator.workloads.DATA`, or FILE.py:FUNCTION.
        codec: of CODECS, or as written: "Ternary(clip=1.5)".
        workers: W.
        batch_size: samples per worker and micro-step.
        accumulate: micro-steps whose gradients are averaged locally before one exchange and one update.
        epochs: over the training set; the learning rate falls along half a cosine.
        steps_per_epoch: at most so many micro-steps make an epoch; None for the data's own.
        lr: learning rate at the start; None for the data's own.
        warmup_steps: first exchanges in which everything travels exactly.
        bucket_cap_mb: as of DDP; None for its default.
        seed: of initial weights, of the order of the data, of rounding.
        options: further words about the data.

    Raises:
        ValueError: a number that cannot be, or an unknown codec.
    """

    data: str = "digits"
    codec: str = "terngrad"
    workers: int = 4
    batch_size: int = 16
    accumulate: int = 1
    epochs: int = 8
    steps_per_epoch: int | None = None
    lr: float | None = None
    warmup_steps: int = 0
    bucket_cap_mb: float | None = None
    seed: int = 0
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        for name in ("workers", "batch_size", "accumulate", "epochs", "steps_per_epoch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        for name in ("lr", "bucket_cap_mb"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        reduction_for(self.codec)

    def config(self) -> dict[str, Any]:
        """As plain words and numbers, for a record; two runs with one config are the same run.

        files: checksums of the user's own file and text, which may change between runs.
        """
        words = asdict(self)
        options = words.pop("options")
        options.pop("seed")
        words |= {name: None if value is None else str(value) for name, value in options.items()}
        files = [Path(self.data.rpartition(":")[0]), self.options.text]
        return words | {"files": [zlib.crc32(file.read_bytes()) for file in files if file and file.is_file()]}


def simulate(
    experiment: Experiment,
    *,
    workload: Workload | None = None,
    reduction: Reduction | None = None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda point: None,
) -> dict[str, Any]:
    """Train with virtual workers; the record of it.

    Args:
        experiment: what is to be done.
        workload: network and data, if they are not of `experiment.data`.
        reduction: how gradients are averaged, if it is not of `experiment.codec`.
        on_epoch: called with each point of the history.

    Returns:
        A record, plain words and numbers: mode, config (what was asked for), used (what the data filled in),
        provenance, parameters, history. A point of the history has
        epoch, step (micro-steps), train_loss, test_loss, test_accuracy (None where there is none), sent_bytes, what
        each worker has sent since the start, as its transport counted, and gradient_error: |error|^2 / |exact mean|^2
        of averaged gradients, the mean over layers that are coded and over the epoch's first and every tenth exchange.
        Numbers that are not finite are None.

    Raises:
        DataError: the data are not as wanted.
        Exception: whatever a virtual worker raises; the others end with it.

    Note:
        Numbers of DDP over gloo with the same seeds are the same bits, given one torch thread: with codecs for any W,
        with "none" for W = 2, above which gloo adds in another order.
    """
    torch.manual_seed(experiment.seed)
    workload = workload or make_workload(experiment)
    run = Run(experiment, workload, reduction or reduction_for(experiment.codec))
    history = []
    for point in run.epochs():
        history.append(point)
        on_epoch(point)
    return {
        "mode": "simulate",
        "config": experiment.config(),
        "used": {"lr": run.lr, "steps_per_epoch": run.steps, "fingerprint": workload.fingerprint},
        "provenance": provenance(),
        "parameters": sum(parameter.numel() for parameter in run.workers.parameters),
        "history": history,
    }


def make_workload(experiment: Experiment) -> Workload:
    """Return the data and the network, whose weights are drawn from torch's generator.

    Raises:
        DataError: the data are not as wanted.
    """
    return load(experiment.data, replace(experiment.options, seed=experiment.seed))


class Run:
    """One training run, epoch by epoch."""

    def __init__(self, experiment: Experiment, workload: Workload, reduction: Reduction) -> None:
        self.experiment = experiment
        self.workload = workload
        self.workers = VirtualWorkers(
            workload.network,
            experiment.workers,
            reduction,
            seed=experiment.seed,
            bucket_cap_mb=experiment.bucket_cap_mb,
            warmup_steps=experiment.warmup_steps,
        )
        self.lr = workload.lr if experiment.lr is None else experiment.lr
        self.optimizer = workload.optimizer(self.workers.parameters, self.lr)
        self._samplers: list[DistributedSampler[tuple[Tensor, ...]]] = [
            DistributedSampler(workload.train, experiment.workers, rank, seed=experiment.seed)
            for rank in range(experiment.workers)
        ]
        self._loaders = [
            DataLoader(workload.train, batch_size=experiment.batch_size, sampler=sampler) for sampler in self._samplers
        ]
        batches = len(self._loaders[0])
        if len(workload.test) == 0:  # type: ignore[arg-type]
            raise ValueError("the test set is empty; wanted at least one sample")
        self.steps = min(batches, experiment.steps_per_epoch or workload.steps_per_epoch or batches)
        if self.steps < experiment.accumulate:
            raise ValueError(f"accumulate={experiment.accumulate}, but an epoch has {self.steps} steps")

    def epochs(self) -> Iterator[dict[str, Any]]:
        """Train; a point of the history before the first epoch and after each."""
        schedule = cosine(self.optimizer, self.experiment.epochs)
        yield self._point(0, math.nan)
        for epoch in range(self.experiment.epochs):
            self.workload.set_epoch(epoch)
            loss = self._train_epoch(epoch)
            schedule.step()
            yield self._point(epoch + 1, loss)

    def _train_epoch(self, epoch: int) -> float:
        for sampler in self._samplers:
            sampler.set_epoch(epoch)
        batches = [self.batches(rank) for rank in range(self.experiment.workers)]
        total, exchanges = 0.0, self.steps // self.experiment.accumulate
        self.workers.errors.clear()
        for _ in range(exchanges):
            total += self.workers.step(
                lambda rank: [*map(self.loss_of, islice(batches[rank], self.experiment.accumulate))]
            )
            self.optimizer.step()
        return total / exchanges

    def batches(self, rank: int) -> Iterator[tuple[Tensor, ...]]:
        """A worker's batches of the epoch."""
        with self.workers.acting_as(rank):
            return iter(self._loaders[rank])

    def loss_of(self, batch: tuple[Tensor, ...]) -> Callable[[], Tensor]:
        """The forward pass on a batch, to be run."""
        inputs, labels = batch
        return lambda: self.workload.loss(self.workload.network(inputs), labels)

    @torch.no_grad()
    def _point(self, epoch: int, train_loss: float) -> dict[str, Any]:
        workload, network = self.workload, self.workload.network
        loss = correct = count = 0.0
        network.eval()
        with torch.random.fork_rng(devices=[]):
            for inputs, labels in DataLoader(workload.test, batch_size=workload.test_batch):
                outputs = network(inputs)
                loss += len(labels) * float(workload.loss(outputs, labels))
                correct += len(labels) * float(workload.accuracy(outputs, labels)) if workload.accuracy else 0
                count += len(labels)
        network.train()
        return {
            "epoch": epoch,
            "step": epoch * (self.steps // self.experiment.accumulate) * self.experiment.accumulate,
            "train_loss": _finite(train_loss),
            "test_loss": _finite(loss / count),
            "test_accuracy": _finite(correct / count) if workload.accuracy else None,
            "sent_bytes": self.workers.sent_bytes,
            "gradient_error": _finite(statistics.fmean(self.workers.errors or [math.nan])),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
