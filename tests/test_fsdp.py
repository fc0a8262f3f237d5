"""FSDP2: gradients that are reduce-scattered through a codec are DDP's, cut into shards. Functions run on ranks."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from ranks import encoding_breaks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm.keys import Key
from terncomm.path.account import Context
from terncomm.path.drivers import blocking
from terncomm.path.reduce import reduce_scatter
from terncomm.path.shards import Shards
from terncomm.reduce import all_reduce_mean
from terncomm.segments import Segments
from terncomm.transports import LocalTransport, ProcessGroupTransport


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 67), nn.Linear(67, width)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Network(nn.Module):
    """Sizes that no world divides, a scalar, an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.words, self.one, self.two = nn.Embedding(50, 53), Block(53), Block(53)
        self.head, self.gain = nn.Linear(53, 5), nn.Parameter(torch.ones(1))

    def forward(self, words):
        return self.head(self.two(self.one(self.words(words)))) * self.gain


def network():
    torch.manual_seed(0)
    return Network()


def sharded(mesh=None, policy=None):
    model = network()
    options = {"mesh": mesh} | ({"mp_policy": policy} if policy else {})
    for block in (model.one, model.two):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def backward(model, step, rank=None):
    rank = dist.get_rank() if rank is None else rank
    words = torch.randint(0, 50, (6, 3), generator=torch.Generator().manual_seed(10 * step + rank))
    model.zero_grad()
    model(words).square().mean().backward()


def whole(model):
    """Every gradient, gathered."""
    return {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone())
        for name, p in model.named_parameters()
    }


def as_ddp(codec):
    return compared_with_ddp(sharded(), codec, whole)


def compared_with_ddp(model, codec, gathered):
    """Gradients are DDP's bit for bit, over four steps of which the first is exact."""
    plain = DistributedDataParallel(network())
    options = {"seed": 5, "warmup_steps": 1, "skip": ["two.up"]}
    terncomm.register(plain, codec, **options)
    state = terncomm.register(model, codec, **options)
    for step in range(4):
        backward(plain, step)
        backward(model, step)
        found = gathered(model)
        assert len(found) == len(list(plain.parameters()))
        for name, gradient in found.items():
            assert torch.equal(gradient, plain.get_parameter(f"module.{name}").grad), (step, name)
    return state.stats()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    "codec", ["terngrad", terncomm.Int8(returned="exact"), terncomm.Int8(returned="exact", block=100)]
)
def test_it_is_ddp_cut_into_shards(on_ranks, codec, world_size):
    """Scales, noise and sums are those of DDP; 8-bit sums that DDP returns in 8 bits are exact here."""
    for stats in on_ranks(world_size, as_ddp, codec):
        assert stats["steps"] == 4
        assert stats["coded_numel"] == 3 * 3 * 67 * 53
        assert stats["ring_bytes"] == pytest.approx(stats["raw_bytes"] * (world_size - 1) / world_size, abs=100)
        assert stats["wire_bytes"] < stats["ring_bytes"]


def scaled(how):
    """Gradients under another division than FSDP's usual one, against those of plain FSDP."""
    world_size = dist.get_world_size()
    plain, coded = sharded(), sharded()
    terncomm.register(coded, "int8")
    for model in (plain, coded):
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                if how in ("sum", "both"):
                    module.set_force_sum_reduction_for_comms(True)
                if how == "both":
                    module.set_gradient_divide_factor(2.0 * world_size)
        backward(model, 0)
    wanted, found = whole(plain), whole(coded)
    for name, gradient in found.items():
        error = (gradient - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-6)
        assert error < 0.03, (name, float(error))
        assert (error > 1e-5) == (name.endswith(("up.weight", "down.weight"))), name


@pytest.mark.parametrize("how", ["avg", "sum", "both"])
def test_divisions_are_those_of_fsdp(on_ranks, how):
    on_ranks(2, scaled, how)


