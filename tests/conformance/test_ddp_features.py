"""Features of DistributedDataParallel under the hook: the gradients that it leaves are those of the path, everywhere.

Functions up to the tests run on ranks, in processes joined by gloo.
"""

import warnings

import oracle
import pytest
import torch
import torch.distributed as dist
from oracle import CODECS, MANY, ONE, Twins, batch, check, loss_of, made, same
from ranks import Ranks
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from terncomm import Ternary

pytestmark = pytest.mark.conformance


def forward_backward(step):
    """A pass over this rank's batch, as a function of the model."""
    inputs = batch(step)
    return lambda model: loss_of(model(inputs)).backward()


# ---- buckets ---------------------------------------------------------------------------------------------------------


def trained(codec, cap, steps, options, exchange="auto"):
    """SGD with delays that differ by rank; what was told, and the buckets of the first and of the later steps."""
    twins = Twins(made(), codec, {"bucket_cap_mb": cap, **options}, exchange=exchange)
    oracle.delay(twins.network)
    for step in range(steps):
        twins.step(forward_backward(step), rate=0.5)
    logged = twins.model._get_ddp_logging_data()
    parameters = [p.detach().clone() for p in twins.network.parameters()]
    return twins.told, parameters, (logged["bucket_sizes"], logged["rebuilt_bucket_sizes"])


