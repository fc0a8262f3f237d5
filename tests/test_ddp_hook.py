"""The hook under DistributedDataParallel, in processes joined by gloo. Functions up to the tests run on ranks."""

import contextlib
import copy
import json
import logging
import os
import random
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from itertools import combinations
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import wire_bytes
from torch import nn
from torch.distributed._composable import replicate
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm import CommState, Int8, Ternary, ops
from terncomm.codecs import codec_for
from terncomm.hooks import reducer
from terncomm.hooks.agreement import differences
from terncomm.keys import Key
from terncomm.reduce import all_reduce_mean
from terncomm.segments import Segments
from terncomm.transports import LocalTransport, Metered

SEED = 5
MANY, ONE = 0.005, 25.0  # bucket_cap_mb: about a layer per bucket, or one bucket
CODECS = ["terngrad", "int8"]


def mlp(dtype=torch.float32, hidden=4):
    torch.manual_seed(0)
    layers = [layer for _ in range(hidden) for layer in (nn.Linear(48, 48), nn.Tanh())]
    return nn.Sequential(nn.Linear(24, 48), nn.Tanh(), *layers, nn.Linear(48, 4)).to(dtype)


def batch(step, rank, dtype=torch.float32, size=32):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(size, 24, generator=generator)
    return inputs.to(dtype), torch.tanh(2 * inputs[:, :4]).to(dtype)


def backward(model, step, rank, dtype=torch.float32, *arguments):
    inputs, targets = batch(step, rank, dtype)
    loss = functional.mse_loss(model(inputs, *arguments), targets)
    loss.backward()
    return loss.item()


def gradients(network):
    return [None if p.grad is None else p.grad.clone() for p in network.parameters()]