def premultiplied():
    """Gloo has no PREMUL_SUM, so plain FSDP cannot be asked: a third in place of a half."""
    plain, coded = sharded(), sharded()
    terncomm.register(coded, "int8", exempt=(), min_numel=10**9)
    for module in coded.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(3.0)
    backward(plain, 0)
    backward(coded, 0)
    for name, gradient in whole(coded).items():
        torch.testing.assert_close(gradient, whole(plain)[name] * 2 / 3, rtol=1e-5, atol=1e-8)


def test_a_divide_factor_is_honoured(on_ranks):
    on_ranks(2, premultiplied)


def mixed(reduce_dtype):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    plain, coded = sharded(policy=policy), sharded(policy=policy)
    terncomm.register(coded, "int8")
    for model in (plain, coded):
        backward(model, 0)
    wanted, found = whole(plain), whole(coded)
    for name, gradient in found.items():
        assert gradient.dtype == wanted[name].dtype
        assert (gradient - wanted[name]).norm() <= 0.03 * wanted[name].norm() + 1e-6, name


@pytest.mark.parametrize("reduce_dtype", [None, torch.float32, torch.float16], ids=str)
def test_mixed_precision(on_ranks, reduce_dtype):
    on_ranks(2, mixed, reduce_dtype)


def along_the_other_dimension():
    """A weight that is cut along its second dimension travels exactly, and the others as ever."""

    def placed(parameter):
        return Shard(1) if parameter.shape == (67, 54) else Shard(0)

    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(54, 67), nn.Linear(67, 66), nn.Linear(66, 3))
        return fully_shard(model, shard_placement_fn=placed)

    plain, coded = made(), made()
    state = terncomm.register(coded, "int8")
    for model in (plain, coded):
        model(torch.randn(4, 54, generator=torch.Generator().manual_seed(dist.get_rank()))).square().mean().backward()
    wanted, found = whole(plain), whole(coded)
    torch.testing.assert_close(found["0.weight"], wanted["0.weight"], rtol=1e-6, atol=1e-9)
    error = (found["1.weight"] - wanted["1.weight"]).norm() / wanted["1.weight"].norm()
    assert 1e-4 < error < 0.03
    assert state.stats()["coded_numel"] == 67 * 66


def test_other_dimensions_are_exact(on_ranks):
    on_ranks(2, along_the_other_dimension)


def between_replicas_is_the_path():
    """What the hook leaves is `all_reduce_mean` of the reduced shard: noise by the place in the parameter."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    plain, model = sharded(mesh["shard"]), sharded(mesh["shard"])
    state = terncomm.register(model, "terngrad", replicas=mesh.get_group("replicate"), warmup_steps=1, seed=9)
    transport = ProcessGroupTransport(mesh.get_group("replicate"))
    number = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    for step in range(2):
        backward(plain, step)
        backward(model, step)
        for name, parameter in plain.named_parameters():
            local = parameter.grad.to_local().clone().flatten()
            layer, key = number[name], Key(9, step, 0)
            rows = -(-parameter.shape[0] // 2)
            base = mesh["shard"].get_local_rank() * rows * parameter[0].numel() if parameter.dim() else 0
            coded = step > 0 and name in ("one.up.weight", "one.down.weight", "two.up.weight", "two.down.weight")
            layers = Segments([local.numel()], layers=[layer], bases=[base])
            if coded:
                all_reduce_mean(local, layers, state.codec, transport, key=key)
            else:
                all_reduce_mean(local, Segments(()), None, transport, key=key, exact=layers)
            found = model.get_parameter(name).grad.to_local().flatten()
            assert torch.equal(found, local), (step, name)


def test_between_replicas_it_is_the_path(on_ranks):
    on_ranks(4, between_replicas_is_the_path)


def replicas_that_are_none():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(ValueError, match="replicas: wanted the group of the ranks that hold the same shard"):
        terncomm.register(sharded(mesh["shard"]), "int8", replicas=mesh.get_group("shard"))


def test_a_group_that_holds_no_replicas_is_refused(on_ranks):
    on_ranks(4, replicas_that_are_none)


def between_replicas(codec):
    """Two nodes of two ranks: shards inside, replicas between."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    plain, model = DistributedDataParallel(network()), sharded(mesh["shard"])
    state = terncomm.register(model, codec, replicas=mesh.get_group("replicate"))
    backward(plain, 0)
    backward(model, 0)
    worst = 0.0
    for name, gradient in whole(model).items():
        wanted = plain.get_parameter(f"module.{name}").grad
        error = float((gradient - wanted).norm() / wanted.norm().clamp(min=1e-6))
        worst = max(worst, error)
        assert error < 0.03, (name, error)
        everywhere = [torch.empty_like(gradient) for _ in range(4)]
        dist.all_gather(everywhere, gradient)
        assert all(torch.equal(gradient, other) for other in everywhere)
    assert worst > 1e-4, "something is coded"
    return state.stats()


