"""Gradients of loops without DDP: the same bits as the DDP hook, arrays of any kind, and what is refused."""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import encoding_breaks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm.hooks.agreement import ConfigurationsDiffer
from terncomm.reduce import RanksDiffer
from terncomm.transports import LocalTransport, ProcessGroupTransport, RankFailed


def network():
    """Convolutions in both memory orders, an embedding's worth of exact layers, and a head."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 24, 3),
        nn.ReLU(),
        nn.Conv2d(24, 40, 3),
        nn.Flatten(),
        nn.Linear(40 * 16, 96),
        nn.Linear(96, 7),
    ]
    model = nn.Sequential(*layers)
    model[2].to(memory_format=torch.channels_last)
    return model


def backward(model, rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    model.zero_grad()
    model(torch.randn(5, 3, 8, 8, generator=generator)).square().mean().backward()


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def by_ddp_and_by_loop(codec, cap_mb):
    rank = dist.get_rank()
    hooked, plain, functional = DistributedDataParallel(network(), bucket_cap_mb=0.1), network(), network()
    terncomm.register(hooked, codec, seed=3, warmup_steps=1)
    averager = terncomm.GradientAverager(plain, codec, seed=3, warmup_steps=1, bucket_cap_mb=cap_mb)
    transport = ProcessGroupTransport(dist.group.WORLD)
    for step in range(4):
        for model in (hooked, plain, functional):
            backward(model, rank, step)
        averager.reduce()
        terncomm.reduce_gradients(functional, codec, transport, seed=3, warmup_steps=1)
        for one, two, three in zip(*map(gradients, (hooked, plain, functional)), strict=True):
            assert torch.equal(one, two), "of GradientAverager"
            assert torch.equal(one, three), "of reduce_gradients"
    return averager.stats()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("codec", "cap_mb"), [("terngrad", 25), ("int8", 0.05)])
def test_it_is_the_ddp_hook_bit_for_bit(on_ranks, world_size, codec, cap_mb):
    for stats in on_ranks(world_size, by_ddp_and_by_loop, codec, cap_mb):
        assert stats["steps"] == 4
        assert 0 < stats["wire_bytes"] < 2 * stats["raw_bytes"]
        assert stats["coded_numel"] > 0


def arrays(rank, dtype=np.float32):
    generator = np.random.default_rng(rank)
    return [generator.standard_normal(shape).astype(dtype) for shape in [(40, 50), (7,), (64, 64)]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_arrays_are_replaced_in_place(dtype):
    """Exact layers get the mean; coded ones an unbiased estimate of it, the same on every rank."""

    def work(transport):
        mine = arrays(transport.rank, dtype)
        terncomm.reduce_gradients(mine, "int8", transport)
        return mine

    results = LocalTransport.run(3, work)
    wanted = [
        np.mean([arrays(rank, dtype)[place].astype(np.float64) for rank in range(3)], axis=0) for place in range(3)
    ]
    for place, mean in enumerate(wanted):
        assert all(np.array_equal(results[0][place], other[place]) for other in results)
        assert results[0][place].dtype == dtype
        found = results[0][place].astype(np.float64)
        error = np.linalg.norm(found - mean) / np.linalg.norm(mean)
        assert error < (1e-3 if mean.ndim == 1 else 0.03)
        assert mean.ndim == 1 or error > 1e-4, "this one is coded"


def test_tensors_in_a_mapping_and_their_names():
    def work(transport):
        mine = {"body": torch.full((64, 64), 1.0 + transport.rank), "head": torch.full((64, 64), float(transport.rank))}
        mine["head"][0] = 0.123 * transport.rank
        terncomm.reduce_gradients(mine, "terngrad", transport, skip=["head"])
        return mine

    for mine in LocalTransport.run(2, work):
        assert torch.equal(mine["head"][0], torch.full((64,), 0.123 / 2))
        assert torch.equal(mine["head"][1:], torch.full((63, 64), 0.5))
        assert len(mine["body"].unique()) <= 5


def test_noise_is_of_the_step():
    """Calls are counted; a step that is given is that step."""

    def work(transport, steps):
        found = []
        for step in steps:
            mine = arrays(transport.rank)
            terncomm.reduce_gradients(mine, "terngrad", transport, step=step)
            found.append(mine[0])
        return found

    counted = LocalTransport.run(2, lambda t: work(t, [None, None, None]))[0]
    assert not np.array_equal(counted[0], counted[1])
    again = LocalTransport.run(2, lambda t: work(t, [2, 0, None]))[0]
    assert np.array_equal(again[0], counted[2])
    assert np.array_equal(again[1], counted[0])
    assert np.array_equal(again[2], counted[1])


def test_a_missing_gradient_is_zeros():
    def work(transport):
        used, unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))
        if transport.rank == 0:
            unused.grad = torch.full((4,), 4.0)
        used.grad = torch.full((3,), 2.0 * transport.rank)
        frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        averager = terncomm.GradientAverager([used, frozen, unused], "int8", transport)
        averager.reduce()
        return used.grad.tolist(), unused.grad.tolist(), frozen.grad

    assert LocalTransport.run(2, work) == [([1.0] * 3, [2.0] * 4, None)] * 2


@pytest.mark.filterwarnings("ignore:the gradient of 0.weight is sparse")
def test_sparse_and_complex_gradients_are_exact():
    def work(transport):
        embedding, rotation = nn.Embedding(50, 4, sparse=True), nn.Parameter(torch.zeros(20, 30, dtype=torch.complex64))
        model = nn.ModuleList([embedding, nn.ParameterList([rotation])])
        embedding.weight.data.fill_(1.0)
        embedding(torch.tensor([transport.rank, 7])).sum().backward()
        rotation.grad = torch.full_like(rotation, complex(transport.rank, 1)).detach()
        averager = terncomm.GradientAverager(model, "terngrad", transport)
        averager.reduce()
        return embedding.weight.grad.to_dense(), rotation.grad

    for rows, rotation in LocalTransport.run(2, work):
        assert torch.equal(rows.sum(1).nonzero().flatten(), torch.tensor([0, 1, 7]))
        assert torch.equal(rows[[0, 1, 7], 0], torch.tensor([0.5, 0.5, 1.0]))
        assert torch.equal(rotation, torch.full((20, 30), 0.5 + 1j))


def test_a_checkpoint_goes_on_with_the_same_noise():
    def work(transport):
        def run(averager, weight, steps):
            for step in steps:
                weight.grad = torch.from_numpy(arrays(step + transport.rank)[2])
                averager.reduce()
            return weight.grad

        weight = nn.Parameter(torch.zeros(64, 64))
        whole = run(terncomm.GradientAverager([weight], "terngrad", transport), weight, range(5)).clone()
        first = terncomm.GradientAverager([weight], "terngrad", transport)
        run(first, weight, range(3))
        second = terncomm.GradientAverager([weight], "terngrad", transport)
        second.load_state_dict(first.state_dict())
        return torch.equal(whole, run(second, weight, range(3, 5)))

    assert LocalTransport.run(2, work) == [True, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda rank: {"codec": ("int8", "terngrad")[rank]}, "codec: Int8.* on rank 0; Ternary.* on rank 1"),
        (
            lambda rank: {"params": [nn.Parameter(torch.zeros(4 + rank, 2))]},
            "parameters: 1 tensors of 8 elements, .* on rank 0; 1 tensors of 10 elements",
        ),
        (
            lambda rank: {"params": {"ab"[(place + rank) % 2]: nn.Parameter(torch.zeros(3)) for place in range(2)}},
            "parameters: 2 tensors of 6 elements, a first .* on rank 0; 2 tensors of 6 elements, b first .* on rank 1",
        ),
        (lambda rank: {"seed": rank}, "seed: 0 on rank 0; 1 on rank 1"),
        (lambda rank: {"bucket_cap_mb": 1 + rank}, "bucket_cap_mb: 1.0 on rank 0; 2.0 on rank 1"),
    ],
)
def test_ranks_that_differ_are_told(arguments, message):
    def work(transport):
        given = {"params": [nn.Parameter(torch.zeros(4, 2))], "codec": "int8", **arguments(transport.rank)}
        terncomm.GradientAverager(given.pop("params"), given.pop("codec"), transport, **given)

    with pytest.raises(ConfigurationsDiffer, match=message):
        LocalTransport.run(2, work)


def test_a_rank_a_step_ahead_is_told():
    def work(transport):
        mine = [np.zeros((40, 40), np.float32)]
        terncomm.reduce_gradients(mine, "int8", transport, step=5 + transport.rank)

    with pytest.raises(RanksDiffer, match=r"step 5 here, 6 there|step 6 here, 5 there"):
        LocalTransport.run(2, work)


def reduce_otherwise(transport):
    """A second call that differs on rank 1: each rank's error."""
    mine = np.zeros((40, 40), np.float32)
    terncomm.reduce_gradients([mine], "int8", transport)
    with pytest.raises((RanksDiffer, RankFailed)) as caught:
        terncomm.reduce_gradients([mine], "int8" if transport.rank == 0 else "terngrad", transport)
    return str(caught.value)