def flat_parameters(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def pair(model, state):
    """Register state and hook, and record the numbers of the parameters in each bucket that the hook is given."""
    numbers = {p: number for number, p in enumerate(model.module.parameters())}
    buckets = []

    def hook(state, bucket):
        buckets.append([numbers[p] for p in bucket.parameters()])
        return terncomm.comm_hook(state, bucket)

    model.register_comm_hook(state, hook)
    return buckets


def reduced(codec, exchange, cap, dtype=torch.float32, micro_batches=1):
    """Two steps: this rank's own gradients, what the hook made of them, and the buckets; then the steps counted."""
    rank = dist.get_rank()
    network = mlp(dtype)
    alone = copy.deepcopy(network)
    model = DistributedDataParallel(network, bucket_cap_mb=cap)
    state = CommState(codec, exchange=exchange, seed=SEED, named_parameters=network.named_parameters())
    buckets = pair(model, state)
    told = []
    for step in range(2):
        buckets.clear()
        alone.zero_grad()
        model.zero_grad()
        for micro in range(micro_batches):
            backward(alone, 10 * micro + step, rank, dtype)
            with contextlib.nullcontext() if micro == micro_batches - 1 else model.no_sync():
                backward(model, 10 * micro + step, rank, dtype)
        told.append((gradients(alone), gradients(network), list(buckets)))
    return told, state.stats()["steps"]


def same_data():
    """The gradient of a layer of which all ranks have the same, by TernGrad without clipping."""
    model = DistributedDataParallel(mlp())
    terncomm.register(model, Ternary(clip=None))
    backward(model, 0, 0)
    return model.module[2].weight.grad


class Pause(torch.autograd.Function):
    """Backward takes a while, now and then, on each rank elsewhere."""

    @staticmethod
    def forward(ctx, value, chance):
        ctx.chance = chance
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        if ctx.chance.random() < 0.2:
            time.sleep(ctx.chance.uniform(0, 0.004))
        return gradient, None


def train(codec, exchange="auto", steps=100, **options):
    """Losses and the parameters at the end, with delays that differ by rank; and the number of buckets."""
    rank = dist.get_rank()
    network = mlp()
    chance = random.Random(rank)
    for module in network:
        module.register_forward_hook(lambda module, inputs, output: Pause.apply(output, chance))
    model = DistributedDataParallel(network, bucket_cap_mb=MANY, **options)
    if codec is not None:
        terncomm.register(model, codec, exchange=exchange, seed=SEED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append(backward(model, step, rank))
        optimizer.step()
    buckets = model._get_ddp_logging_data()["rebuilt_bucket_sizes"].count(",") + 1
    return losses, flat_parameters(network), buckets


def exact_beside_plain(how):
    """Steps of a hook that codes nothing and of plain DDP: are they bit-equal, and what was counted?"""
    rank = dist.get_rank()
    plain = DistributedDataParallel(mlp(), bucket_cap_mb=MANY)
    model = DistributedDataParallel(mlp(), bucket_cap_mb=MANY)
    names = model.module.named_parameters
    state = CommState("terngrad", warmup_steps=1000 if how == "warmup" else 0, named_parameters=names())
    if how == "disabled":
        state.disable()
    if how == "all exempt":
        state = CommState("terngrad", skip="*", named_parameters=names())
    buckets = pair(model, state)

    def step(number):
        equal = []
        for ddp in (plain, model):
            ddp.zero_grad()
            backward(ddp, number, rank)
            with torch.no_grad():
                for p in ddp.parameters():
                    p -= 0.1 * p.grad
        for one, other in zip(gradients(plain), gradients(model), strict=True):
            equal.append(torch.equal(one, other))
        return equal

    step(0)
    state.reset_stats()  # what registration and the first step sent is not asked for here
    buckets.clear()
    equal = [step(1), step(2), step(3)]
    told = equal, state.stats(), list(buckets), [p.numel() for p in plain.parameters()]
    state.enable()
    coded = []
    for number in (4, 5):
        if number == 5:
            state.disable()
        state.reset_stats()
        step(number)
        coded.append(state.stats()["coded_numel"])
    return *told, coded


def switched():
    """Elements coded in each of six steps: on, off, off, on, on, off."""
    model = DistributedDataParallel(mlp(), bucket_cap_mb=MANY)
    state = terncomm.register(model, "int8", warmup_steps=1)
    coded = []
    for step, switch in enumerate([None, None, state.disable, None, state.enable, None]):
        if switch:
            switch()
        state.reset_stats()
        backward(model, step, dist.get_rank())
        coded.append(state.stats()["coded_numel"])
    return coded


def random_states():
    """The global generators before and after registration and three steps."""

    def now():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002

    model = DistributedDataParallel(mlp())
    data = [batch(step, dist.get_rank()) for step in range(3)]
    told = []
    for codec in ("terngrad", "int8"):
        model = DistributedDataParallel(mlp(), bucket_cap_mb=MANY)
        before = now()
        terncomm.register(model, codec)
        for inputs, targets in data:
            functional.mse_loss(model(inputs), targets).backward()
        told.append(before == now())
    return told


def three_steps(model):
    """The gradients of each."""
    told = []
    for step in range(3):
        model.zero_grad()
        backward(model, step, dist.get_rank())
        told.append(gradients(model))
    return told


def plain_pair(named):
    """Three steps with the pair of state and hook as frameworks take it."""
    model = DistributedDataParallel(mlp(), bucket_cap_mb=MANY)
    options = {"named_parameters": model.module.named_parameters()} if named else {}
    state = terncomm.CommState(codec="int8", **options)
    model.register_comm_hook(state, terncomm.comm_hook)
    return three_steps(model), state.stats()


def registered(codec, **options):
    """`plain_pair` through `register`."""
    model = DistributedDataParallel(mlp(), bucket_cap_mb=MANY)
    state = terncomm.register(model, codec, **options)
    return three_steps(model), state.stats()


def counted(codec, exchange):
    """Statistics of three steps, of none after a reset, and the buckets of the three."""
    model = DistributedDataParallel(mlp(), bucket_cap_mb=MANY)
    state = CommState(codec, exchange=exchange, named_parameters=model.module.named_parameters())
    buckets = pair(model, state)
    backward(model, 0, dist.get_rank())
    first = state.stats()
    state.reset_stats()
    buckets.clear()
    for step in range(3):
        backward(model, step, dist.get_rank())
    stats = state.stats()
    state.reset_stats()
    return first, stats, state.stats(), buckets, [p.shape for p in model.parameters()]


class Language(nn.Module):
    """An embedding, a body, a vector with many elements, and a head as wide as the vocabulary."""

    def __init__(self, words=256):
        super().__init__()
        self.words = nn.Embedding(words, 16)
        self.body = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.LayerNorm(64))
        self.small = nn.Linear(64, 8)
        self.back = nn.Linear(8, 64)
        self.shift = nn.Parameter(torch.zeros(2048))
        self.head = nn.Linear(64, words)

    def forward(self, tokens):
        hidden = self.body(self.words(tokens)) + self.shift.view(32, 64).mean(0)
        return self.head(self.back(self.small(hidden)))


def words(step, vocabulary):
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randint(0, vocabulary, (64,), generator=generator)


def coded_parameters(options):
    """Names that the state says it codes, and names whose gradients are not bit-equal to plain DDP's."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Language())
    plain = DistributedDataParallel(copy.deepcopy(model.module))
    state = terncomm.register(model, Int8(block=64), **options)
    for ddp in (plain, model):
        functional.cross_entropy(ddp(words(0, 256)), words(1, 256)).backward()
    named = list(zip(model.module.named_parameters(), plain.parameters(), strict=True))
    said = {name for (name, p), _ in named if state.codes(p)}
    found = {name for (name, p), other in named if not torch.equal(p.grad, other.grad)}
    stats = state.stats()
    sizes = {name: p.numel() for (name, p), _ in named}
    return said, found, (stats["coded_numel"], stats["exact_numel"]), sizes


def clip_warnings(exempt):
    """Warnings of eight steps of a model with an embedding of which few words are used, and the share lost."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Language(words=1024), bucket_cap_mb=MANY)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = terncomm.register(model, "terngrad", exempt=exempt, skip=["head"])
        for step in range(8):
            model.zero_grad()
            model(words(step, 8)).logsumexp(1).mean().backward()
    stats = state.stats()
    told = [str(one.message) for one in caught if "clipping" in str(one.message)]
    return told, {k: v for k, v in stats.items() if k.startswith("clip_norm_lost/")}


@contextlib.contextmanager
def logged():
    """What terncomm logs in the block, at the level INFO."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("terncomm")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def told_of_coverage(way):
    """Warnings and log lines on this rank of ways to give terncomm a tagger: a model, or its parameters alone."""
    reducer._structure_warned = False  # ranks are kept for other tests
    model = Language(words=4096)
    with logged() as lines, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if way == "register":
            terncomm.register(DistributedDataParallel(model), "terngrad")
        elif way == "averager":
            terncomm.GradientAverager(model, "terngrad")
        elif way == "parameters":
            for _ in range(2):
                terncomm.GradientAverager(list(model.named_parameters()), "terngrad")
        else:
            wrapped = DistributedDataParallel(model)
            wrapped.register_comm_hook(CommState(), terncomm.comm_hook)
            wrapped(words(0, 8)).sum().backward()
    return [str(one.message) for one in caught], [line for line in lines if "coded" in line]


def attempt(function, *args):
    """(type, words, seconds) of what a call raises."""
    began = time.monotonic()
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return None, "", time.monotonic() - began


def register_twice():
    model = DistributedDataParallel(mlp())
    terncomm.register(model, "int8")
    again = attempt(terncomm.register, model, "terngrad")
    backward(model, 0, dist.get_rank())  # the first still works
    other = DistributedDataParallel(mlp())
    terncomm.register(other, "terngrad")
    return again


def register_unlike(field):
    """Rank 1 has another option than the others."""
    mine = {"codec": "terngrad", "seed": 1, "skip": (), "warmup_steps": 0, "min_numel": 1024}
    if dist.get_rank() == 1:
        mine[field] = {"codec": "int8", "seed": 2, "skip": "0", "warmup_steps": 7, "min_numel": 64}[field]
    return attempt(lambda: terncomm.register(DistributedDataParallel(mlp()), **mine))


def refused_on_one(engine):
    """Rank 1 names a codec that there is not; the others must not wait for it."""
    codec = "int4" if dist.get_rank() == 1 else "int8"
    if engine == "ddp":
        return attempt(lambda: terncomm.register(DistributedDataParallel(mlp()), codec))
    if engine == "fsdp1":
        return attempt(lambda: terncomm.register(FullyShardedDataParallel(mlp(), device_id=torch.device("cpu")), codec))
    if engine == "fsdp2":
        return attempt(lambda: terncomm.register(fully_shard(mlp()), codec))
    return attempt(lambda: terncomm.GradientAverager(mlp(), codec))


def broken_on_one():
    """On rank 1 the cache of compiled kernels is damaged."""
    model = DistributedDataParallel(mlp())
    if dist.get_rank() != 1:
        return attempt(lambda: terncomm.register(model, "int8"))
    with mock.patch.object(ops, "compile_kernels", side_effect=EOFError("Ran out of input")):
        return attempt(lambda: terncomm.register(model, "int8"))


def pairs_of_subgroups():
    """Ranks 0, 1 and ranks 2, 3 train models of their own with the plain pair; gradients are rank + 1 everywhere."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = groups[dist.get_rank() // 2]
    model = DistributedDataParallel(nn.Linear(64, 64, bias=False), process_group=mine)
    model.register_comm_hook(CommState("terngrad", process_group=mine), terncomm.comm_hook)
    (model(torch.full((1, 64), dist.get_rank() + 1.0))).sum().backward()
    return gradients(model)[0]


def copied():
    """A deep copy of a registered model, as averaging of weights makes one."""
    model = DistributedDataParallel(mlp())
    terncomm.register(model, "int8", seed=3)
    backward(model, 0, dist.get_rank())
    other = copy.deepcopy(model)
    backward(model, 1, dist.get_rank())
    state = copy.deepcopy(model._comm_hooks[0][1])
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    return same, state.seed, state.state_dict()


def warn_as_error():
    """Clipping advice under -W error: one rank must not stop alone."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Language(words=1024), bucket_cap_mb=MANY)
    log = logging.getLogger("terncomm")
    with warnings.catch_warnings(), mock.patch.object(log, "warning") as logged:
        warnings.simplefilter("error")
        terncomm.register(model, "terngrad", exempt=(), skip=["head"])
        for step in range(4):
            model.zero_grad()
            model(words(step, 8)).logsumexp(1).mean().backward()
    return logged.call_count, gradients(model)


def pair_unlike():
    """Rank 1 has another seed; the plain pair finds out in the first backward."""
    model = DistributedDataParallel(mlp())
    model.register_comm_hook(CommState("int8", seed=int(dist.get_rank() == 1)), terncomm.comm_hook)
    return attempt(backward, model, 0, dist.get_rank())


def disable_on_one():
    model = DistributedDataParallel(mlp(), bucket_cap_mb=MANY)
    state = terncomm.register(model, "terngrad")
    backward(model, 0, dist.get_rank())
    if dist.get_rank() == 0:
        state.disable()
    return attempt(backward, model, 1, dist.get_rank())


def boom(*args):
    raise ValueError("boom")


def failing_kernel():
    model = DistributedDataParallel(mlp(), bucket_cap_mb=MANY)
    terncomm.register(model, "int8")
    backward(model, 0, dist.get_rank())
    with mock.patch.object(ops, "encode_pack", boom):
        first = attempt(backward, model, 1, dist.get_rank())
    return first, attempt(backward, model, 2, dist.get_rank())


def absent_rank(limit_s):
    """Rank 1 does not take part in a step; the others' process group has a timeout."""
    group = dist.new_group(timeout=timedelta(seconds=limit_s))
    model = DistributedDataParallel(mlp(), process_group=group)
    terncomm.register(model, "int8")
    told = None
    if dist.get_rank() != 1:
        told = attempt(backward, model, 0, dist.get_rank())
    dist.barrier()
    return told


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(24, 48)
        self.branches = nn.ModuleList([nn.Linear(48, 48), nn.Linear(48, 48)])
        self.last = nn.Linear(48, 4)

    def forward(self, inputs, which):
        return self.last(torch.tanh(self.branches[which](torch.tanh(self.first(inputs)))))


def branching():
    """Four steps, in which ranks take: the first branch, each its own, the second, the first."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    network = Branches()
    alone = copy.deepcopy(network)
    model = DistributedDataParallel(network, find_unused_parameters=True, bucket_cap_mb=MANY)
    state = CommState("terngrad", seed=SEED, named_parameters=network.named_parameters())
    model.register_comm_hook(state, terncomm.comm_hook)
    told = []
    for step, which in enumerate([0, rank % 2, 1, 0]):
        for one in (alone, model):
            one.zero_grad()
            backward(one, step, rank, torch.float32, which)
        told.append((gradients(alone), gradients(network), []))
    return told


class Two(nn.Module):
    """Two layers, of which a forward pass uses one or both, and one that none uses: else DDP gives a warning."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.never = nn.Linear(1, 1, bias=False)

    def forward(self, inputs, which):
        return sum((inputs @ getattr(self, name).weight.T for name in which), inputs)


def skipped_buckets(which):
    """Steps with one and the same gradient, which use the layers `which[step]` and skip the buckets of the others."""
    torch.manual_seed(0)
    model = DistributedDataParallel(
        Two(), find_unused_parameters=True, skip_all_reduce_unused_params=True, bucket_cap_mb=MANY
    )
    state = terncomm.register(model, "terngrad", exempt=(), warmup_steps=1)
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(dist.get_rank()))
    steps, coded, seen = [], [], []
    for used in which:
        model.zero_grad(set_to_none=True)
        state.reset_stats()
        model(inputs, used).square().mean().backward()
        steps.append(state.step)
        coded.append(state.stats()["coded_numel"])
        seen.append({name: getattr(model.module, name).weight.grad.clone() for name in used})
    return steps, coded, seen


