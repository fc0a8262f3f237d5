"""What the suites of other systems ask of them, asked here: PyTorch, CGX, torchft, DeepSpeed, LoongForge, hivemind.

Most is property tests of the path over threads; what needs DDP runs on ranks. The simulation below is written from the
documentation alone and shares no code with the library.
"""

import copy
import io
import pickle

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
from laws import gaussian, reduce, same_bits
from oracle import CODECS, MANY, SEED, Twins, batch, check, loss_of, made, same
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm import CommState, Int8, Ternary
from terncomm.codecs import codec_for
from terncomm.keys import Key
from terncomm.reduce import all_reduce_mean
from terncomm.segments import Segments
from terncomm.transports import LocalTransport

pytestmark = pytest.mark.conformance


def steps_off(codec, world_size):
    """By how many steps (scale / levels) the mean may be wrong."""
    return 2 if isinstance(codec, Int8) and codec.returned == "int8" and world_size > 2 else 1


def block_steps(codec, rows):
    """(W, n) gradients of one layer -> (n,) float64: the step of each element's block, from its definition."""
    n = rows.shape[1]
    block = min(getattr(codec, "block", None) or n, n)
    peak = nn.functional.pad(rows.double().abs().amax(0), (0, -n % block)).view(-1, block).amax(1)
    return peak.repeat_interleave(block)[:n] / codec.levels


# ---- a simulation of the packed path (DeepSpeed: tests/onebit) -------------------------------------------------------

M64, M32 = 2**64 - 1, 2**32 - 1


def splitmix(x):
    """Steele, Lea, Flood 2014."""
    x = (x + 0x9E3779B97F4A7C15) & M64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def noise(n, seed, step, layer, rank, world_size):
    """(n,) uint64 of 24 bits."""
    state = splitmix(seed)
    for word in (step, rank, world_size):
        state = splitmix(state ^ word)
    mixed = splitmix(splitmix(layer) ^ state)
    counter = np.arange(n, dtype=np.uint64)
    a = (counter * 0x9E3779B9 + (mixed & M32)) & M32
    b = (counter * 0xBB67AE85 + (mixed >> 32)) & M32
    x = a ^ (b >> 8)
    x = ((x ^ (x >> 16)) * 0x21F0AAAD + b) & M32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & M32
    return (x ^ (x >> 15)) >> 8


