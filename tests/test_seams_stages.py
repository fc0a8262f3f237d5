"""Stages: a residual (error feedback) and a rotation, on the path, in a loop and under DDP."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from golden import BUCKET_CAP_MB, Network, gradients
from laws import gaussian, same_bits
from seams import MinMax, Stochastic, finite
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm import CommState, GradientAverager, Ternary, comm_hook
from terncomm.codecs.base import Agreed
from terncomm.keys import NO_RANK, Key
from terncomm.path.account import Context
from terncomm.path.bucket import Bucket
from terncomm.path.drivers import lockstep
from terncomm.path.reduce import all_reduce_mean
from terncomm.path.stages import Stage, Staging
from terncomm.segments import Segments
from terncomm.transports import LocalTransport


@dataclass(frozen=True)
class SignMean(Stochastic):
    """Signs times the mean magnitude, which ranks average: biased, and contractive, so errors are fed back.

    Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML
    2019, arXiv:1901.09847: algorithm 2 and lemma 8.
    """

    name = "sign"
    alphabet = -1, 1
    statistics = 1

    def measure_one(self, values):
        return finite(values.abs().double().mean().float().view(1), values)

    def agree(self, everyone):
        total = torch.zeros_like(everyone[0])
        for one in everyone:
            total = total + one
        return Agreed(total / len(everyone))

    def codes(self, values, shared, noise):
        return values.sign().view(1, -1)

    def values(self, totals, shared, ranks):
        return totals[0] * shared[0]


@dataclass(frozen=True)
class Residual(Stage):
    """What the codes of a step have missed is added to the gradient of the next."""

    def before(self, gradient, layer, ctx, state):
        if state is not None:
            gradient += state

    def after(self, mean, layer, ctx):
        pass

    def next_state(self, given, sent, layer, ctx, state):
        return given.float() - sent


@dataclass(frozen=True)
class Rotation(Stage):
    """Random signs and a Hadamard transform of every `size` elements; what is over stays as it is.

    Suresh, Yu, Kumar, McMahan, "Distributed Mean Estimation with Limited Communication", ICML 2017: section 3.
    """

    size: int = 64

    def _signs(self, count, layer, ctx):
        words = ctx.key.streams(torch.tensor([layer]), rank=NO_RANK, world_size=ctx.world_size)[0]
        bits = terncomm.ops.reference.noise(torch.arange(count), *words) >> 23
        return (bits * 2 - 1).view(-1, self.size)

    def _turned(self, rows):
        """Butterflies: additions in one order, so the bits are the same on every processor."""
        width = 1
        while width < self.size:
            pairs = rows.view(len(rows), -1, 2, width)
            rows = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2)
            width *= 2
        return rows.view(-1, self.size) / math.sqrt(self.size)

    def before(self, gradient, layer, ctx, state=None):
        whole = gradient[: len(gradient) // self.size * self.size].view(-1, self.size)
        whole.copy_(self._turned(whole * self._signs(whole.numel(), layer, ctx)))

    def after(self, mean, layer, ctx):
        whole = mean[: len(mean) // self.size * self.size].view(-1, self.size)
        whole.copy_(self._turned(whole) * self._signs(whole.numel(), layer, ctx))


LAYERS = Segments([700, 1300], offsets=[0, 705], layers=[3, 8])
EXACT = Segments([5], offsets=[700], layers=[1])
N = 2005


def bucket(codec):
    return Bucket([(LAYERS, codec), (EXACT, None)])


def path(flat, staging, ctx, codec):
    yield from all_reduce_mean(flat, bucket(codec), ctx, staging=staging)
    return flat


def step_of(own, stagings, step, codec, final=True):
    """A step of all ranks; the mean."""
    world_size = len(own)
    flats = [each.clone() for each in own]
    contexts = [Context(Key(2, step), rank, world_size) for rank in range(world_size)]
    paths = [
        staging.recording_finite(path(*each, codec), step, final)
        for staging, *each in zip(stagings, flats, stagings, contexts, strict=True)
    ]
    lockstep(paths)
    assert all(same_bits(flat, flats[0]) for flat in flats)
    for staging in stagings:
        staging.adopt_states()
    return flats[0]


def states(staging):
    return staging.state_dict(0, 1, str)["states"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_residual_is_what_it_is_by_hand(world_size):
    stagings = [Staging([Residual()]) for _ in range(world_size)]
    errors = [torch.zeros(N) for _ in range(world_size)]
    sums, wanted_sums = torch.zeros(N), torch.zeros(N)
    for step in range(5):
        own = gaussian(world_size, N, seed=step) + 0.2
        mean = step_of(own, stagings, step, SignMean())
        for offset, size in ((0, 700), (705, 1300)):
            here = slice(offset, offset + size)
            given = [g[here] + e[here] for g, e in zip(own, errors, strict=True)]
            scale = torch.zeros(())
            for each in given:
                scale = scale + each.abs().double().mean().float()
            scale = scale / world_size
            total = sum(each.sign() for each in given)
            assert same_bits(mean[here], (total.double() * scale.double() / world_size).float())
            for each, error in zip(given, errors, strict=True):
                error[here] = each - scale * each.sign()
        for rank, staging in enumerate(stagings):
            for layer, here in (("3", slice(700)), ("8", slice(705, N))):
                assert same_bits(states(staging)[0][layer], errors[rank][here])
        sums += mean
        wanted_sums += own.mean(dim=0)
    missed = wanted_sums - sums - torch.stack(errors).mean(dim=0)
    assert missed.abs().max() < 1e-4, "what is not sent now is sent later"


@pytest.mark.parametrize("codec", [Ternary(clip=2.5), MinMax()], ids=repr)
def test_a_rotation_is_undone(codec):
    world_size, rotation = 3, Rotation()
    own = gaussian(world_size, N) ** 3
    mean = step_of(own, [Staging([rotation]) for _ in range(world_size)], 4, codec)
    contexts = [Context(Key(2, 4), rank, world_size) for rank in range(world_size)]
    rotated = own.clone()
    for flat, ctx in zip(rotated, contexts, strict=True):
        rotation.before(flat[:700], 3, ctx)
        rotation.before(flat[705:], 8, ctx)
    assert not torch.equal(rotated, own)
    wanted = step_of(rotated, [Staging() for _ in range(world_size)], 4, codec)
    rotation.after(wanted[:700], 3, contexts[0])
    rotation.after(wanted[705:], 8, contexts[0])
    assert same_bits(mean, wanted)
    back = rotated[0].clone()
    rotation.after(back[:700], 3, contexts[0])
    torch.testing.assert_close(back[:700], own[0, :700])


def test_a_residual_before_a_rotation_is_of_the_gradient_itself():
    """What was sent is turned back before an earlier stage is told."""
    stagings = [Staging([Residual(), Rotation()]) for _ in range(2)]
    plain = [Staging([Residual()]) for _ in range(2)]
    own = gaussian(2, N)
    step_of(own, stagings, 0, Ternary(clip=None))
    step_of(own, plain, 0, Ternary(clip=None))
    for rank, (staging, other) in enumerate(zip(stagings, plain, strict=True)):
        residual, rotated = states(staging)
        assert not rotated
        assert not torch.equal(residual["3"], states(other)[0]["3"])
        sent = own[rank, :700] - residual["3"]
        cosine = torch.nn.functional.cosine_similarity(sent, own[rank, :700], dim=0)
        assert cosine > 0.5, "what was sent resembles the gradient, not the rotated one"


def test_a_step_that_is_not_finite_or_fails_leaves_state_as_it_was():
    stagings = [Staging([Residual()]) for _ in range(2)]
    step_of(gaussian(2, N), stagings, 0, SignMean())
    before = [states(staging) for staging in stagings]

    def unchanged():
        for old, staging in zip(before, stagings, strict=True):
            for layer, state in states(staging)[0].items():
                assert state is old[0][layer], layer

    for place in (100, 702):  # in a layer that is coded, and in one that is exact
        own = gaussian(2, N, seed=7)
        own[1, place] = math.inf
        step_of(own, stagings, 1, SignMean())
        unchanged()
    step_of(gaussian(2, N, seed=8), stagings, 2, SignMean(), final=False)  # broken off after a bucket
    unchanged()

    def failing(flat, staging, ctx, codec):
        yield from path(flat, staging, ctx, codec)
        raise OSError("the disk is full")

    contexts = [Context(Key(2, 3), rank, 2) for rank in range(2)]
    flats = list(gaussian(2, N, seed=9))
    paths = [
        staging.recording_finite(failing(flat, staging, ctx, SignMean()), 3, True)
        for staging, flat, ctx in zip(stagings, flats, contexts, strict=True)
    ]
    with pytest.raises(OSError, match="the disk is full"):
        lockstep(paths)
    for staging in stagings:
        staging.adopt_states()
    unchanged()
    step_of(gaussian(2, N), stagings, 4, SignMean())
    assert not any(state is before[0][0][layer] for layer, state in states(stagings[0])[0].items())


def test_a_layer_outside_the_range_of_codes_is_averaged_whole_between_the_stages():
    stagings = [Staging([Residual(), Rotation()]) for _ in range(2)]
    own = gaussian(2, N).double()
    step_of(own, stagings, 0, Ternary())
    residuals = torch.stack([states(staging)[0]["8"] for staging in stagings])
    assert residuals.abs().max() > 0.1
    own[:, 705:] *= 1e200
    mean = step_of(own, stagings, 1, Ternary())
    torch.testing.assert_close(mean[705:], (own[:, 705:] + residuals).mean(dim=0), rtol=1e-12, atol=0)
    for staging in stagings:
        assert set(states(staging)[0]) == {"3"}, "all of layer 8 was sent, so nothing of it is missing"
    assert torch.isfinite(step_of(gaussian(2, N).double(), stagings, 2, Ternary())).all()
    assert set(states(stagings[0])[0]) == {"3", "8"}


# ---- in engines ------------------------------------------------------------------------------------------------------

OPTIONS = {"codec": SignMean(), "seed": 5, "stages": [Residual(), Rotation()]}
STEPS = 4


def take_step(model, step, rank, bad=False):
    model.zero_grad()
    own = gradients(step, rank)
    if bad:
        own["one.wide.weight"][0] = math.inf
    model(own).backward()


def grads(model):
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


def in_a_loop(transport, overlap=False):
    """Steps, of which one is not finite; then the same from a checkpoint of the third."""
    model = Network()
    options = {"bucket_cap_mb": BUCKET_CAP_MB, "overlap": overlap, **OPTIONS}
    averager = GradientAverager(model, transport=transport, **options)
    found, saved = [], []
    for step in range(STEPS):
        saved.append(averager.state_dict())
        take_step(model, step, transport.rank, bad=step == 1 and transport.rank == 1)
        averager.reduce()
        found.append(grads(model))
    again = Network()
    other = GradientAverager(again, transport=transport, **options)
    other.load_state_dict(saved[2])
    for step in range(2, STEPS):
        take_step(again, step, transport.rank)
        other.reduce()
        assert all(same_bits(mean, found[step][name]) for name, mean in grads(again).items())
    for name, state in saved[1]["stages"]["states"][0].items():
        assert same_bits(state, saved[2]["stages"]["states"][0][name]), "state of a step that was not finite"
        assert not torch.equal(state, saved[3]["stages"]["states"][0][name])
    assert set(saved[1]["stages"]["states"][0]) == {"one.wide.weight", "two.wide.weight", "filter.weight"}
    return found, saved[3]


def under_ddp():
    model = DistributedDataParallel(Network(), bucket_cap_mb=BUCKET_CAP_MB)
    state = terncomm.register(model, **OPTIONS)
    found = []
    for step in range(STEPS):
        if step == 3:
            saved = state.state_dict()
        take_step(model, step, dist.get_rank(), bad=step == 1 and dist.get_rank() == 1)
        found.append(grads(model))
    return found, saved


def alike(one, other):
    return all(same_bits(mean, b[name]) for a, b in zip(one, other, strict=True) for name, mean in a.items())


def test_engines_pass_the_same_stages(on_ranks):
    """DDP, which lays its buckets anew after the first step, and a loop with and without threads: the same bits."""
    loops = LocalTransport.run(2, in_a_loop)
    overlapped = LocalTransport.run(2, lambda transport: in_a_loop(transport, overlap=True))
    ddp = on_ranks(2, under_ddp)
    assert alike(loops[0][0], loops[1][0])
    for rank in range(2):
        assert alike(loops[rank][0], overlapped[rank][0])
        assert alike(loops[rank][0], ddp[rank][0])
        for states in (ddp[rank][1]["stages"]["states"][0], overlapped[rank][1]["stages"]["states"][0]):
            for name, state in loops[rank][1]["stages"]["states"][0].items():
                assert same_bits(states[name], state)
    without = LocalTransport.run(2, lambda transport: plain(transport, {**OPTIONS, "stages": []}))
    assert not alike(loops[0][0][3:], without[0])


def plain(transport, options):
    model = Network()
    averager = GradientAverager(model, transport=transport, bucket_cap_mb=BUCKET_CAP_MB, **options)
    averager.load_state_dict({"step": 2, "seed": 5})
    take_step(model, 3, transport.rank)
    averager.reduce()
    return [grads(model)]


def test_state_of_another_rank_or_world_is_refused():
    _, saved = LocalTransport.run(2, in_a_loop)[0]

    def work(transport, **options):
        averager = GradientAverager(Network(), transport=transport, **{**OPTIONS, **options})
        averager.load_state_dict(saved)

    with pytest.raises(ValueError, match=r"stages' state of rank 0 of 2, and this is rank \d of 3.*belongs to a rank"):
        LocalTransport.run(3, work)
    with pytest.raises(ValueError, match=r"of rank 0 of 2, and this is rank 1 of 2"):
        LocalTransport.run(2, work)
    with pytest.raises(ValueError, match=r"the checkpoint has stages \['Residual\(\)', 'Rotation\(size=64\)'\], this"):
        LocalTransport.run(2, lambda transport: work(transport, stages=[Residual()]))
    kept = {name: value for name, value in saved.items() if name != "stages"}
    LocalTransport.run(3, lambda t: GradientAverager(Network(), transport=t, **OPTIONS).load_state_dict(kept))


def test_stages_without_state_go_on_at_any_world_size():
    options = {**OPTIONS, "stages": [Rotation()]}
    saved = LocalTransport.run(2, lambda t: GradientAverager(Network(), transport=t, **options).state_dict())[0]
    LocalTransport.run(3, lambda t: GradientAverager(Network(), transport=t, **options).load_state_dict(saved))


@dataclass(frozen=True)
class Returns(Rotation):
    """Returns what it should have changed in place."""

    where: str = "before"

    def before(self, gradient, layer, ctx, state):
        return gradient * 0 if self.where == "before" else None

    def after(self, mean, layer, ctx):
        return mean * 0 if self.where == "after" else None


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_stage_that_returns_something_is_refused(where):
    staging = Staging([Returns(where=where)])
    with pytest.raises(TypeError, match=rf"Returns\(.*\).{where} returned a Tensor: it must change"):
        getattr(staging, where)(torch.ones(1000), Segments([1000]), Context(Key(1), 0, 2))


def test_stages_are_a_sequence_of_frozen_dataclasses():
    class Bare(Rotation):
        pass

    with pytest.raises(TypeError, match=r"stages: wanted a sequence of stages, got Residual\(\): write \[Res"):
        CommState(stages=Residual())
    with pytest.raises(TypeError, match=r"stages: Bare must be a frozen dataclass itself"):
        CommState(stages=[Bare()])
    assert CommState(stages=(each for each in [Residual()])).options.stages == (Residual(),)
    assert Residual().keeps_state
    assert not Rotation().keeps_state


def test_a_state_without_stages_refuses_what_stages_kept():
    kept = {"stages": ["Residual()"], "rank": 0, "world_size": 1, "states": [{"x": torch.ones(1)}]}
    with pytest.raises(ValueError, match=r"has the state of stages \['Residual\(\)'\], and this state has no stages"):
        CommState().load_state_dict({"step": 1, "seed": 0, "stages": kept})
    CommState().load_state_dict({"step": 1, "seed": 0, "stages": {**kept, "states": [{}]}})


def late_pair():
    """A plain pair that loads its stages' state before the first backward pass, when it has not connected yet."""
    model = DistributedDataParallel(Network(), bucket_cap_mb=1)
    state = CommState(named_parameters=model.module.named_parameters(), **OPTIONS)
    model.register_comm_hook(state, comm_hook)
    saved = {name: torch.full((64, 32), 0.5) for name in ("one.wide.weight",)}
    place = {"rank": dist.get_rank(), "world_size": 2}
    state.load_state_dict({
        "step": 4, "seed": 5, "stages": {"stages": list(map(repr, OPTIONS["stages"])), "states": [saved, {}], **place},
    })  # fmt: skip
    return state.step, state.state_dict()["stages"]["states"][0]["one.wide.weight"].unique().tolist()