def sub_group():
    """Ranks 0 and 1 train; rank 2 only joins in making a group of all three."""
    rank = dist.get_rank()
    two = dist.new_group([0, 1])
    told, model = [], None
    if rank < 2:
        network = mlp()
        alone = copy.deepcopy(network)
        model = DistributedDataParallel(network, process_group=two, bucket_cap_mb=MANY)
        terncomm.register(model, "terngrad", seed=SEED, exempt=())
    for step in range(2):
        if model is not None:
            for one in (alone, model):
                one.zero_grad()
                backward(one, step, rank)
            told.append((gradients(alone), gradients(network), []))
        everyone = dist.new_group([0, 1, 2])
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total, group=everyone)
    return told, total.item()


def two_models():
    """Two models with hooks of their own, both reduced in one backward."""
    rank = dist.get_rank()
    networks = [mlp(), mlp(hidden=2)]
    alone = copy.deepcopy(networks)
    models = [DistributedDataParallel(network, bucket_cap_mb=MANY) for network in networks]
    terncomm.register(models[0], "terngrad", seed=SEED, exempt=())
    terncomm.register(models[1], Int8(returned="exact"), seed=SEED, exempt=())
    told = [[], []]
    for step in range(2):
        for both in (alone, models):
            for one in both:
                one.zero_grad()
            inputs, targets = batch(step, rank)
            sum(functional.mse_loss(one(inputs), targets) for one in both).backward()
        for number in range(2):
            told[number].append((gradients(alone[number]), gradients(networks[number]), []))
    return told