def test_hybrid_sharding_by_the_replicas_group(on_ranks):
    stats = on_ranks(4, between_replicas, "int8")
    half = (4 * 67 * 53 + 1) // 2
    assert all(abs(s["coded_numel"] - half) <= 4 * 53 for s in stats)
    assert all(s["wire_bytes"] < s["ring_bytes"] == s["raw_bytes"] for s in stats)


def native_hybrid_is_refused():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(TypeError, match=r"HSDP.*replicas=mesh.get_group"):
        terncomm.register(sharded(mesh), "int8")


def test_native_hybrid_sharding_is_refused_with_the_route(on_ranks):
    on_ranks(4, native_hybrid_is_refused)


def frozen_later():
    """Layouts follow what requires a gradient now, whatever it was at registration."""
    plain, model = sharded(), sharded()
    model.one.requires_grad_(False)
    terncomm.register(model, "int8", exempt=(), min_numel=10**9)
    model.one.requires_grad_(True)
    for step in range(3):
        for each in (plain, model):
            each.two.up.requires_grad_(step == 1)
            backward(each, step)
        wanted = {name: p.grad.full_tensor() for name, p in plain.named_parameters() if p.grad is not None}
        found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
        assert wanted.keys() == found.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-9)


def test_parameters_that_are_frozen_later(on_ranks):
    on_ranks(2, frozen_later)


def after_a_forward_pass():
    """The root keeps its weights gathered after one, as other objects: what is exempt must stay so."""
    model = sharded()
    with torch.no_grad():
        model(torch.zeros(2, 3, dtype=torch.int64))
    state = terncomm.register(model, "terngrad")
    backward(model, 0)
    assert state.stats()["coded_numel"] == 4 * 67 * 53
    assert any(name.startswith("clip_norm_lost/") for name in state.stats())
    with pytest.raises(RuntimeError, match="is registered already"):
        terncomm.register(model, "int8")


def test_registering_after_a_forward_pass(on_ranks):
    on_ranks(2, after_a_forward_pass)


@pytest.mark.parametrize("divisor", [1.0, 3.0])
def test_padding_becomes_zero_and_exact_layers_are_exact(divisor):
    """Three ranks; parameters of 10, 7 and 1 elements, the second coded."""
    shards = Shards.by_chunks([10, 7, 1], [4, 3, 1], [0, 1, 2], [None, terncomm.Int8(), None], 3)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randint(-8, 9, (24,), generator=generator).float() for _ in range(3)]

    def work(transport):
        out = torch.full((8,), torch.nan)
        flat = inputs[transport.rank].clone()
        ctx = Context(Key(0), transport.rank, transport.world_size)
        blocking(reduce_scatter(flat, shards, ctx, divisor=divisor, out=out), transport)
        return out

    for rank, out in enumerate(LocalTransport.run(3, work)):
        total = sum(inputs).view(3, 8)[rank] / divisor
        assert torch.equal(out[:4], total[:4])
        assert torch.equal(out[7:], total[7:])
        held = max(0, min(3, 7 - 3 * rank))
        assert torch.equal(out[4 + held : 7], torch.zeros(3 - held)), "padding"
        torch.testing.assert_close(out[4 : 4 + held], total[4 : 4 + held], rtol=0, atol=3 * 8 / 127 / divisor * 1.01)