def simulated(rows, codec, *, seed, step, layer):
    """(W, n) float32 gradients of one layer -> their mean as the packed path has it, (n,) float32, in numpy."""
    rows = rows.numpy()
    world_size, n = rows.shape
    levels = 1 if isinstance(codec, Ternary) else 127
    block = getattr(codec, "block", None) or n
    out = np.zeros(n, np.float32)
    chances = [noise(n, seed, step, layer, rank, world_size) for rank in range(world_size)]
    shared_chance = noise(n, seed, step, layer, M32, world_size)
    for begin in range(0, n, block):
        part = slice(begin, min(begin + block, n))
        limits = []
        for row in rows[:, part]:
            limit = np.abs(row).max()
            if getattr(codec, "clip", None):
                mean = row.sum(dtype=np.float64) / len(row)
                sigma = np.sqrt(max((row.astype(np.float64) ** 2).sum() / len(row) - mean**2, 0))
                if sigma > abs(mean) / 256:  # else there is no spread to clip by
                    limit = min(limit, np.float32(codec.clip * sigma))
            limits.append(limit)
        scale = max(limits)
        if scale == 0:
            continue
        factor = np.float32(levels * 2.0**24 / float(scale))
        if float(factor) * float(scale) < levels * 2.0**24:
            factor = np.nextafter(factor, np.float32(np.inf))
        total = np.zeros(part.stop - begin, np.int64)
        for row, limit, chance in zip(rows[:, part], limits, chances, strict=True):
            fixed = np.minimum((np.minimum(np.abs(row), limit) * factor).astype(np.int64), levels << 24)
            total += np.where(row < 0, -1, 1) * ((fixed + chance[part].astype(np.int64)) >> 24)
        if levels == 127 and codec.returned == "int8" and world_size > 2:
            for first in range(0, len(total), 256):
                piece = total[first : first + 256]
                divisor = max(1, -(-np.abs(piece).max() // 127))
                lift = (shared_chance[part][first : first + 256].astype(np.int64) * divisor) >> 24
                piece[:] = (piece + lift) // divisor * divisor
        out[part] = (total * (float(scale) / (levels * world_size))).astype(np.float32)
    return torch.from_numpy(out)


SIMULATED = [Ternary(clip=None), Ternary(clip=2.5), Int8(), Int8(block=300), Int8(block=512, returned="exact")]


@pytest.mark.parametrize("codec", SIMULATED, ids=repr)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("exchange", ["gather", "two_phase"])
def test_packed_path_equals_a_simulation(world_size, codec, exchange):
    sizes, layers = [1000, 1, 4096, 0, 2500], [4, 0, 7, 2, 3]
    rows = gaussian(world_size, sum(sizes)) * torch.linspace(0.2, 3.0, world_size)[:, None]
    rows[:, 1001:1100] *= 5
    rows = (rows * 8).round() / 512  # sums of these are exact, in whatever order they are taken
    key = Key(11, 6)
    flat = reduce(codec, rows, Segments(sizes, layers=layers), key=key, exchange=exchange)
    for mine, layer, piece in zip(flat.split(sizes), layers, rows.split(sizes, dim=1), strict=True):
        if mine.numel():
            expected = simulated(piece, codec, seed=11, step=6, layer=layer)
            assert torch.equal(mine, expected), (layer, (mine != expected).sum())


class Constant(nn.Module):
    """Weights whose gradients are what it is called with."""

    def __init__(self, *shapes):
        super().__init__()
        self.weights = nn.ParameterList([torch.ones(shape) for shape in shapes])

    def forward(self, *gradients):
        return sum((w * g).sum() for w, g in zip(self.weights, gradients, strict=True))


SHAPES = [(40, 40), (3, 700), (2048, 1), (64, 65)]


def own_of(step, rank):
    draw = torch.Generator().manual_seed(100 * step + rank)
    return [(torch.randn(shape, generator=draw) * 8 * (1 + rank)).round() / 256 for shape in SHAPES]


def through_ddp(codec, steps):
    """Gradients as given, reduced by the hook in several buckets."""
    twins = Twins(made(Constant, *SHAPES), codec)
    for step in range(steps):
        twins.step(lambda model: model(*own_of(step, dist.get_rank())).backward())
    return [ours for _, ours in twins.told]


@pytest.mark.parametrize(("world_size", "codec"), [(2, "terngrad"), (3, "terngrad"), (2, "int8"), (3, "int8")])
def test_hook_equals_a_simulation(on_ranks, world_size, codec):
    told = on_ranks(world_size, through_ddp, codec, 3)
    for step in range(3):
        own = [own_of(step, rank) for rank in range(world_size)]
        for layer, shape in enumerate(SHAPES):
            rows = torch.stack([row[layer].flatten() for row in own])
            expected = simulated(rows, codec_for(codec), seed=SEED, step=step, layer=layer).view(shape)
            for ours in told:
                assert torch.equal(ours[step][layer], expected), (step, layer)


# ---- PyTorch: parity on constant gradients, pickling -----------------------------------------------------------------


def parity(codec, alike):
    """100 steps in which all elements of a gradient are alike: is each their mean, and as plain DDP has it?"""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    plain = DistributedDataParallel(made(Constant, (40, 40), (1200, 1)), bucket_cap_mb=MANY)
    model = DistributedDataParallel(made(Constant, (40, 40), (1200, 1)), bucket_cap_mb=MANY)
    state = terncomm.register(model, codec, exempt=())
    right, plainly = [], []
    for step in range(100):
        sizes = [0.3 * (step + 1), -0.007 * (step + 1)] if alike else [float(rank), -0.25 * rank]
        mean = sizes if alike else [0.5 * (world_size - 1), -0.125 * (world_size - 1)]
        for one in (plain, model):
            one.zero_grad()
            one(*sizes).backward()
        ours = oracle.gradients(model.module)
        right.append(all(torch.equal(g, torch.full_like(g, m)) for g, m in zip(ours, mean, strict=True)))
        plainly.append(same(ours, oracle.gradients(plain.module)))
    return right, plainly, state.stats()["coded_numel"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("world_size", "alike"), [(2, False), (2, True), (3, True)])
def test_parity_on_constant_gradients(on_ranks, world_size, codec, alike):
    for right, plainly, coded in on_ranks(world_size, parity, codec, alike):
        assert right == [True] * 100
        assert plainly == [True] * 100 or world_size == 3  # plain DDP adds thirds there
        assert coded == 100 * 2800


def train_on(model, steps):
    for step in steps:
        model.zero_grad()
        loss_of(model(batch(step))).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.3 * p.grad


def continued(codec, how, named):
    """Ten steps by a state; the last five again by a copy made after five. Parameters of both, and of the copy more."""
    network = made()
    model = DistributedDataParallel(network, bucket_cap_mb=MANY)
    options = {"named_parameters": network.named_parameters()} if named else {}
    state = CommState(codec, seed=SEED, **options)
    model.register_comm_hook(state, terncomm.comm_hook)
    train_on(model, range(5))
    if how == "pickle with the model":
        twin, copied = pickle.loads(pickle.dumps((network, state)))
    elif how == "deepcopy with the model":
        twin, copied = copy.deepcopy((network, state))
    elif how == "state_dict":
        file = io.BytesIO()
        torch.save({"model": network.state_dict(), "hook": state.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        twin = made()
        twin.load_state_dict(saved["model"])
        options = {"named_parameters": twin.named_parameters()} if named else {}
        copied = CommState(codec, seed=SEED, **options)
        copied.load_state_dict(saved["hook"])
    else:
        twin = copy.deepcopy(network)
        copied = pickle.loads(pickle.dumps(state)) if how == "pickle" else copy.deepcopy(state)
    train_on(model, range(5, 10))
    again = DistributedDataParallel(twin, bucket_cap_mb=MANY)
    again.register_comm_hook(copied, terncomm.comm_hook)
    try:
        train_on(again, range(5, 10))
    except Exception as error:
        return repr(error)
    return [[p.detach() for p in one.parameters()] for one in (network, twin)], copied.state_dict(), copied.stats()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_named_state_copied_without_its_model_says_so(on_ranks, how):
    for told in on_ranks(2, continued, "int8", how, True):
        assert "this CommState was copied or pickled without its model" in told
        assert "load_state_dict(old.state_dict())" in told


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("state_dict", True),
        ("deepcopy with the model", True),
        ("pickle with the model", True),
        ("state_dict", False),
        ("deepcopy with the model", False),
        ("pickle with the model", False),
    ],
    ids=lambda value: value if isinstance(value, str) else "named" if value else "unnamed",
)
@pytest.mark.parametrize("codec", CODECS)
def test_a_saved_state_continues_identically(on_ranks, how, named, codec):
    told = on_ranks(2, continued, codec, how, named)
    assert not any(isinstance(rank, str) for rank in told), told[0]
    for (through, again), saved, stats in told:
        assert saved == {"step": 9, "seed": SEED, "enabled": True}
        assert (stats["steps"], stats["coded_numel"]) == (5, 5 * (7 * 1600 + 1200))
        assert same(through, told[0][0][0])
        assert same(again, through), "the copy went another way"


# ---- CGX: constants and ramps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 8, 128, 1024, 100_000])
@pytest.mark.parametrize("codec", [Ternary(), Ternary(clip=None), Int8(), Int8(block=64)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_constants_are_exact(codec, n, dtype):
    for value in (1.0, -0.375, 24.0):
        rows = torch.full((3, n), value, dtype=dtype)
        mean = reduce(codec, rows, Segments([n]))
        assert mean.dtype == dtype
        assert torch.equal(mean, rows[0])


@pytest.mark.parametrize("n", [1, 2, 8, 128, 1000, 30_001])
@pytest.mark.parametrize(
    "codec", [Ternary(clip=None), Int8(), Int8(block=64), Int8(block=512, returned="exact"), Int8(block=None)], ids=repr
)
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ramps_are_within_a_step(world_size, codec, n):
    rows = torch.arange(n, dtype=torch.float32) * torch.arange(1.0, world_size + 1)[:, None] - n / 3
    error = (reduce(codec, rows, Segments([n]), key=n).double() - rows.double().mean(0)).abs()
    bound = steps_off(codec, world_size) * block_steps(codec, rows)
    assert (error <= bound * (1 + 1e-6)).all()
    if n >= 1000:  # and not by rounding alone: the bound is of the right size
        assert (error / bound).max() > 0.2


# ---- torchft, hivemind: how wrong the mean is ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("times", [1, 100, 1000])
@pytest.mark.parametrize("sizes", [[4096], [2048, 2048], [512] * 8, [3, 129, 2048, 70]], ids=str)
def test_mean_relative_difference_of_int8(sizes, times, dtype):
    for world_size in (2, 4):
        draw = torch.Generator().manual_seed(world_size)
        rows = (torch.rand(world_size, sum(sizes), generator=draw) * times).to(dtype)
        exact = rows.double().mean(0)
        mean = reduce(Int8(), rows, Segments(sizes)).double()
        assert ((mean - exact).abs() / exact.abs()).mean() < 0.04
        assert abs((mean - exact).mean()) < 0.002 * exact.mean(), "biased"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_squared_error_of_int8_is_that_of_stochastic_rounding(world_size):
    codec = Int8(returned="exact")
    rows = gaussian(world_size, 200_000)
    error = (reduce(codec, rows, Segments([rows.shape[1]])) - rows.mean(0)).double() / block_steps(codec, rows)
    assert 0.97 < 6 * world_size * error.square().mean() < 1.03  # f (1 - f) of a step, f uniform; nearest has half
    assert abs(error.mean()) < 5 * (6 * world_size * len(error)) ** -0.5


@pytest.mark.parametrize("codec", ["terngrad", "int8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_types_and_shapes_come_back(codec, dtype):
    for shape in ([], [0], [1], [1, 1], [0, 3], [7, 11, 13], [3, 1, 5]):
        one = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        for requires_grad in (False, True):
            source = one.clone().requires_grad_(requires_grad)

            def work(transport, source=source):
                flat = source.detach().flatten().clone()
                done = all_reduce_mean(flat, Segments([flat.numel()]), codec_for(codec), transport, key=1)
                assert done.data_ptr() == flat.data_ptr(), "the result is not in the buffer"
                return done.view(source.shape)

            for mean in LocalTransport.run(2, work):
                assert (mean.dtype, mean.shape, mean.requires_grad) == (dtype, one.shape, False)
                assert mean.numel() != 1 or same_bits(mean, one), "one element is its own scale"
            assert source.requires_grad == requires_grad
            assert same_bits(source.detach(), one)


# ---- LoongForge: sizes and magnitudes --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 255, 257, 16383, 16384, 16385])
@pytest.mark.parametrize("magnitude", [1e-42, 1e-38, 1e-6, 1e-3, 1.0, 1e4, 1e37])
@pytest.mark.parametrize("codec", [Ternary(clip=None), Int8()], ids=repr)
def test_sizes_and_magnitudes(codec, magnitude, n):
    for world_size in (2, 3):
        rows = (gaussian(world_size, n, seed=n).double() * magnitude).float()
        rows[0, : n // 7] = 0
        mean = reduce(codec, rows, Segments([n]), key=3)
        assert same_bits(mean, reduce(codec, rows, Segments([n]), key=3)), "another result the second time"
        assert n < 255 or not same_bits(mean, reduce(codec, rows, Segments([n]), key=4)), "the same noise in each step"
        bound = steps_off(codec, world_size) * block_steps(codec, rows) * (1 + 1e-6) + 2e-45
        assert ((mean.double() - rows.double().mean(0)).abs() <= bound).all()
        assert mean.any() or not rows.any()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("codec", [Ternary(), Int8(), Int8(block=512)], ids=repr)
def test_what_is_not_finite_stays_so(codec, bad):
    for rank in range(3):
        rows = gaussian(3, 5000)
        rows[rank, 2100] = bad
        mean = reduce(codec, rows, Segments([2000, 2000, 1000]))
        block = getattr(codec, "block", None) or 2000
        begin = 2000 + 100 // block * block
        assert not mean[begin : min(begin + block, 4000)].isfinite().any()
        assert mean[:begin].isfinite().all()
        assert mean[min(begin + block, 4000) :].isfinite().all()


def odd_shapes(codec):
    """Parameters of no element, of one, and of odd sizes; all but vectors are coded."""
    shapes = [(0, 40), (1, 1), (3, 5), (40, 0), (7, 11, 13), (1031, 1), (1, 1031), (0,), (1,), ()]
    network = made(Constant, *shapes)
    alone = copy.deepcopy(network)
    model = DistributedDataParallel(network, bucket_cap_mb=0.001)
    state = terncomm.register(model, codec, min_numel=0, exempt=(), seed=SEED)
    told = []
    for step in range(3):
        draw = torch.Generator().manual_seed(10 * step + dist.get_rank())
        own = [torch.randn(shape, generator=draw) for shape in shapes]
        for one in (alone, model):
            one.zero_grad()
            one(*own).backward()
        told.append((oracle.gradients(alone), oracle.gradients(network)))
    return told, state.stats()


@pytest.mark.parametrize("codec", CODECS)
def test_parameters_of_no_and_of_one_element(on_ranks, codec):
    told = on_ranks(3, odd_shapes, codec)
    check([steps for steps, _ in told], codec, min_numel=0)
    for _, stats in told:
        assert (stats["coded_numel"], stats["exact_numel"]) == (3 * (15 + 1001 + 1031), 3 * (1031 + 3))