class Products(nn.Module):
    """Two large weights and a small one, whose gradients are the inputs themselves."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.zeros(1200, 700), torch.zeros(40, 40), torch.zeros(700, 900)])

    def forward(self, step):
        rows = torch.Generator().manual_seed(10 * step + dist.get_rank())
        return sum((w * torch.randn(w.shape, generator=rows)).sum() for w in self.weights)


def in_threads(codec, threads):
    torch.set_num_threads(threads)
    try:
        twins = Twins(made(Products), codec, {"bucket_cap_mb": 3})
        for step in range(2):
            twins.step(lambda model: model(step).backward())
        return twins.told
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("world_size", "codec", "cap", "exchange"), [(2, "terngrad", MANY, "gather"), (3, "int8", 0.02, "two_phase")]
)
def test_long_runs_with_delays_are_those_of_the_path(on_ranks, world_size, codec, cap, exchange):
    told = on_ranks(world_size, trained, codec, cap, 60, {}, exchange)
    check([steps for steps, *_ in told], codec)
    for _, parameters, (first, rebuilt) in told:
        assert same(parameters, told[0][1])
        assert first.count(",") + 1 < rebuilt.count(",") + 1 <= 9, "buckets were not rebuilt"


@pytest.mark.parametrize("codec", CODECS)
def test_buckets_change_no_bit(on_ranks, codec):
    counts = set()
    runs = []
    for cap, exchange in ((MANY, "two_phase"), (0.009, "gather"), (0.02, "auto"), (ONE, "two_phase")):
        (one, parameters, buckets), (other, *_), *_ = on_ranks(3, trained, codec, cap, 4, {}, exchange)
        assert all(same(a[1], b[1]) for a, b in zip(one, other, strict=True))
        counts.add(buckets[1].count(",") + 1)
        runs.append(parameters)
    assert len(counts) == 4, counts
    assert min(counts) == 1
    assert max(counts) >= 8
    for parameters in runs[1:]:
        assert same(parameters, runs[0])


@pytest.mark.parametrize("codec", CODECS)
def test_threads_change_no_bit(on_ranks, codec):
    runs = [on_ranks(2, in_threads, codec, threads) for threads in (1, 2)]
    check(runs[0], codec)
    for one, other in zip(*runs, strict=True):
        assert all(same(a[1], b[1]) for a, b in zip(one, other, strict=True))


# ---- options of DDP --------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two branches, of which a call takes one, and a layer that no call takes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(24, 48)
        self.unused = nn.Linear(48, 48)
        self.branches = nn.ModuleList([nn.Linear(48, 48), nn.Linear(48, 48)])
        self.last = nn.Linear(48, 32)

    def forward(self, inputs, which):
        return self.last(torch.tanh(self.branches[which](torch.tanh(self.first(inputs)))))


def branching(codec, options):
    """Branches taken: one by all, the other by all, each rank its own, the other way round, one by all."""
    rank = dist.get_rank()
    twins = Twins(made(Branches), codec, {"find_unused_parameters": True, **options})
    for step, which in enumerate([0, 1, rank % 2, 1 - rank % 2, 0]):
        inputs = batch(step)
        twins.step(lambda model: loss_of(model(inputs, which)).backward(), rate=0.5)
    return twins.told


def accumulating(codec, options):
    """Steps of three passes each, of which the last is reduced."""
    twins = Twins(made(), codec, options)
    for step in range(4):
        twins.alone.zero_grad()
        twins.model.zero_grad()
        for micro in range(3):
            run = forward_backward(100 * micro + step)
            run(twins.alone)
            if micro < 2:
                with twins.model.no_sync():
                    run(twins.model)
            else:
                run(twins.model)
        twins.note(rate=0.5)
    return twins.told, twins.state.stats()["steps"]


def uneven(codec, batches):
    """Rank r has so many batches. What ranks tell of as long as they have some, and their parameters at the end."""
    twins = Twins(made(), codec)
    with Join([twins.model]):
        for step in range(batches[dist.get_rank()]):
            twins.step(forward_backward(step), rate=0.5)
    parameters = [p.detach().clone() for p in twins.network.parameters()]
    for step in (100, 101):  # then together again
        twins.alone.load_state_dict(twins.network.state_dict())
        twins.step(forward_backward(step))
    return twins.told, parameters, twins.state.stats()["steps"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"static_graph": True, "gradient_as_bucket_view": True},
    ],
    ids=lambda options: "+".join(options),
)
def test_options_change_nothing(on_ranks, options, codec):
    told = on_ranks(3, trained, codec, MANY, 4, options)
    check([steps for steps, *_ in told], codec)
    assert all(same(parameters, told[0][1]) for _, parameters, _ in told)


@pytest.mark.parametrize(
    ("codec", "options"), [("terngrad", {}), ("int8", {}), ("int8", {"gradient_as_bucket_view": True})], ids=str
)
def test_branches_that_differ_by_rank_and_step(on_ranks, codec, options):
    told = on_ranks(3, branching, codec, options)
    for number in range(5):
        unused = [[n for n, g in enumerate(rank[number][1]) if g is None] for rank in told]
        assert unused == [{0: [2, 3, 6, 7], 1: [2, 3, 4, 5], 4: [2, 3, 6, 7]}.get(number, [2, 3])] * 3
    check(told, codec)


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}], ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_accumulated_gradients_are_reduced_once(on_ranks, codec, options):
    told = on_ranks(2, accumulating, codec, options)
    assert [steps for _, steps in told] == [4, 4]
    check([steps for steps, _ in told], codec)


@pytest.mark.parametrize("codec", CODECS)
def test_join_of_uneven_inputs(on_ranks, codec):
    batches = [5, 3, 4]
    told = on_ranks(3, uneven, codec, batches)
    assert all(same(parameters, told[0][1]) for _, parameters, _ in told)
    steps = [steps[:-2] for steps, *_ in told]
    nothing = [None] * len(steps[0][0][0])
    for number in range(5):  # a rank that has no batch left counts as one with a gradient of zero
        own = [rank[number][0] if number < len(rank) else nothing for rank in steps]
        mean = oracle.mean_of(own, codec, number)
        for rank in steps:
            if number < len(rank):
                assert same(rank[number][1], [mean[n] for n in range(len(nothing))])
    assert [counted for *_, counted in told] == [7, 7, 7]
    check([rank[-2:] for rank, *_ in told], codec, steps=[5, 6])


# ---- types -----------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A layer of each type, of more than 1024 elements, and a small one of each."""

    def __init__(self, *types):
        super().__init__()
        self.types = types
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(40, 40, dtype=t), nn.Linear(40, 8, dtype=t)) for t in types]
        )

    def forward(self, inputs):
        return torch.cat([layer(inputs.to(t)).float() for t, layer in zip(self.types, self.layers, strict=True)])