def missing_gradient():
    """FSDP leaves such a parameter out of the buffer, and does not tell which: the others are exact then."""
    plain, model = sharded(), sharded()
    state = terncomm.register(model, "int8")
    for each in (plain, model):
        each.one.forward = lambda x, one=each.one: x + one.up(one.norm(x)).sum()  # without `down`
    backward(plain, 0)
    with (
        pytest.warns(UserWarning, match="one, but its parameters need .*not compressed")
        if dist.get_rank() == 0
        else (nullcontext())
    ):
        backward(model, 0)
    assert state.stats()["coded_numel"] == 2 * 67 * 53, "the other block"
    for name, parameter in model.one.named_parameters():
        wanted = plain.one.get_parameter(name).grad
        if name.startswith("down"):
            assert parameter.grad is wanted is None
        else:
            error = (parameter.grad.full_tensor() - wanted.full_tensor()).norm() / wanted.full_tensor().norm()
            assert error < 0.05, name  # what comes to it from the other block is coded nowhere on its way
    backward(model, 1)


def test_a_module_with_a_parameter_without_gradient_is_exact(on_ranks):
    on_ranks(2, missing_gradient)


def resumed():
    """A run of four steps, and one that stops after two and goes on in a new model."""
    whole_run, first = sharded(), sharded()
    a, b = terncomm.register(whole_run, "terngrad"), terncomm.register(first, "terngrad")
    for step in range(4):
        backward(whole_run, step)
    for step in range(2):
        backward(first, step)
    second = sharded()
    c = terncomm.register(second, "terngrad")
    c.load_state_dict(b.state_dict())
    for step in range(2, 4):
        backward(second, step)
    assert a.state_dict() == c.state_dict() == {"step": 3, "seed": 0, "enabled": True, "steps": [3, 3, 3]}
    for name, gradient in whole(second).items():
        assert torch.equal(gradient, whole(whole_run)[name]), name


def test_noise_goes_on_after_a_checkpoint(on_ranks):
    on_ranks(2, resumed)


def switched():
    plain, model = sharded(), sharded()
    state = terncomm.register(model, "terngrad")
    for step, on in enumerate((True, False, True)):
        (state.enable if on else state.disable)()
        backward(plain, step)
        backward(model, step)
        same = all(torch.allclose(g, whole(plain)[n], rtol=1e-5, atol=1e-9) for n, g in whole(model).items())
        assert same == (not on)


def test_it_is_switched_off_and_on(on_ranks):
    on_ranks(2, switched)


def failing(model, rank):
    """What is raised here when encoding breaks on one rank."""
    terncomm.register(model, "int8")
    backward(model, 0)
    here = dist.get_rank() == rank
    with encoding_breaks(here), pytest.raises(Exception) as caught:  # noqa: PT011 - each rank has its own
        backward(model, 1)
    return str(caught.value)


def one_rank_fails():
    return failing(sharded(), 1)


def test_a_rank_that_fails_is_named_to_the_others(on_ranks):
    told = on_ranks(2, one_rank_fails)[0]
    assert "rank 1 failed in" in told
    assert "encode: ValueError: boom" in told


def bad_calls():
    with pytest.raises(TypeError, match=r"replicas= is for models of fully_shard"):
        terncomm.register(DistributedDataParallel(nn.Linear(2, 2)), "int8", replicas=dist.group.WORLD)
    with pytest.raises(ValueError, match="matches no parameter"):
        terncomm.register(sharded(), "int8", skip=["nothing"])


def test_bad_calls(on_ranks):
    on_ranks(2, bad_calls)