def test_a_rank_that_calls_otherwise_later_is_told():
    for told in LocalTransport.run(2, reduce_otherwise):
        assert told == (
            "ranks are not in step. Rank 1 begins with new parameters, types or options, and rank 0 reduces "
            "gradients as before: every rank must pass the same parameters and options in every call."
        )


def otherwise_over_gloo():
    return reduce_otherwise(ProcessGroupTransport(dist.new_group()))


def test_reduce_gradients_forgets_models_that_are_gone():
    """It holds the last ones used; steps of later ones go on, so that no noise is used twice."""
    (transport,) = LocalTransport.world(1)
    gone, steps = [], []
    for _ in range(30):
        model = nn.Linear(64, 64)
        model(torch.ones(1, 64)).sum().backward()
        for _ in range(2):
            terncomm.reduce_gradients(model, "int8", transport)
        gone.append(weakref.ref(model.weight))
        (averager, _) = list(vars(transport)["_terncomm_averagers"].values())[-1]
        steps.append(averager.step)
        del model, averager
    gc.collect()
    assert [each() is None for each in gone] == [True] * 22 + [False] * 8
    assert steps[:9] == [1] * 9
    assert steps[9:19] == [3] * 9 + [5]


def one_overlaps():
    """Rank 0 overlaps and rank 1 does not: the same messages. Then rank 1 begins anew over the same transport."""
    model, rank = network(), dist.get_rank()
    transport = ProcessGroupTransport(dist.group.WORLD)
    averager = terncomm.GradientAverager(model, "int8", transport, overlap=rank == 0)
    backward(model, 0, 0)
    averager.reduce()
    same = gradients(model)
    try:
        if rank == 1:
            averager = terncomm.GradientAverager(model, "int8", transport)
        backward(model, 0, 1)
        averager.reduce()
    except RanksDiffer as error:
        return same, str(error)


