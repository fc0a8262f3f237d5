"""Jobs around the hook: several models, torch.compile, collectives of the model's own, clipping, scaling, other models.

Functions up to the tests run on ranks, in processes joined by gloo.
"""

import copy
import shutil
from contextlib import nullcontext
from unittest import mock

import oracle
import pytest
import torch
import torch.distributed as dist
from oracle import CODECS, MANY, SEED, Twins, batch, check, loss_of, made, same
from ranks import quietly
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm import CommState

pytestmark = pytest.mark.conformance


def forward_backward(step):
    """A pass over this rank's batch, as a function of the model."""
    inputs = batch(step)
    return lambda model: loss_of(model(inputs)).backward()


def parameters_of(network):
    return [p.detach().clone() for p in network.parameters()]


# ---- several models --------------------------------------------------------------------------------------------------


class Generator(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 40))


class Discriminator(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def adversaries(codecs, steps):
    """Each step: the discriminator's backward alone, then one through both, as generative adversarial networks do."""
    both = [Twins(made(Generator), codecs[0]), Twins(made(Discriminator), codecs[1], seed=SEED + 1)]
    generator, discriminator = both
    for step in range(steps):
        noise, real = batch(2 * step), batch(2 * step + 1, width=40)
        for one in (0, 1):
            g, d = [(t.alone, t.model)[one] for t in both]
            d.zero_grad()
            (loss_of(d(real)) + d(g(noise).detach()).square().mean()).backward()
        discriminator.note(rate=0.1)
        for one in (0, 1):
            g, d = [(t.alone, t.model)[one] for t in both]
            g.zero_grad()
            d.zero_grad()
            loss_of(d(g(noise))).backward()
        generator.note(rate=0.1)
        discriminator.note()
    return generator.told, discriminator.told, [parameters_of(t.network) for t in both]


def of_a_sub_group(codec):
    """Ranks 1 and 3 train a model; all make a group, and use it between the steps."""
    rank = dist.get_rank()
    two = dist.new_group([1, 3])
    twins = Twins(made(), codec, {"process_group": two}) if rank in (1, 3) else None
    totals = []
    for step in range(3):
        if twins:
            twins.step(forward_backward(step), rate=0.5)
        everyone = dist.new_group([0, 1, 2, 3])
        totals.append(torch.tensor([rank + 1.0]))
        dist.all_reduce(totals[-1], group=everyone)
    return twins and twins.told, [total.item() for total in totals]


def of_a_sub_group_and_of_all(codecs):
    """Ranks 1 and 3 train a model; then all train another, and both are used in turn."""
    two = dist.new_group([1, 3])
    small = Twins(made(), codecs[0], {"process_group": two}) if dist.get_rank() in (1, 3) else None
    if small:
        small.step(forward_backward(0))
    everyone = dist.new_group([0, 1, 2, 3])
    large = Twins(made(Generator), codecs[1], {"process_group": everyone})
    for step in range(1, 4):
        large.step(forward_backward(step), rate=0.5)
        if small:
            small.step(forward_backward(step), rate=0.5)
    return small and small.told, large.told


def in_a_sub_group_alone(codec):
    """Ranks 1 and 3 are in a group of which nobody makes any use; all train a model."""
    dist.new_group([1, 3])
    twins = Twins(made(), codec)
    twins.step(forward_backward(0))
    return twins.told


@pytest.mark.parametrize("codecs", [("terngrad", "int8"), ("int8", "terngrad")], ids="+".join)
def test_adversarial_models_in_turn(on_ranks, codecs):
    told = on_ranks(3, adversaries, codecs, 4)
    check([generator for generator, *_ in told], codecs[0])
    check([discriminator for _, discriminator, _ in told], codecs[1], seed=SEED + 1)
    for *_, networks in told:
        assert all(same(mine, first) for mine, first in zip(networks, told[0][2], strict=True))


@pytest.mark.parametrize("codec", CODECS)
def test_model_of_a_sub_group_beside_later_groups(on_ranks, codec):
    told = on_ranks(4, of_a_sub_group, codec)
    assert [totals for _, totals in told] == [[10.0] * 3] * 4
    assert [steps is None for steps, _ in told] == [True, False, True, False]
    check([told[1][0], told[3][0]], codec)


def test_models_of_a_sub_group_and_of_all(on_ranks):
    told = on_ranks(4, of_a_sub_group_and_of_all, ("terngrad", "int8"))
    check([told[1][0], told[3][0]], "terngrad")
    check([large for _, large in told], "int8")


def test_ranks_that_are_in_unequally_many_groups(on_ranks):
    check(on_ranks(4, in_a_sub_group_alone, "int8"), "int8")


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def compiled(codec, how, backend):
    """Four steps of a compiled model: register, before or after, on DDP or what wraps it; the number of graphs."""
    return quietly(_compiled)(codec, how, backend)


def _compiled(codec, how, name):
    graphs = []

    def backend(graph, inputs):
        graphs.append(name)
        return lookup_backend(name)(graph, inputs)

    network = made()
    alone = torch.compile(copy.deepcopy(network), backend=name)
    options = {"seed": SEED, "exempt": ()}
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000):  # else the compiler wants large buckets
        if how == "DDP(compile)":
            model = DistributedDataParallel(torch.compile(network, backend=backend), bucket_cap_mb=MANY)
            state = terncomm.register(model, codec, **options)
        else:
            model = DistributedDataParallel(network, bucket_cap_mb=MANY)
            if how == "register, compile(DDP)":
                state = terncomm.register(model, codec, **options)
                model = torch.compile(model, backend=backend)
            else:
                model = torch.compile(model, backend=backend)
                state = terncomm.register(model, codec, **options)
        ours = steps_of(model, network)
    torch._dynamo.reset()  # else the twin would run what was compiled for the model
    return list(zip(steps_of(alone, alone), ours, strict=True)), state.stats(), len(graphs)