def test_a_plain_pair_resumes_with_stages(on_ranks):
    assert on_ranks(2, late_pair) == [(4, [0.5])] * 2


def test_ranks_with_other_stages_are_told():
    def work(transport):
        stages = [Rotation(size=32 << transport.rank)]
        GradientAverager(Network(), transport=transport, **{**OPTIONS, "stages": stages})

    with pytest.raises(RuntimeError, match=r"stages: \(Rotation\(size=32\),\) on rank 0; \(Rotation\(size=64\),\) on"):
        LocalTransport.run(2, work)


def refusals():
    texts = []
    sharded = fully_shard(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4)))
    model = DistributedDataParallel(nn.Linear(64, 64))
    for each, options in ((sharded, {}), (model, {"intra_group": dist.group.WORLD}), (model, {"stages": [Residual]})):
        try:
            terncomm.register(each, **{**OPTIONS, **options})
        except TypeError as error:
            texts.append(str(error))
    return texts


def test_where_ranks_hold_parts_of_layers_stages_are_refused(on_ranks):
    for texts in on_ranks(2, refusals):
        assert texts[0] == texts[1]
        assert texts[0].startswith("stages= is for DistributedDataParallel without intra_group=")
        assert "stages: wanted a terncomm.path.stages.Stage, got" in texts[2]
