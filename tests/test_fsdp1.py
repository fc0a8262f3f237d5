"""FSDP1 (`FullyShardedDataParallel`): its flat gradients through a codec are DDP's. Functions run on ranks."""

import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import quietly
from test_fsdp import Block, backward, compared_with_ddp, failing, network, sharded
from test_fsdp import whole as gathered_by_fsdp2
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import terncomm

CODED = ("one.up.weight", "one.down.weight", "two.up.weight", "two.down.weight")


def flat(strategy="FULL_SHARD", model=None, **options):
    options = {"auto_wrap_policy": ModuleWrapPolicy({Block}), **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP1 is deprecated, NO_SHARD too
        return FullyShardedDataParallel(
            network() if model is None else model,
            sharding_strategy=ShardingStrategy[strategy],
            device_id=torch.device("cpu"),
            **options,
        )


def whole(model):
    """Every gradient, gathered."""
    if model._use_orig_params:
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {terncomm.layers.clean(name): p.grad.clone() for name, p in model.named_parameters()}
    found = {}
    for name, unit in model.named_modules():  # FSDP1 gives these only itself
        if isinstance(unit, FullyShardedDataParallel):
            flat, prefix = unit._handle.flat_param, terncomm.layers.clean(name)
            rows = [torch.empty_like(flat.grad) for _ in range(dist.get_world_size())]
            dist.all_gather(rows, flat.grad)
            pieces = torch.cat(rows)[: sum(flat._numels)].split(flat._numels)
            for inner, piece, shape in zip(flat._fqns, pieces, flat._shapes, strict=True):
                found[f"{prefix}.{inner}" if prefix else inner] = piece.view(shape)
    return found


def as_ddp(strategy, codec, use_orig_params):
    return compared_with_ddp(flat(strategy, use_orig_params=use_orig_params), codec, whole)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("codec", ["terngrad", terncomm.Int8(returned="exact", block=100)])
@pytest.mark.parametrize(
    ("strategy", "use_orig_params"), [("FULL_SHARD", True), ("FULL_SHARD", False), ("NO_SHARD", True)]
)
def test_it_is_ddp_cut_into_shards(on_ranks, strategy, use_orig_params, codec, world_size):
    for stats in on_ranks(world_size, as_ddp, strategy, codec, use_orig_params):
        assert stats["steps"] == 4
        assert stats["coded_numel"] == 3 * 3 * 67 * 53
        returned = 2 if strategy == "NO_SHARD" else 1
        ring_bytes = returned * stats["raw_bytes"] * (world_size - 1) / world_size
        assert stats["ring_bytes"] == pytest.approx(ring_bytes, abs=100)
        assert stats["wire_bytes"] < stats["ring_bytes"]


def near_plain(strategy, **options):
    """FSDP1 without the hook beside it: types are equal, coded gradients near, the others the same but for rounding."""
    made = {"use_orig_params": True, **options}
    plain, model = flat(strategy, **made), flat(strategy, **made)
    terncomm.register(model, "int8")
    for each in (plain, model):
        backward(each, 0)
    wanted = whole(plain)
    for name, gradient in whole(model).items():
        assert gradient.dtype == wanted[name].dtype
        error = (gradient - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-6)
        if name in CODED:
            assert 1e-4 < error < 0.03, (name, float(error))
        else:
            assert error < 0.01, (name, float(error))


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
def test_every_strategy_with_a_hook(on_ranks, strategy):
    on_ranks(3, near_plain, strategy)


def mixed(dtype):
    near_plain("FULL_SHARD", mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mixed_precision(on_ranks, dtype):
    on_ranks(2, mixed, dtype)


def accumulated():
    """Gradients gathered under no_sync are reduced once."""
    model, once = flat(use_orig_params=True), flat(use_orig_params=True)
    state = terncomm.register(model, "terngrad", exempt=(), min_numel=10**9)
    words = [torch.randint(0, 50, (6, 3), generator=torch.Generator().manual_seed(n + dist.get_rank())) for n in (0, 9)]
    with model.no_sync():
        model(words[0]).square().mean().backward()
    model(words[1]).square().mean().backward()
    (once(words[0]).square().mean() + once(words[1]).square().mean()).backward()
    wanted = whole(once)
    for name, gradient in whole(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7)
    assert state.stats()["steps"] == 1


def test_accumulation(on_ranks):
    on_ranks(2, accumulated)


def named():
    """Every layer a unit of its own: names are the model's."""
    model = flat(use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({Block, nn.Linear}))
    state = terncomm.register(model, "terngrad", skip=["one.up.weight"])
    backward(model, 0)
    stats = state.stats()
    assert stats["coded_numel"] == 3 * 67 * 53
    told = {name.removeprefix("clip_norm_lost/") for name in stats if name.startswith("clip_norm_lost/")}
    assert told == {"one.down.weight", "two.up.weight", "two.down.weight"}


def test_names_are_the_models(on_ranks):
    on_ranks(2, named)


def partly_frozen():
    """What requires no gradient is not sent, and tied weights are one."""
    base = network()
    base.one.requires_grad_(False)
    base.two.down.requires_grad_(False)
    model = flat(model=base, use_orig_params=True)
    state = terncomm.register(model, "terngrad")
    backward(model, 0)
    stats = state.stats()
    assert stats["coded_numel"] == 67 * 53
    assert stats["exact_numel"] == 50 * 53 + 2 * 53 + 67 + 53 * 5 + 5 + 1


def test_frozen_parameters_are_not_sent(on_ranks):
    on_ranks(2, partly_frozen)


def thawed(whole_unit):
    """What is frozen later is left out; what was frozen at the start is compressed once it is thawed."""
    model = flat(use_orig_params=True)
    state = terncomm.register(model, "int8")
    backward(model, 0)
    model.one.requires_grad_(False)
    before = state.stats()["coded_numel"]
    backward(model, 1)
    assert state.stats()["coded_numel"] - before == 2 * 67 * 53
    base = network()
    (base.one if whole_unit else base.one.up).requires_grad_(False)
    late = flat(model=base, use_orig_params=True)
    state = terncomm.register(late, "int8")
    backward(late, 0)
    before = state.stats()["coded_numel"]
    late.one.requires_grad_(True)
    backward(late, 1)
    assert state.stats()["coded_numel"] - before == 4 * 67 * 53


@pytest.mark.parametrize("whole_unit", [True, False])
def test_parameters_that_are_thawed(on_ranks, whole_unit):
    on_ranks(2, thawed, whole_unit)


def around_parts():
    """Only the blocks are sharded: the head is still known for what it is, and coded layers are DDP's."""
    model, plain = network(), DistributedDataParallel(network())
    for name in ("one", "two"):
        setattr(model, name, flat(model=nn.Sequential(getattr(model, name)), use_orig_params=True))
    terncomm.register(plain, "int8", seed=3)
    state = terncomm.register(model, "int8", seed=3)
    backward(plain, 0)
    backward(model, 0)
    assert state.stats()["coded_numel"] == 4 * 67 * 53
    found = {n: g for block in (model.one, model.two) for n, g in whole(block).items()}
    assert found


def test_a_model_of_which_parts_are_sharded(on_ranks):
    on_ranks(2, around_parts)


def compiled(kind, register_first):
    quietly(_compiled)(kind, register_first)


def _compiled(kind, register_first):
    """torch.compile around a sharded model of either generation: gradients are those without it."""
    alone, model = [flat(use_orig_params=True) if kind == "FSDP1" else sharded() for _ in range(2)]
    terncomm.register(alone, "int8")
    if register_first:
        state = terncomm.register(model, "int8")
        fast = torch.compile(model, backend="aot_eager")
    else:
        fast = torch.compile(model, backend="aot_eager")
        state = terncomm.register(fast, "int8")
    for step in range(2):
        backward(alone, step)
        backward(fast, step)
    assert state.stats()["coded_numel"] == 2 * 4 * 67 * 53
    gathered = whole if kind == "FSDP1" else gathered_by_fsdp2
    wanted = gathered(alone)
    for name, gradient in gathered(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("register_first", [True, False])
@pytest.mark.parametrize("kind", ["FSDP1", "FSDP2"])
def test_compiled_models(on_ranks, kind, register_first):
    on_ranks(2, compiled, kind, register_first)


def resumed():
    """A run of four steps, and one that stops after two and goes on in a new model."""
    long, first, second = (flat(use_orig_params=True) for _ in range(3))
    a, b, c = (terncomm.register(model, "terngrad") for model in (long, first, second))
    for step in range(4):
        backward(long, step)
    for step in range(2):
        backward(first, step)
    c.load_state_dict(b.state_dict())
    for step in range(2, 4):
        backward(second, step)
    assert a.state_dict() == c.state_dict() == {"step": 3, "seed": 0, "enabled": True, "steps": [3, 3, 3]}
    wanted = whole(long)
    for name, gradient in whole(second).items():
        assert torch.equal(gradient, wanted[name]), name


def test_noise_goes_on_after_a_checkpoint(on_ranks):
    on_ranks(2, resumed)


def refusals():
    model = flat()
    terncomm.register(model, "int8")
    with pytest.raises(RuntimeError, match="the root already has a communication hook"):
        terncomm.register(model, "int8")
    with pytest.raises(TypeError, match=r"replicas= is for models of fully_shard"):
        terncomm.register(flat(), "int8", replicas=dist.group.WORLD)
    with pytest.raises(ValueError, match="matches no parameter"):
        terncomm.register(flat(), "int8", skip=["nothing"])
    groups = dist.group.WORLD, dist.new_group([dist.get_rank()], use_local_synchronization=True)
    hybrid = flat("HYBRID_SHARD", nn.Sequential(Block(40)), process_group=groups)
    with pytest.raises(TypeError, match="sharded by HYBRID_SHARD, for which FSDP1 has no communication hook"):
        terncomm.register(hybrid, "int8")


def test_what_is_not_taken(on_ranks):
    on_ranks(2, refusals)


def one_rank_fails():
    return failing(flat(), 1)


def test_a_rank_that_fails_is_named_to_the_others(on_ranks):
    assert "rank 1 failed in" in on_ranks(2, one_rank_fails)[0]