def steps_of(model, network):
    """Gradients of four steps, of which two accumulate those of two batches."""
    told = []
    for step in range(4):
        model.zero_grad()
        if step % 2:
            with getattr(model, "no_sync", nullcontext)():
                loss_of(model(batch(10 + step))).backward()
        loss_of(model(batch(step))).backward()
        told.append(oracle.gradients(network))
    return told


def python_reducer():
    """What a backward raises under that mode, by register and by the plain pair, and what the hook is given there."""
    return quietly(_python_reducer)()


def _python_reducer():
    given, raised = [], []

    def watch(state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        given.append(bucket)
        return terncomm.comm_hook(state, bucket)

    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        for pair in (False, True):
            model = DistributedDataParallel(made())
            try:
                if pair:
                    model.register_comm_hook(CommState("int8"), watch)
                else:
                    terncomm.register(model, "int8")
                loss_of(torch.compile(model, backend="aot_eager")(batch(0))).backward()
                raised.append(("nothing", ""))
            except Exception as error:
                raised.append((type(error).__name__, str(error)))
    return raised, [(type(b).__name__, [(type(x).__name__, tuple(x.shape)) for x in b]) for b in given]


HOW = ["DDP(compile)", "compile(DDP), register", "register, compile(DDP)"]


@pytest.mark.parametrize(("codec", "how"), list(zip(["terngrad", "int8", "terngrad"], HOW, strict=True)))
def test_compiled_models_are_reduced(on_ranks, codec, how):
    told = on_ranks(2, compiled, codec, how, "aot_eager", limit_s=120)
    check([steps for steps, *_ in told], codec)
    for _, stats, graphs in told:
        assert (stats["steps"], stats["coded_numel"]) == (4, 4 * (7 * 1600 + 1200))
        assert graphs == 9, "the compiler cuts a model where DDP cuts its buckets"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default compiler of torch.compile needs g++")
@pytest.mark.parametrize(("codec", "how"), list(zip(CODECS, HOW[:2], strict=True)))
def test_compiled_models_are_reduced_by_default_too(on_ranks, codec, how):
    told = on_ranks(2, compiled, codec, how, "inductor", limit_s=240)
    for steps, stats, graphs in told:
        assert (stats["steps"], graphs) == (4, 9)
        assert all(same(mine[1], first[1]) for mine, first in zip(steps, told[0][0], strict=True))
    check([steps for steps, *_ in told], codec)


def test_python_reducer_is_refused_in_words(on_ranks):
    for raised, given in on_ranks(2, python_reducer, limit_s=120):
        for kind, text in raised:
            assert kind in ("TypeError", "RuntimeError"), (raised, given)
            assert "python_reducer" in text, (raised, given)
            assert "optimize_ddp" in text, (raised, given)


# ---- collectives of the model's own ----------------------------------------------------------------------------------


class Centre(torch.autograd.Function):
    """Subtracts the mean over the batches of all ranks, as synchronized batch normalization does."""

    @staticmethod
    def forward(ctx, values):
        mean = values.mean(0)
        dist.all_reduce(mean)
        return values - mean / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient):
        mean = gradient.mean(0)
        dist.all_reduce(mean)
        return gradient - mean / dist.get_world_size()


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(24, 40)
        self.layers = nn.ModuleList([nn.Linear(40, 40) for _ in range(6)])

    def forward(self, inputs):
        hidden = self.first(inputs)
        for layer in self.layers:
            hidden = layer(torch.tanh(Centre.apply(hidden)))
        return hidden


def centred(codec, steps, plainly=False):
    """Steps of a model whose layers talk to each other over ranks, beside its twin without DDP or beside plain DDP."""
    twins = Twins(made(Centred), codec)
    oracle.delay(twins.network)
    if plainly:
        twins.state.disable()
        twins.alone = DistributedDataParallel(twins.alone, bucket_cap_mb=MANY)
    for step in range(steps):
        twins.step(forward_backward(step), rate=0.3)
    return twins.told, parameters_of(twins.network)