def log_lines():
    """What registration logs at the level INFO."""
    with logged() as lines:
        terncomm.register(DistributedDataParallel(mlp()), "int8", seed=3)
    return lines


# ---- what the hook should have done ----------------------------------------------------------------------------------


def expected(told, step, codec, exchange="auto", orders=None):
    """The gradients of a step from the ranks' own: {parameter number: mean}, by threads, a call for each of `orders`.

    By default there is one order, all parameters in theirs: scales are a layer's own, so buckets do not matter.
    """
    own = [rank[step][0] for rank in told]
    some = [next((g for g in grads if g is not None), None) for grads in zip(*own, strict=True)]
    used = [number for number, gradient in enumerate(some) if gradient is not None]
    own = [{n: torch.zeros_like(some[n]) if row[n] is None else row[n] for n in used} for row in own]
    mean = {}
    for order in orders or [used]:
        sizes = torch.tensor([own[0][number].numel() for number in order])
        offsets = sizes.cumsum(0) - sizes
        coded = torch.tensor([own[0][n].dim() > 1 and own[0][n].numel() >= 1024 for n in order])
        layers = torch.tensor(order)

        def part(which, sizes=sizes, offsets=offsets, layers=layers):
            return Segments(sizes[which].tolist(), offsets=offsets[which].tolist(), layers=layers[which].tolist())

        def work(transport, order=order, coded=coded, part=part):
            flat = torch.cat([own[transport.rank][number].flatten() for number in order])
            options = {"key": Key(SEED, step), "exchange": exchange, "exact": part(~coded)}
            return all_reduce_mean(flat, part(coded), codec_for(codec), transport, **options)

        rows = LocalTransport.run(len(told), work)
        for number, piece, is_coded in zip(order, rows[0].split(sizes.tolist()), coded.tolist(), strict=True):
            mean[number] = piece.view_as(own[0][number]) if is_coded else ordered_mean([row[number] for row in own])
    return mean


def ordered_mean(rows):
    """What travels exactly: added in rank order, at least in float32, then divided."""
    total = torch.zeros_like(rows[0], dtype=torch.promote_types(rows[0].dtype, torch.float32))
    for row in rows:
        total += row
    return (total / len(rows)).to(rows[0].dtype)


def check(told, codec, exchange="auto", orders=None):
    """Every rank's gradients of every step are the expected ones, bit for bit."""
    for step in range(len(told[0])):
        mean = expected(told, step, codec, exchange, orders(step) if orders else None)
        for rank in told:
            for number, gradient in enumerate(rank[step][1]):
                if gradient is None:
                    assert number not in mean
                else:
                    assert gradient.dtype == mean[number].dtype
                    assert torch.equal(gradient, mean[number]), (step, number)


def bucket_bytes(order, shapes, codec, exchange, world_size):
    """(exact bytes, all bytes) that a rank sends for a bucket."""
    sizes = [shapes[number].numel() for number in order]
    coded = [size for size, number in zip(sizes, order, strict=True) if len(shapes[number]) > 1 and size >= 1024]
    rest = sum(sizes) - sum(coded)
    groups = [(codec, codec.scaled(Segments(coded)).sizes)] if coded else []
    return wire_bytes.float_bytes(rest, 4, world_size), wire_bytes.bucket(groups, [(rest, 4)], world_size, exchange)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["terngrad", Ternary(clip=None), Int8(block=500), "int8"], ids=repr)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_gradient_is_that_of_the_path_and_does_not_change_with_buckets(on_ranks, world_size, codec):
    many = on_ranks(world_size, reduced, codec, "gather", MANY)
    one = on_ranks(world_size, reduced, codec, "two_phase", ONE)
    for told in (many, one):
        check([steps for steps, _ in told], codec)
        assert [counted for _, counted in told] == [2] * world_size
    assert len(many[0][0][1][2]) >= 5
    assert len(one[0][0][1][2]) == 1


@pytest.mark.parametrize("exchange", ["gather", "two_phase"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_gradient_of_int8_is_that_of_the_path_in_the_same_buckets(on_ranks, world_size, exchange):
    # Sums that return in 8 bits are rounded by block and row of the bucket, so buckets matter from three ranks on.
    told = [steps for steps, _ in on_ranks(world_size, reduced, "int8", exchange, MANY)]
    check(told, "int8", orders=lambda step: told[0][step][2])
    if world_size == 2:
        check(told, "int8")
    for step in range(2):
        mean = torch.cat([torch.stack(row).mean(0).flatten() for row in zip(*(r[step][0] for r in told), strict=True)])
        ours = torch.cat([gradient.flatten() for gradient in told[0][step][1]])
        assert (ours - mean).norm() < 0.03 * mean.norm()


def test_ranks_round_independently(on_ranks):
    # Ranks with equal gradients and equal noise would agree in every code, and leave the three levels of one of them.
    levels = on_ranks(2, same_data)[0].unique()
    assert len(levels) == 5
    assert torch.allclose(levels, levels[-1] * torch.tensor([-1, -0.5, 0, 0.5, 1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_other_types_are_reduced_in_their_own(on_ranks, codec, dtype):
    told = [steps for steps, _ in on_ranks(2, reduced, codec, "auto", MANY, dtype)]
    assert all(gradient.dtype == dtype for gradient in told[0][0][1])
    check(told, codec)


def test_no_sync_accumulates_and_reduces_once(on_ranks):
    told = on_ranks(3, reduced, "terngrad", "auto", MANY, torch.float32, 3)
    assert [steps for _, steps in told] == [2, 2, 2]
    check([steps for steps, _ in told], "terngrad")


def test_parameters_that_some_or_all_ranks_do_not_use(on_ranks):
    told = on_ranks(2, branching)
    check(told, "terngrad")
    unused = [[g is None for g in step[1]] for step in told[0]]
    assert unused[0][4:6] == [True, True]
    assert not any(unused[1])
    assert unused[2][2:4] == [True, True]


BOTH, FIRST, SECOND = ("first", "second"), ("first",), ("second",)


@pytest.mark.parametrize(
    "which",
    [[FIRST] * 5, [SECOND] * 5, [BOTH, FIRST, BOTH, SECOND, BOTH, FIRST, FIRST], [SECOND, SECOND, FIRST, BOTH]],
    ids=["the first alone", "the second alone", "both or one", "the second, then both"],
)
def test_a_step_begins_with_whichever_bucket_comes_first(on_ranks, which):
    """Warm-up ends after one step, and every step rounds anew, also where DDP skips the buckets of unused layers."""
    for steps, coded, seen in on_ranks(2, skipped_buckets, which):
        assert steps == list(range(len(which)))
        assert coded == [64 * 64 * len(used) * (step > 0) for step, used in enumerate(which)]
        for name in ("first", "second"):
            found = [grads[name] for step, grads in enumerate(seen) if step and name in grads]
            same = [torch.equal(one, other) for one, other in combinations(found, 2)]
            assert not any(same), "the same rounding in two steps"


def test_sub_group_and_a_later_group_of_all(on_ranks):
    told = on_ranks(3, sub_group)
    assert [total for _, total in told] == [6.0, 6.0, 6.0]
    check([steps for steps, _ in told[:2]], "terngrad")


def test_two_models_in_one_process(on_ranks):
    told = on_ranks(2, two_models)
    check([models[0] for models in told], "terngrad")
    check([models[1] for models in told], Int8(returned="exact"))


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_hook(ranks):
    losses = {}

    def last(world_size):
        if world_size not in losses:
            losses[world_size] = np.mean([told[0][-10:] for told in ranks.run(world_size, train, None)])
        return losses[world_size]

    return last


@pytest.mark.parametrize(
    ("world_size", "codec", "exchange"),
    [
        (2, "terngrad", "two_phase"),
        (2, "int8", "gather"),
        (3, "int8", "two_phase"),
        (4, "terngrad", "gather"),
    ],
)
def test_training_keeps_ranks_equal_and_learns(on_ranks, without_hook, world_size, codec, exchange):
    told = on_ranks(world_size, train, codec, exchange)
    for losses, parameters, buckets in told:
        assert len(losses) == 100
        assert buckets >= 5
        assert torch.equal(parameters, told[0][1])
    assert torch.isfinite(told[0][1]).all()
    last = np.mean([losses[-10:] for losses, _, _ in told])
    first = np.mean([losses[0] for losses, _, _ in told])
    assert last < 0.5 * first
    assert last < without_hook(world_size) * (1.5 if codec == "terngrad" else 1.1)


def test_gradient_as_bucket_view_changes_nothing(on_ranks):
    (_, copied, _), _ = on_ranks(2, train, "terngrad", "auto", 5)
    for _, parameters, _ in on_ranks(2, train_as_view):
        assert torch.equal(parameters, copied)


def train_as_view():
    return train("terngrad", "auto", 5, gradient_as_bucket_view=True)


def test_two_runs_are_equal(on_ranks):
    (_, one, _), *_ = on_ranks(3, train, "int8", "auto", 5)
    (_, other, _), *_ = on_ranks(3, train, "int8", "auto", 5)
    assert torch.equal(one, other)


# ---- what travels exactly --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["warmup", "disabled", "all exempt"])
def test_exact_steps_are_bit_equal_to_plain_ddp(on_ranks, how):
    for equal, stats, buckets, sizes, coded in on_ranks(2, exact_beside_plain, how):
        assert len(equal) == 3
        assert all(map(all, equal))
        numels = [sum(sizes[number] for number in bucket) for bucket in buckets]
        assert len(buckets) >= 12
        assert stats["exact_bytes"] == sum(wire_bytes.float_bytes(numel, 4, 2) for numel in numels)
        assert stats["wire_bytes"] == sum(wire_bytes.bucket([], [(numel, 4)], 2) for numel in numels)
        assert (stats["coded_numel"], stats["exact_numel"]) == (0, 3 * sum(sizes))
        assert coded == [4 * 48 * 48 + 24 * 48 if how == "disabled" else 0, 0]


def test_switching_off_and_on_and_warmup(on_ranks):
    all_coded = 4 * 48 * 48 + 24 * 48
    for coded in on_ranks(2, switched):
        assert coded == [0, all_coded, 0, 0, all_coded, all_coded]


BODY = {"body.0.weight", "body.2.weight"}
EXEMPT = {"words.weight", "head.weight"}


@pytest.mark.parametrize(
    ("options", "coded"),
    [
        ({}, BODY),
        ({"exempt": ()}, BODY | EXEMPT),
        ({"exempt": "embedding"}, BODY | {"head.weight"}),
        ({"exempt": ("head",)}, BODY | {"words.weight"}),
        ({"skip": "body.0.weight"}, {"body.2.weight"}),
        ({"skip": ["body.2"]}, {"body.0.weight"}),
        ({"skip": ["body"], "exempt": ()}, EXEMPT),
        ({"skip": ["*.0.*", "[hw]*.weight"], "exempt": ()}, {"body.2.weight"}),
        ({"min_numel": 1025}, {"body.2.weight"}),
        ({"min_numel": 0}, {*BODY, "small.weight", "back.weight"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_which_parameters_are_coded(on_ranks, options, coded):
    for said, found, (coded_numel, exact_numel), sizes in on_ranks(2, coded_parameters, options):
        assert said == coded
        assert found == coded
        assert coded_numel == sum(sizes[name] for name in coded)
        assert coded_numel + exact_numel == sum(sizes.values())


def test_clipping_is_warned_of_once(on_ranks):
    told = on_ranks(2, clip_warnings, ())
    assert [len(messages) for messages, _ in told] == [1, 0], "once, on rank 0"
    assert "words.weight" in told[0][0][0]
    assert "clipping takes much of the gradient norm of some layers" in told[0][0][0]
    for _, lost in told:
        assert 0.3 < lost["clip_norm_lost/words.weight"] < 1
        assert 0 <= lost["clip_norm_lost/body.2.weight"] < 0.3
    for messages, lost in on_ranks(2, clip_warnings, ("embedding",)):
        assert messages == []
        assert set(lost) == {"clip_norm_lost/body.0.weight", "clip_norm_lost/body.2.weight"}


@pytest.mark.parametrize("way", ["register", "averager"])
def test_a_model_that_is_hardly_compressed_is_told(on_ranks, way):
    (warned, logged), (quiet, silent) = on_ranks(2, told_of_coverage, way)
    assert len(warned) == 1
    assert "words.weight (embedding" in warned[0]
    assert "exempt: head.weight (head, 77.0%), words.weight (embedding" in logged[0]
    assert quiet == silent == []


@pytest.mark.parametrize("way", ["parameters", "plain"])
def test_parameters_without_their_module_are_told_once(on_ranks, way):
    (warned, _), (quiet, _) = on_ranks(2, told_of_coverage, way)
    assert len(warned) == 1
    assert "parameters without their module" in warned[0]
    assert quiet == []


# ---- registration, statistics, side effects --------------------------------------------------------------------------


def test_random_states_are_untouched(on_ranks):
    assert on_ranks(2, random_states) == [[True, True]] * 2


@pytest.mark.parametrize("named", [True, False])
def test_plain_pair(on_ranks, named):
    told = on_ranks(2, plain_pair, named)
    same = on_ranks(2, registered, "int8")
    assert told[0][1]["coded_numel"] == 3 * (4 * 48 * 48 + 24 * 48)
    assert told[0][1]["steps"] == 3
    for step in range(3):
        for one, other in zip(told[0][0][step], told[1][0][step], strict=True):
            assert torch.equal(one, other)
        if named:  # numbered as `register` numbers them; the head is too small to be coded
            for one, other in zip(told[0][0][step], same[0][0][step], strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("codec", [Ternary(), Int8(), Int8(block=16)], ids=repr)
@pytest.mark.parametrize(("world_size", "exchange"), [(2, "auto"), (2, "two_phase"), (3, "gather"), (3, "two_phase")])
def test_statistics_are_exact_and_plain(on_ranks, world_size, codec, exchange):
    for first, stats, after, buckets, shapes in on_ranks(world_size, counted, codec, exchange):
        numel = sum(shape.numel() for shape in shapes)
        exact, total = zip(*(bucket_bytes(b, shapes, codec, exchange, world_size) for b in buckets), strict=True)
        assert len(buckets) >= 15
        assert stats["steps"] == 3
        assert stats["raw_bytes"] == 3 * 4 * numel
        ring = 3 * 4 * numel * 2 * (world_size - 1) / world_size
        assert ring - len(buckets) <= stats["ring_bytes"] <= ring, "rounded down in each bucket"
        assert stats["exact_bytes"] == sum(exact)
        assert stats["wire_bytes"] == sum(total)
        assert stats["coded_numel"] == 3 * (4 * 48 * 48 + 24 * 48)
        assert stats["coded_numel"] + stats["exact_numel"] == 3 * numel
        assert min(stats["encode_s"], stats["exchange_s"], stats["decode_s"]) > 0
        assert (first["steps"], first["raw_bytes"]) == (1, 4 * numel)
        assert {k: v for k, v in after.items() if not k.startswith("clip")} == dict.fromkeys(
            ("steps", "raw_bytes", "ring_bytes", "exact_bytes", "coded_numel", "exact_numel", "wire_bytes"), 0
        ) | dict.fromkeys(("encode_s", "exchange_s", "decode_s"), 0.0)
        assert json.loads(json.dumps(stats)) == stats
        assert {type(value) for value in stats.values()} <= {int, float}


def test_registration_logs_one_line_on_rank_0(on_ranks):
    lines, others = on_ranks(2, log_lines)
    lines = [line for line in lines if not line.startswith("CPU kernels")]
    assert len(lines) == 1
    assert "Int8(block=2048, returned='int8'): 5 of 12 parameter tensors coded" in lines[0]
    assert "seed 3, 2 ranks" in lines[0]
    assert others == []


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_second_registration(on_ranks):
    for kind, text, _ in on_ranks(2, register_twice):
        assert kind == "RuntimeError"
        assert "already has a communication hook, comm_hook" in text
        assert "state.disable()" in text


def test_not_a_ddp_model():
    with pytest.raises(TypeError, match=r"wanted a DistributedDataParallel model, got Linear; wrap it first"):
        terncomm.register(nn.Linear(2, 2), "int8")


def holders():
    """What register says of a model that holds models of DDP, of replicate(), and of another library's class."""
    pair = nn.ModuleDict({name: DistributedDataParallel(nn.Linear(4, 4)) for name in ("generator", "critic")})
    torch.manual_seed(dist.get_rank())
    wide = replicate(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    other = type("DistributedDataParallel", (nn.Linear,), {"__module__": "apex.parallel"})(2, 2)
    told = [attempt(lambda model=model: terncomm.register(model, "terngrad"))[1] for model in (pair, wide, other)]
    state = CommState(named_parameters=wide.named_parameters())
    wide.register_comm_hook(state, terncomm.comm_hook)
    wide(torch.randn(8, 64)).square().mean().backward()
    return told, gradients(wide), state.stats()["coded_numel"]


def test_models_that_ddp_models_are_in_or_that_are_like_them(on_ranks):
    (told, here, coded), (_, there, _) = on_ranks(2, holders)
    assert "it holds such models: register each of them, terncomm.register(model.generator, ...), terncomm." in told[0]
    assert "got DDPSequential; it reduces its gradients already" in told[1]
    assert "terncomm.CommState(named_parameters=model.named_parameters()), terncomm.comm_hook)" in told[1]
    assert "got apex.parallel.DistributedDataParallel; wrap it first" in told[2]
    assert coded == 2 * 64 * 64, "the plain pair works under replicate()"
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


@pytest.mark.parametrize(
    ("field", "here", "there"),
    [
        ("codec", "Ternary(clip=2.5) on rank 0, 2", "Int8(block=2048, returned='int8') on rank 1"),
        ("seed", "1 on rank 0, 2", "2 on rank 1"),
        ("skip", "[] on rank 0, 2", "['0'] on rank 1"),
        ("warmup_steps", "0 on rank 0, 2", "7 on rank 1"),
        ("min_numel", "1024 on rank 0, 2", "64 on rank 1"),
    ],
)
def test_ranks_configured_differently(on_ranks, field, here, there):
    for kind, text, seconds in on_ranks(3, register_unlike, field):
        assert kind == "ConfigurationsDiffer"
        assert f"{field}: {here}; {there}" in text
        assert seconds < 10


EQUAL = [
    ({"codec": Ternary(clip=2)}, {"codec": Ternary(clip=2.0)}),
    ({"codec": Ternary(clip=2.5)}, {"codec": Ternary(clip=np.float64(2.5))}),
    ({"codec": Ternary(clip=2.5)}, {"codec": Ternary(clip=np.float32(2.5))}),
    ({"codec": Int8(block=512)}, {"codec": Int8(block=np.int64(512))}),
    ({"codec": "terngrad"}, {"codec": {"default": Ternary()}}),
    ({"seed": 7, "warmup_steps": 3, "min_numel": 9}, {name: np.int32(n) for name, n in zip(
        ("seed", "warmup_steps", "min_numel"), (7, 3, 9), strict=True)}),
    ({"exempt": ("head", "embedding")}, {"exempt": ["embedding", "head", "head"]}),
]  # fmt: skip


@pytest.mark.parametrize(("here", "there"), EQUAL, ids=str)
def test_equal_options_are_equal_in_words(here, there):
    one, other = CommState(**here), CommState(**there)
    assert json.dumps(one.configuration()) == json.dumps(other.configuration())
    assert repr(one.codec) == repr(other.codec)


def test_of_long_options_only_what_differs_is_told():
    names = [f"encoder.layers.{number}.self_attn.in_proj_weight" for number in range(300)]
    without = [name for name in names if name not in names[17:19]]
    (line,) = differences([{"coded": names}, {"coded": without}, {"coded": names}])
    assert line == (
        "coded: encoder.layers.17.self_attn.in_proj_weight, encoder.layers.18.self_attn.in_proj_weight beside 298 in "
        "common on rank 0, 2; nothing beside 298 in common on rank 1"
    )
    (line,) = differences([{"coded": names}, {"coded": names[:3]}])
    first = ", ".join(names[3:8])
    assert line == f"coded: {first} and 292 more beside 3 in common on rank 0; nothing beside 3 in common on rank 1"
    (line,) = differences([{"coded": names}, {"coded": [*names[:2], *reversed(names[2:])]}])
    assert line == f"coded: {names[2]} at place 2 on rank 0; {names[299]} at place 2 on rank 1"
    (line,) = differences([{"codec": "x" * 1000 + "a" + "y" * 1000}, {"codec": "x" * 1000 + "b" + "y" * 1000}])
    assert "xay" in line
    assert "xby" in line
    assert len(line) < 500
    assert differences([{"coded": names}] * 2) == []


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2", "loop"])
def test_options_refused_on_one_rank(on_ranks, engine):
    told = on_ranks(3, refused_on_one, engine)
    assert told[1][0] == "ValueError"
    assert told[1][1].startswith(
        "unknown codec 'int4'; known: bf16, fp16, int8, terngrad, or a codec such as Ternary()"
    )
    for kind, text, seconds in (told[0], told[2]):
        assert kind == "ConfigurationsDiffer"
        assert "rank 1 refused its options: unknown codec 'int4'" in text
        assert seconds < 10


def test_any_error_on_one_rank_is_told(on_ranks):
    told = on_ranks(3, broken_on_one)
    assert told[1][:2] == ("EOFError", "Ran out of input")
    for kind, text, seconds in (told[0], told[2]):
        assert kind == "ConfigurationsDiffer"
        assert "rank 1 refused its options: EOFError: Ran out of input" in text
        assert seconds < 10


def test_plain_pairs_of_subgroups(on_ranks):
    for rank, gradient in enumerate(on_ranks(4, pairs_of_subgroups)):
        assert gradient.mean().item() == pytest.approx([1.5, 3.5][rank // 2], rel=0.03)


def test_a_registered_model_can_be_copied(on_ranks):
    for same, seed, saved in on_ranks(2, copied):
        assert same
        assert seed == 3
        assert saved == {"step": 1, "seed": 3, "enabled": True}


def test_advice_that_is_made_an_error_stops_no_rank(on_ranks):
    told = on_ranks(2, warn_as_error)
    assert [logged for logged, _ in told] == [1, 0]
    assert all(torch.equal(a, b) for a, b in zip(told[0][1], told[1][1], strict=True))


def test_plain_pairs_configured_differently(on_ranks):
    for kind, text, seconds in on_ranks(3, pair_unlike):
        assert kind == "ConfigurationsDiffer"
        assert "seed: 0 on rank 0, 2; 1 on rank 1" in text
        assert seconds < 10


def test_disabled_on_one_rank_only(on_ranks):
    for rank, (kind, text, seconds) in enumerate(on_ranks(3, disable_on_one)):
        assert kind == "RuntimeError"  # DDP makes it one
        assert f"RanksDiffer: ranks are not in step. Rank {rank} (here) and rank {int(rank == 0)} (there)" in text
        assert "call enable() and disable() at the same step" in text
        assert seconds < 10


def test_an_error_inside_the_path_reaches_backward_in_its_own_words(on_ranks):
    for (_, first, seconds), (_, later, _) in on_ranks(2, failing_kernel):
        assert "ValueError: boom" in first
        assert "an earlier gradient reduction failed: boom" in later
        assert seconds < 10


def test_an_absent_rank_is_waited_for_as_long_as_the_group_says(on_ranks):
    told, absent = on_ranks(2, absent_rank, 3.0)
    assert absent is None
    kind, _, seconds = told
    assert kind == "RuntimeError"
    assert 2 < seconds < 12


NAMES = [("a.weight", nn.Parameter(torch.zeros(2, 2))), ("b.weight", nn.Parameter(torch.zeros(2, 2)))]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"codec": "ternary"}, ValueError, "unknown codec 'ternary'; known: bf16, fp16, int8, terngrad"),
        ({"codec": 8}, TypeError, "a name or a terncomm codec"),
        ({"exchange": "ring"}, ValueError, "exchange must be one of auto, gather, two_phase"),
        ({"min_numel": -1}, ValueError, "min_numel must not be negative"),
        ({"warmup_steps": 2.5}, TypeError, "warmup_steps must be an int"),
        ({"warmup_steps": True}, TypeError, "warmup_steps must be an int"),
        ({"exempt": "heads"}, ValueError, "exempt may name embedding, head; got heads"),
        ({"seed": "7"}, TypeError, "seed must be an int"),
        ({"skip": "a"}, ValueError, "skip= needs names"),
        ({"skip": ["a", "c"], "named_parameters": NAMES}, ValueError, "skip='c' matches no parameter.*a.weight, b.w"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options, error, words):
    with pytest.raises(error, match=words):
        CommState(**options)


def test_saved_state_of_another_seed_or_none():
    state = CommState(seed=3)
    assert json.loads(json.dumps(state.state_dict())) == {"step": -1, "seed": 3, "enabled": True}
    with pytest.raises(ValueError, match="the checkpoint has seed 4, this state 3"):
        state.load_state_dict({"step": 9, "seed": 4})
    with pytest.raises(ValueError, match="lacks seed"):
        state.load_state_dict({"step": 9})
    state.load_state_dict({"step": 9, "seed": 3})
    assert state.state_dict()["step"] == 9


def test_a_state_says_what_it_is():
    state = CommState("int8")
    assert repr(state) == "<CommState: Int8(block=2048, returned='int8'), step -1, not connected>"
    state.connect(Metered(LocalTransport.world(3)[1]))
    state.begin_step()
    state.disable()
    assert repr(state) == "<CommState: Int8(block=2048, returned='int8'), step 0, rank 1 of 3, disabled>"


def test_what_is_switched_off_is_off_after_a_resume():
    state, resumed = CommState(), CommState()
    state.disable()
    resumed.load_state_dict(state.state_dict())
    assert not resumed.compresses_at(99)
    resumed.load_state_dict({"step": 9, "seed": 0})  # of a checkpoint that does not say
    assert not resumed.compresses_at(99)
    state.enable()
    resumed.load_state_dict(state.state_dict())
    assert resumed.compresses_at(99)


# ---- ends ------------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import terncomm

end, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)

class Network(torch.nn.Sequential):
    def forward(self, inputs):
        if end == "raise" and step == 3:
            raise KeyError("from forward")
        return super().forward(inputs)

network = Network(*[torch.nn.Linear(64, 64) for _ in range(4)])
model = DistributedDataParallel(network, bucket_cap_mb=0.01)
state = terncomm.register(model, "terngrad")
for step in range(5):
    model(torch.randn(4, 64)).square().mean().backward()
print("trained", state.stats()["steps"], flush=True)
if end == "destroy":
    dist.destroy_process_group()
"""


@pytest.mark.parametrize(("end", "status"), [("nothing", 0), ("destroy", 0), ("raise", 1)])
def test_programs_end(tmp_path, end, status):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    jobs = [
        subprocess.Popen(
            [sys.executable, str(script), end, str(tmp_path / "store"), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [job.communicate(timeout=60) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [status, status], told
    for out, err in told:
        assert "terminate called" not in err
        assert out == ("" if end == "raise" else "trained 5\n")
        assert ("KeyError: 'from forward'" in err) == (end == "raise")