class Complex(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.first = nn.Linear(24, 40)
        self.turn = nn.Parameter(torch.randn(40, 40, dtype=dtype) / 6)
        self.shift = nn.Parameter(torch.zeros(40, dtype=dtype))
        self.last = nn.Linear(40, 30)

    def forward(self, inputs):
        hidden = torch.tanh(self.first(inputs)).to(self.turn.dtype) @ self.turn + self.shift
        return self.last(hidden.abs().float())


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def mixed(codec):
    twins = Twins(made(Mixed, *FLOATS), codec)
    for step in range(4):
        inputs = batch(step, width=40)
        twins.step(lambda model: loss_of(model(inputs)).backward(), rate=0.25)
    return twins.told


def complex_parameters(codec, dtype):
    twins = Twins(made(Complex, dtype), codec)
    try:
        for step in range(3):
            twins.step(forward_backward(step))
    except Exception as error:
        return repr(error)
    return twins.told


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("codec", [Ternary(clip=None), "terngrad", "int8"], ids=str)
def test_types_side_by_side_in_one_model(on_ranks, world_size, codec):
    told = on_ranks(world_size, mixed, codec)
    assert [g.dtype for g in told[0][0][1]] == [t for t in FLOATS for _ in range(4)]
    check(told, codec)
    if codec == "terngrad":
        return  # a clipped gradient may be anywhere
    steps = 1 + (world_size > 2) if codec == "int8" else 1  # its sum is rounded once more on the way back
    for number in range(len(told[0])):
        for n, gradient in enumerate(told[0][number][1]):
            rows = torch.stack([rank[number][0][n] for rank in told]).double()
            step = rows.abs().max() / (127 if codec == "int8" else 1)
            rounding = torch.finfo(gradient.dtype).eps * rows.abs().max()
            assert (gradient.double() - rows.mean(0)).abs().max() <= steps * step + rounding, (number, n)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_complex_gradients_are_averaged_exactly(on_ranks, codec, dtype):
    told = on_ranks(3, complex_parameters, codec, dtype)
    assert not any(isinstance(rank, str) for rank in told), told[0]
    assert [g.dtype for g in told[0][0][1]][:2] == [dtype] * 2
    check(told, codec)


# ---- sparse gradients ------------------------------------------------------------------------------------------------


class Words(nn.Module):
    """A sparse embedding, a sparse bag, and dense layers."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(200, 40, sparse=True)
        self.bag = nn.EmbeddingBag(150, 40, mode="sum", sparse=True)
        self.body = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40))

    def forward(self, tokens):
        return self.body(self.words(tokens).sum(1) + self.bag(tokens % 150)).square().sum()


def tokens_of(step):
    """Ranks use rows that overlap in part, some of them twice; each has an empty batch in some steps."""
    rank = dist.get_rank()
    size = 0 if (step + rank) % 4 == 3 else 2 + (step + rank) % 3
    return torch.randint(
        40 * rank, 40 * rank + 60, (size, 5), generator=torch.Generator().manual_seed(50 * step + rank)
    )


def densely(gradients):
    return [g.coalesce().to_dense() if g.is_sparse else g for g in gradients]


def sparse(codec, steps, models=1):
    """Gradients of the twins and of plain DDP, made dense; then their layouts, and the warnings that there were."""
    told, layouts = [], set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for _ in range(models):
                plain = DistributedDataParallel(made(Words), bucket_cap_mb=MANY)
                twins = Twins(made(Words), codec, skip=["words", "bag"])
                for step in range(steps):
                    tokens = tokens_of(step)
                    plain.zero_grad()
                    plain(tokens).backward()
                    twins.step(lambda model: model(tokens).backward())
                    layouts.add(str([p.grad.layout for p in twins.network.parameters()][:3]))
                    told.append([densely(g) for g in (*twins.told[-1], oracle.gradients(plain.module))])
        except Exception as error:
            return repr(error), layouts, []
    return told, layouts, [str(one.message) for one in caught]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("codec", CODECS)
def test_sparse_gradients_are_averaged_exactly(on_ranks, world_size, codec):
    told = on_ranks(world_size, sparse, codec, 6)
    assert not any(isinstance(steps, str) for steps, *_ in told), told[0]
    for steps, layouts, _ in told:
        assert layouts == {"[torch.sparse_coo, torch.sparse_coo, torch.strided]"}
        assert len(steps) == 6
    for number in range(6):
        own = [steps[number][0] for steps, *_ in told]
        assert any(not g[0].any() for g in own) == any((number + rank) % 4 == 3 for rank in range(world_size))
        mean = oracle.mean_of([[None, None, *g[2:]] for g in own], codec, number)
        for steps, *_ in told:
            _, ours, plain = steps[number]
            for n in (0, 1):
                assert torch.equal(ours[n], oracle.exact_mean([g[n] for g in own])), (number, n)
                assert world_size > 2 or torch.equal(ours[n], plain[n]), (number, n)
            assert same(ours[2:], [mean[n] for n in range(2, len(ours))])


def test_sparse_gradients_are_warned_of_once():
    fresh = Ranks()  # once in a process: not where another test was warned
    try:
        told = fresh.run(2, sparse, "int8", 3, 2)
        assert not any(isinstance(steps, str) for steps, *_ in told), told[0]
        words = [said for *_, said in told]
        assert [len(said) for said in words] == [1, 0], words
        assert "sparse" in words[0][0]
    finally:
        fresh.close()