@pytest.mark.parametrize(("world_size", "codec"), [(2, "int8"), (3, "terngrad")])
def test_collectives_inside_forward_and_backward(on_ranks, world_size, codec):
    told = on_ranks(world_size, centred, codec, 12)
    check([steps for steps, _ in told], codec)
    assert all(same(parameters, told[0][1]) for _, parameters in told)


def test_collectives_inside_a_model_whose_hook_is_disabled(on_ranks):
    for steps, _ in on_ranks(2, centred, "terngrad", 6, True):
        assert len(steps) == 6
        assert all(same(plain, ours) for plain, ours in steps)


# ---- clipping, loss scaling ------------------------------------------------------------------------------------------


def clipped_adam(codec):
    """Losses, norms before clipping, parameters."""
    rank = dist.get_rank()
    model = DistributedDataParallel(made(), bucket_cap_mb=MANY)
    terncomm.register(model, codec, seed=SEED)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses, norms = [], []
    for step in range(30):
        optimizer.zero_grad()
        loss = loss_of(model(batch(3 * step + rank)))
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, parameters_of(model)


def scaled(codec, bad_rank, bad):
    """Mixed precision with a scaler; in step 3 one element of a coded gradient is not finite, on one rank."""
    rank = dist.get_rank()
    step = 0

    def spoil(gradient):
        gradient = gradient.clone()
        if step == 3 and rank == bad_rank:
            gradient[7, 5] = bad
        return gradient

    network = made()
    network.layers[2].weight.register_hook(spoil)
    model = DistributedDataParallel(network, bucket_cap_mb=MANY)
    terncomm.register(model, codec, seed=SEED)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    scales, losses, broken, moved = [], [], [], []
    for step in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model(batch(3 * step + rank)).float())
        scaler.scale(loss).backward()
        broken.append([name for name, p in network.named_parameters() if not p.grad.isfinite().all()])
        before = parameters_of(model)
        scaler.step(optimizer)
        scaler.update()
        moved.append(not same(before, parameters_of(model)))
        scales.append(scaler.get_scale())
        losses.append(loss.item())
    return scales, losses, broken, moved, parameters_of(model)


@pytest.mark.parametrize(("world_size", "codec"), [(2, "terngrad"), (3, "int8")])
def test_norm_clipping_and_adam(on_ranks, world_size, codec):
    told = on_ranks(world_size, clipped_adam, codec)
    losses, norms, first = told[0]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert max(norms) > 0.1, "nothing was clipped"
    for _, norms_there, parameters in told[1:]:
        assert norms_there == norms
        assert same(parameters, first)


@pytest.mark.parametrize(("codec", "bad_rank", "bad"), [("terngrad", 1, float("inf")), ("int8", 2, float("nan"))])
def test_scaler_and_autocast_skip_in_step(on_ranks, codec, bad_rank, bad):
    told = on_ranks(3, scaled, codec, bad_rank, bad)
    for scales, losses, broken, moved, parameters in told:
        assert scales == [2.0**10] * 3 + [2.0**9] * 27, "the step was not skipped, or not alone"
        assert broken == [["layers.2.weight"] if step == 3 else [] for step in range(30)]
        assert moved == [step != 3 for step in range(30)]
        assert sum(losses[-5:]) < 0.3 * sum(losses[:3])
        assert same(parameters, told[0][4])


# ---- registration ----------------------------------------------------------------------------------------------------


def refusals():
    """What register raises for models that it does not take."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    hooked = DistributedDataParallel(made())
    hooked.register_comm_hook(None, fp16_compress_hook)
    models = {"hooked": hooked, "plain": made(), "none": None}
    said = {}
    for name, model in models.items():
        try:
            terncomm.register(model, "int8")
            said[name] = ("nothing", "")
        except Exception as error:
            said[name] = (type(error).__name__, str(error))
    return said


def alone_in_the_world(codec):
    twins = Twins(made(), codec)
    for step in range(3):
        twins.step(forward_backward(step), rate=0.5)
    return twins.told, twins.state.stats()


def test_models_that_are_not_taken(on_ranks):
    for said in on_ranks(2, refusals):
        assert said["hooked"][0] == "RuntimeError"
        assert "already has a communication hook, fp16_compress_hook" in said["hooked"][1]
        assert said["plain"] == (
            "TypeError",
            "wanted a DistributedDataParallel model, got Net; wrap it first: DDP(model)",
        )
        assert said["none"] == ("TypeError", "wanted a DistributedDataParallel model, got None")


@pytest.mark.parametrize("codec", CODECS)
def test_a_world_of_one_is_left_alone(on_ranks, codec):
    ((told, stats),) = on_ranks(1, alone_in_the_world, codec)
    assert len(told) == 3
    assert all(same(own, ours) for own, ours in told)
    assert (stats["steps"], stats["coded_numel"], stats["wire_bytes"]) == (3, 0, 0)
