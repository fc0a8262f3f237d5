"""What the hook must leave behind: the ranks' own gradients, averaged by the same path over threads of one process.

Scales, noise and sums are a layer's own, so the oracle knows nothing of buckets; whatever DDP does with them, the
gradient of a parameter has the same bits.
"""

import copy
import random
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm.codecs import Codec, codec_for
from terncomm.keys import Key
from terncomm.reduce import all_reduce_mean
from terncomm.segments import Segments
from terncomm.transports import LocalTransport

SEED = 5
CODECS = ["terngrad", "int8"]
MANY, ONE = 0.005, 25.0  # bucket_cap_mb: a layer or two per bucket, or one bucket

Gradients = list[torch.Tensor | None]  # of a model, in the order of its parameters
Told = list[tuple[Gradients, Gradients]]  # a rank's steps: its own gradients, and what the hook made of them


# ---- on a rank -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Eight layers that are not used in the order in which they are registered."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(40, 40) for _ in range(7)])
        self.first = nn.Linear(24, 40)
        self.last = nn.Linear(40, 30)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(inputs))
        for number in (3, 0, 6, 1, 5, 2, 4):
            hidden = torch.tanh(self.layers[number](hidden))
        return self.last(hidden)


def made(kind: Callable[..., nn.Module] = Net, *args: Any) -> nn.Module:
    """A model with the same parameters on every rank."""
    torch.manual_seed(0)
    return kind(*args)


def batch(step: int, *, size: int = 8, width: int = 24) -> torch.Tensor:
    """Inputs of this rank."""
    return torch.randn(size, width, generator=torch.Generator().manual_seed(1000 * step + dist.get_rank()))


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return (output - 1).square().mean()


def gradients(network: nn.Module) -> Gradients:
    return [None if p.grad is None else p.grad.clone() for p in network.parameters()]


class Twins:
    """A model under DDP and the hook, and its twin that is alone on its rank.

    Args:
        network: a model, equal on all ranks.
        codec, ddp, options: for `register` and `DistributedDataParallel`; embeddings and head are coded too.
    """

    def __init__(
        self, network: nn.Module, codec: str | Codec, ddp: dict[str, Any] | None = None, **options: Any
    ) -> None:
        self.alone, self.network = copy.deepcopy(network), network
        self.model = DistributedDataParallel(network, **{"bucket_cap_mb": MANY, **(ddp or {})})
        self.state = terncomm.register(self.model, codec, **{"seed": SEED, "exempt": (), **options})
        self.told: Told = []

    def step(self, run: Callable[[nn.Module], None], *, rate: float = 0.0) -> None:
        """Forward and backward, `run`, of both; the averaged gradient times `rate` is taken from both."""
        for one in (self.alone, self.model):
            one.zero_grad()
            run(one)
        self.note(rate)

    def note(self, rate: float = 0.0) -> None:
        """Add the gradients that there are now to what is told; go on from the same parameters."""
        self.told.append((gradients(self.alone), gradients(self.network)))
        with torch.no_grad():
            for mine, p in zip(self.alone.parameters(), self.network.parameters(), strict=True):
                if rate and p.grad is not None:
                    p -= rate * p.grad
                mine.copy_(p)


def delay(network: nn.Module, longest_s: float = 0.003) -> None:
    """Make backward take a while, now and then, on each rank elsewhere."""
    chance = random.Random(1 + dist.get_rank())

    def sleep(gradient: torch.Tensor) -> None:
        if chance.random() < 0.25:
            time.sleep(chance.uniform(0, longest_s))

    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: output.register_hook(sleep) and None)


# ---- in the test's process -------------------------------------------------------------------------------------------


def is_coded(gradient: torch.Tensor, min_numel: int = 1024) -> bool:
    vector = gradient.dim() < 2 or (gradient.shape[0] == 1 and sum(size > 1 for size in gradient.shape) < 2)
    return not vector and gradient.numel() >= min_numel and gradient.is_floating_point()


def exact_mean(rows: list[torch.Tensor]) -> torch.Tensor:
    """Added in rank order, at least in float32, then divided and cast: the mean of what travels exactly."""
    if rows[0].is_complex():  # whose division rounds otherwise
        return torch.view_as_complex(exact_mean([torch.view_as_real(row) for row in rows]))
    total = torch.zeros_like(rows[0], dtype=torch.promote_types(rows[0].dtype, torch.float32))
    for row in rows:
        total += row
    return (total / len(rows)).to(rows[0].dtype)


def mean_of(
    own: list[Gradients], codec: str | Codec, step: int, seed: int = SEED, min_numel: int = 1024
) -> dict[int, torch.Tensor]:
    """The ranks' own gradients -> {parameter number: mean}, of those that some rank has."""
    some = [next((g for g in row if g is not None), None) for row in zip(*own, strict=True)]
    rows = {n: [g[n] if g[n] is not None else torch.zeros_like(like) for g in own] for n, like in enumerate(some)
            if like is not None}  # fmt: skip
    mean = {n: exact_mean(row) for n, row in rows.items()}
    for dtype in {row[0].dtype for row in rows.values()}:
        coded = [n for n, row in rows.items() if row[0].dtype == dtype and is_coded(row[0], min_numel)]
        if coded:
            segments = Segments([mean[n].numel() for n in coded], layers=coded)

            def work(transport: LocalTransport, coded: list[int] = coded, segments: Segments = segments) -> Any:
                flat = torch.cat([rows[n][transport.rank].flatten() for n in coded])
                return all_reduce_mean(flat, segments, codec_for(codec), transport, key=Key(seed, step))

            flat = LocalTransport.run(len(own), work)[0]
            for n, piece in zip(coded, flat.split(list(segments.sizes)), strict=True):
                mean[n] = piece.view_as(mean[n])
    return mean


def check(
    told: list[Told], codec: str | Codec, *, seed: int = SEED, steps: list[int] | None = None, min_numel: int = 1024
) -> None:
    """Every rank's gradients of every step are the expected ones, bit for bit, and some of them were coded.

    `steps` are the numbers of the steps that were told; a rank that tells of fewer steps than rank 0 must have had a
    reason, so all tell of as many.
    """
    assert told[0]
    assert {len(rank) for rank in told} == {len(told[0])}
    for number, key in enumerate(range(len(told[0])) if steps is None else steps):
        mean = mean_of([rank[number][0] for rank in told], codec, key, seed, min_numel)
        assert any(is_coded(gradient, min_numel) for gradient in mean.values())
        for rank, steps_of_rank in enumerate(told):
            for n, gradient in enumerate(steps_of_rank[number][1]):
                where = f"step {key}, rank {rank}, parameter {n}"
                if n not in mean:
                    assert gradient is None, where
                else:
                    assert gradient is not None, where
                    assert gradient.dtype == mean[n].dtype, where
                    assert torch.equal(gradient, mean[n]), where


def same(one: list[torch.Tensor | None], other: list[torch.Tensor | None]) -> bool:
    """The same tensors, bit for bit."""
    return all(
        (a is None and b is None) or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )
