"""Digests of averaged gradients, kept in golden.json: whatever is rewritten, the bits stay those that were recorded.

An entry is a run of a few steps, named by codec and world; every engine that promises the bits of the DDP hook is held
to the same entry (tests/test_golden.py), which threads have recorded. Beside them are entries of codes between nodes
alone, whose scales depend on DDP's buckets, and of the path itself on buffers of awkward layouts.

Local gradients are hashes of (seed, step, rank, parameter, element), and the loss is their product with the parameters:
no forward pass, no generator and no processor has a say in them. To record anew, once bits change on purpose:
`python tests/golden.py --record`, in the environment of the tests.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm import Int8, Ternary
from terncomm.keys import Key
from terncomm.reduce import all_reduce_mean
from terncomm.segments import Segments
from terncomm.transports import LocalTransport

FILE = Path(__file__).with_name("golden.json")
STEPS = 3  # DDP lays its buckets anew after the first
SEED = 11
BUCKET_CAP_MB = 0.01  # three buckets, in one of which nothing is coded

Found = dict[str, dict[str, str]]  # of each step or buffer: of each parameter or layer, the digest of its mean


# ---- local gradients -------------------------------------------------------------------------------------------------


def bell(count: int, *place: int) -> np.ndarray:
    """(count,) float64 between -2 and 2, near to Gaussian with sigma 0.58: sums of four uniform integers."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    key = np.zeros(1, np.uint64)
    for number in (SEED, *place):
        key = _mixed(key + np.uint64(number) + golden)
    words = _mixed(key + np.arange(4 * count, dtype=np.uint64) * golden) >> np.uint64(12)
    return (words.reshape(4, count).sum(axis=0).astype(np.int64) - 2**53) * 2.0**-52


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def gradients(step: int, rank: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A rank's own gradients of a step; each layer has half the size of the one before."""
    return {
        name: torch.from_numpy(bell(shape.numel(), step, rank, place) * 2.0**-place).view(shape).to(dtype)
        for place, (name, shape) in enumerate(SHAPES.items())
    }


def loss(module: nn.Module, wanted: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss whose gradients are those that are wanted."""
    return sum((attrgetter(name)(module) * gradient).sum() for name, gradient in wanted.items())


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.wide = nn.LayerNorm(53), nn.Linear(53, width, bias=False)

    def forward(self, wanted: dict[str, torch.Tensor]) -> torch.Tensor:
        return loss(self, wanted)


class Network(nn.Module):
    """Sizes that no world divides; two layers and a filter are coded, the rest travels exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.one, self.two = nn.Embedding(50, 23), Block(67), Block(101)
        self.filter, self.head = nn.Conv2d(5, 29, 3, bias=False), nn.Linear(211, 5)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, wanted: dict[str, torch.Tensor]) -> torch.Tensor:
        parts: dict[str, dict[str, torch.Tensor]] = {"one": {}, "two": {}, "": {}}
        for name, gradient in wanted.items():
            first, _, rest = name.partition(".")
            parts[first if first in parts else ""][rest if first in parts else name] = gradient
        return loss(self, parts[""]) + self.one(parts["one"]) + self.two(parts["two"])


SHAPES = {name: parameter.shape for name, parameter in Network().named_parameters()}


# ---- digests ---------------------------------------------------------------------------------------------------------


def digest(tensor: torch.Tensor) -> str:
    octets = tensor.detach().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(octets.numpy().tobytes()).hexdigest()[:12]


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in tensors.items()}


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every gradient; shards of `fully_shard` are gathered."""
    grads = [parameter.grad for parameter in model.parameters()]
    return dict(zip(SHAPES, (g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads), strict=True))


@cache
def recorded() -> dict[str, dict[str, str]]:
    return json.loads(FILE.read_text())


def compare(engine: str, entry: str, found: Found) -> None:
    """Fail at the first step and parameter whose digest is not the recorded one."""
    wanted = recorded()[entry]
    assert list(found) == list(wanted), f"{engine}, {entry}: has {list(found)}, recorded are {list(wanted)}"
    for row, columns in found.items():
        for (name, value), other in zip(columns.items(), wanted[row].split(), strict=True):
            assert value == other, f"{engine}, {entry}: {row}, {name} has other bits than those of {FILE.name}"


# ---- runs of a network -----------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A run of STEPS steps, and so an entry."""

    codec: str  # of CODECS
    world_size: int
    dtype: torch.dtype = torch.float32
    warmup_steps: int = 0

    @property
    def entry(self) -> str:
        words = [self.codec, f"W = {self.world_size}"]
        words += [] if self.dtype == torch.float32 else [str(self.dtype).removeprefix("torch.")]
        words += [f"warmup_steps={self.warmup_steps}"] if self.warmup_steps else []
        return ", ".join(words)

    @property
    def options(self) -> dict[str, Any]:
        """What every engine is given."""
        return {"codec": CODECS[self.codec], "seed": SEED, "warmup_steps": self.warmup_steps}

    def network(self) -> Network:
        return Network().to(self.dtype)

    def run(
        self,
        rank: int,
        model: nn.Module,
        reduce: Callable[[], object] = lambda: None,
        gathered: Callable[[nn.Module], dict[str, torch.Tensor]] = whole,
    ) -> Found:
        """Digests of what a model holds after each backward pass, and after `reduce` where that is called by hand."""
        found = {}
        for step in range(STEPS):
            model.zero_grad()
            model(gradients(step, rank, self.dtype)).backward()
            reduce()
            found[f"step {step}"] = digests(gathered(model))
        return found


# Under FSDP sums do not travel back, so "int8" there is "int8 exact"; with W = 2 they are one everywhere.
CODECS: dict[str, Any] = {"terngrad": "terngrad", "int8": "int8", "int8 exact": Int8(returned="exact")}
CASES = [
    *(Case(codec, world_size) for world_size in (2, 3, 4) for codec in ("terngrad", "int8")),
    *(Case(codec, 3, dtype) for dtype in (torch.bfloat16, torch.float64) for codec in ("terngrad", "int8")),
    *(Case(codec, 2, warmup_steps=1) for codec in ("terngrad", "int8")),
    Case("int8 exact", 3),
    Case("terngrad", 4, warmup_steps=STEPS),  # nothing is coded
]


def cases(world_size: int) -> list[Case]:
    return [case for case in CASES if case.world_size == world_size]


def in_a_loop(case: Case, transport: Any = None, rank: int | None = None) -> Found:
    model = case.network()
    averager = terncomm.GradientAverager(model, transport=transport, bucket_cap_mb=BUCKET_CAP_MB, **case.options)
    return case.run(transport.rank if rank is None else rank, model, averager.reduce)


def loops(transport: Any) -> dict[str, Found]:
    """Every case of a transport's world."""
    return {case.entry: in_a_loop(case, transport) for case in cases(transport.world_size)}


def over_threads(case: Case) -> list[Found]:
    return LocalTransport.run(case.world_size, lambda transport: in_a_loop(case, transport))


def under_ddp(case: Case, node_size: int = 0, **options: Any) -> Found:
    """On ranks. node_size: codes travel between nodes of so many ranks, floats inside."""
    model = DistributedDataParallel(case.network(), bucket_cap_mb=BUCKET_CAP_MB)
    if node_size:
        nodes = [range(first, first + node_size) for first in range(0, case.world_size, node_size)]
        options["intra_group"] = [dist.new_group(list(node)) for node in nodes][dist.get_rank() // node_size]
    terncomm.register(model, **case.options, **options)
    return case.run(dist.get_rank(), model)


NODES = {f"{codec}, two nodes of two ranks": Case(codec, 4) for codec in ("terngrad", "int8")}


# ---- the path on buffers ---------------------------------------------------------------------------------------------


class Buffer(NamedTuple):
    """A layout. scales: by which each coded layer is multiplied, on every rank."""

    numel: int
    coded: Segments
    exact: Segments = Segments(())
    scales: tuple[float, ...] = (1.0,)


BUFFERS = {
    "large": Buffer(
        300_000,
        Segments([200_003, 1, 60_000, 1000], offsets=[0, 200_010, 220_001, 299_000], layers=[7, 2, 5, 0]),
        Segments([5000, 3], offsets=[200_050, 298_000]),
        (1.0, 2.0**-20, 2.0**9, 0.25),
    ),
    "three elements": Buffer(3, Segments([3])),
    "extremes": Buffer(
        2000,
        Segments([500, 700, 300], offsets=[100, 700, 1500], layers=[3, 4, 9], bases=[0, 123, 4096]),
        Segments([100, 100, 200], offsets=[0, 600, 1800]),
        (2.0**-130, 0.0, 2.0**100),
    ),
}
PATHS = (Ternary(), Ternary(clip=None), Int8(), Int8(block=None), Int8(block=100), Int8(returned="exact"))


@cache
def filled(name: str, rank: int) -> torch.Tensor:
    """A rank's own buffer."""
    buffer = BUFFERS[name]
    values = bell(buffer.numel, rank)
    for offset, size, scale in zip(buffer.coded.offsets.tolist(), buffer.coded.sizes, buffer.scales, strict=True):
        values[offset : offset + size] *= scale
    return torch.from_numpy(values).float()


def path(codec: Any, transport: LocalTransport, exchange: str = "auto") -> Found:
    """Each buffer's layers, those that travel exactly last, and what lies between them, which is left alone."""
    found = {}
    for step, (name, buffer) in enumerate(BUFFERS.items()):
        before, key = filled(name, transport.rank), Key(SEED, step, 0)
        flat = before.clone()
        all_reduce_mean(flat, buffer.coded, codec, transport, key=key, exchange=exchange, exact=buffer.exact)
        found[name], between = {}, torch.ones(buffer.numel, dtype=torch.bool)
        for what, segments in (("layer", buffer.coded), ("exact layer", buffer.exact)):
            for place, (offset, size) in enumerate(zip(segments.offsets.tolist(), segments.sizes, strict=True)):
                found[name][f"{what} {place}"] = digest(flat[offset : offset + size])
                between[offset : offset + size] = False
        assert torch.equal(flat[between], before[between]), "what lies between layers is left alone"
    return found


def paths(world_size: int, exchange: str = "auto") -> dict[str, list[Found]]:
    """Of each codec, by rank."""
    return {
        f"{codec!r}, W = {world_size}": LocalTransport.run(world_size, lambda t: path(codec, t, exchange))
        for codec in PATHS
    }


# ---- recording -------------------------------------------------------------------------------------------------------


def record() -> None:
    ranks = Ranks()
    made = {case.entry: over_threads(case) for case in CASES}
    made |= {entry: ranks.run(4, under_ddp, case, 2) for entry, case in NODES.items()}
    ranks.close()
    for world_size in (2, 3, 4, 5):
        made |= paths(world_size)
    lines = {}
    for entry, (found, *others) in made.items():
        assert all(other == found for other in others), f"ranks differ in {entry}"
        lines[entry] = {row: " ".join(columns.values()) for row, columns in found.items()}
    FILE.write_text(json.dumps(lines, indent=1) + "\n")
    print(f"{FILE}: {len(lines)} entries")


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(f"{__doc__}\nusage: python tests/golden.py --record")
    import golden  # ranks find functions by the module's name, which is not __main__

    golden.record()