def test_ranks_with_and_without_overlap_are_paired(on_ranks):
    (here, told), (there, again) = on_ranks(2, one_overlaps)
    assert all(torch.equal(one, two) for one, two in zip(here, there, strict=True))
    for words in (told, again):
        assert "Rank 1 begins with new parameters, types or options, and rank 0 reduces" in words


def test_a_rank_that_calls_otherwise_later_is_told_over_gloo(on_ranks):
    for told in on_ranks(2, otherwise_over_gloo):
        assert "Rank 1 begins with new parameters, types or options" in told


def test_steps_are_counted_on_when_parameters_are_thawed():
    def work(transport):
        a, b = (nn.Parameter(torch.zeros(40, 40)) for _ in range(2))
        b.requires_grad_(False)
        found = []
        for step in range(4):
            b.requires_grad_(step > 1)
            for each in (a, b):
                each.grad = torch.full((40, 40), 1.0 + transport.rank) * torch.linspace(0, 1, 40)
            terncomm.reduce_gradients({"a": a, "b": b}, "terngrad", transport, warmup_steps=1)
            found.append(a.grad)
        again = nn.Parameter(torch.zeros(40, 40))
        averager = terncomm.GradientAverager({"a": again}, "terngrad", transport, warmup_steps=1)
        for mean in found:
            again.grad = torch.full((40, 40), 1.0 + transport.rank) * torch.linspace(0, 1, 40)
            averager.reduce()
            assert torch.equal(again.grad, mean)

    LocalTransport.run(2, work)


def test_a_rank_that_thaws_alone_is_told_and_stays_told():
    def calls(transport):
        a, b = (nn.Parameter(torch.zeros(40, 40)) for _ in range(2))
        said = []
        for thawed in (False, transport.rank == 0, False):
            b.requires_grad_(thawed)
            a.grad = torch.ones(40, 40)
            try:
                terncomm.reduce_gradients([a, b], "int8", transport)
                said.append("")
            except RuntimeError as error:
                said.append(str(error))
        return said

    for first, second, third in LocalTransport.run(2, calls):
        assert first == ""
        assert "ranks are not in step. Rank 0 begins" in second
        assert "an earlier gradient reduction failed" in third


def test_empty_arrays():
    def work(transport):
        arrays = [np.zeros((0, 4), np.float32), np.full((2, 2), float(transport.rank), np.float32)]
        terncomm.reduce_gradients(arrays, "int8", transport)
        return arrays[1].tolist()

    assert LocalTransport.run(2, work) == [[[0.5, 0.5], [0.5, 0.5]]] * 2


def test_what_failed_stays_failed():
    def work(transport):
        weight = nn.Parameter(torch.zeros(40, 40))
        averager = terncomm.GradientAverager([weight], "int8", transport)
        averager.load_state_dict({"step": transport.rank, "seed": 0})
        with pytest.raises((RanksDiffer, RankFailed)):
            averager.reduce()
        with pytest.raises(RuntimeError, match="an earlier gradient reduction failed: ranks are not in step"):
            averager.reduce()

    LocalTransport.run(2, work)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "no parameter requires a gradient"),
        (torch.zeros(3), TypeError, "got one tensor: put it in a list"),
        ([3], TypeError, "parameter 0 is int"),
        ([np.zeros(3, np.int32)], TypeError, "gradients must be floats, parameter 0 is torch.int32"),
        ([torch.zeros(3, requires_grad=True)], TypeError, "parameter 0 requires a gradient and is no nn.Parameter"),
        ([nn.Parameter(torch.zeros(3)), torch.zeros(3)], TypeError, "got both: parameter 1 is no parameter"),
        ({"w": np.zeros(4, np.float32)[::-1]}, ValueError, "w cannot be reduced in place: .*negative"),
        ({"w": np.broadcast_to(np.float32(1), (4,))}, ValueError, "w is read-only"),
        ([nn.Parameter(torch.zeros(3), requires_grad=False)], ValueError, "no parameter requires a gradient"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_gradients(params, error, message):
    with pytest.raises(error, match=message):
        LocalTransport.run(1, lambda transport: terncomm.reduce_gradients(params, "int8", transport))


def test_parameters_that_are_frozen_later_are_told():
    def work(transport):
        a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3), requires_grad=False)
        averager = terncomm.GradientAverager({"a": a, "b": b}, "int8", transport)
        b.requires_grad_(True)
        with pytest.raises(RuntimeError, match="b requires a gradient now: make a new GradientAverager"):
            averager.reduce()
        a.grad, b.grad = torch.full((3,), 2.0 * transport.rank), torch.full((3,), 4.0 * transport.rank)
        b.requires_grad_(False)
        terncomm.reduce_gradients([a, b], "int8", transport)
        b.requires_grad_(True)
        a.grad = torch.full((3,), 2.0 * transport.rank)
        terncomm.reduce_gradients([a, b], "int8", transport)
        return a.grad.tolist(), b.grad.tolist()

    assert LocalTransport.run(2, work) == [([1.0] * 3, [2.0] * 3)] * 2


def test_memory_orders_that_differ_are_told():
    def work(transport):
        weight = nn.Parameter(torch.zeros(2, 3, 2, 2))
        if transport.rank == 1:
            weight.data = weight.data.to(memory_format=torch.channels_last)
        terncomm.GradientAverager([weight], "int8", transport)

    with pytest.raises(ConfigurationsDiffer, match="parameters: 1 tensors of 24 elements"):
        LocalTransport.run(2, work)


def test_names_that_occur_twice_are_refused():
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    with pytest.raises(ValueError, match="two parameters are named weight"):
        terncomm.GradientAverager(
            [pair for layer in layers for pair in layer.named_parameters()], "int8", *LocalTransport.world(1)
        )


def test_bad_arguments():
    weight = [nn.Parameter(torch.zeros(3))]
    (transport,) = LocalTransport.world(1)
    with pytest.raises(TypeError, match=r"wrap it, as in terncomm.transports.MPITransport\(comm\)"):
        terncomm.reduce_gradients(weight, "int8", object())
    with pytest.raises(ValueError, match="bucket_cap_mb must be positive, got 0"):
        terncomm.GradientAverager(weight, "int8", transport, bucket_cap_mb=0)
    with pytest.raises(TypeError, match="give gradients to reduce_gradients"):
        terncomm.GradientAverager([torch.zeros(3)], "int8", transport)
    with pytest.raises(ValueError, match="unknown codec"):
        terncomm.reduce_gradients(weight, "zip", transport)


def one_rank_fails():
    weight = nn.Parameter(torch.zeros(64, 64))
    averager = terncomm.GradientAverager([weight], "int8")
    weight.grad = torch.zeros(64, 64)
    averager.reduce()
    with encoding_breaks(dist.get_rank() == 1), pytest.raises(Exception) as caught:  # noqa: PT011 - each has its own
        averager.reduce()
    return str(caught.value)


def test_a_rank_that_fails_is_named_to_the_others(on_ranks):
    told = on_ranks(2, one_rank_fails)
    assert "rank 1 failed in bucket 0 of step 1, encode: ValueError: boom" in told[0]


def ddp_is_refused():
    with pytest.raises(TypeError, match=r"use terncomm\.register"):
        terncomm.GradientAverager(DistributedDataParallel(nn.Linear(2, 2)))


@pytest.mark.parametrize(("phase", "told"), [("encode", "bucket 0 of step 3, encode"), ("", "bucket 0 of step 3")])
def test_an_error_outside_every_phase_is_told_without_one(phase, told):
    class Connected:
        def fail(self, error, where):
            assert where == told
            return error

    def of(transport):
        averager = terncomm.GradientAverager(nn.Linear(2, 2), "int8", transport)
        averager.connection = Connected()
        error = ValueError("boom")
        assert averager.fail(error, "bucket 0 of step 3", phase) is error

    LocalTransport.run(1, of)


def test_ddp_is_refused(on_ranks):
    on_ranks(2, ddp_is_refused)
