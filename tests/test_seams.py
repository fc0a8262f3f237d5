"""What others may bring, each tried by one small real user of it: codecs."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from golden import Network, gradients
from laws import gaussian, same_bits
from seams import CODECS, BySign, Deflated, Lopsided, MinMax, by_hand
from seams import uniform as by_place
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm import Ternary
from terncomm.codecs import Codec, IntegerCodec, codec_for, uniform
from terncomm.codecs.base import Local
from terncomm.keys import Key
from terncomm.path import bucket as buckets
from terncomm.path.account import Context
from terncomm.path.bucket import EXCHANGES, Bucket
from terncomm.path.drivers import counted, lockstep
from terncomm.path.reduce import all_reduce_mean, reduce_scatter
from terncomm.path.shards import Shards
from terncomm.segments import Segments
from terncomm.wire import Narrow, packing_for

KEY = Key(5, step=3)
every_codec = pytest.mark.parametrize("codec", CODECS, ids=repr)


def averaged(groups, own, exchange="auto", key=KEY):
    """The mean of gradients (W, n), after a look whether all ranks hold the same bits."""
    bucket, flats = Bucket(groups), list(torch.zeros_like(own))  # gaps are left alone
    for flat, each in zip(flats, own, strict=True):
        for layers, _ in groups:
            layers.put(layers.take(each).clone(), flat)
    ranks = range(len(own))
    lockstep([all_reduce_mean(flats[r], bucket, Context(key, r, len(own)), exchange=exchange) for r in ranks])
    assert all(same_bits(flat, flats[0]) for flat in flats)
    return flats[0]


@pytest.mark.conformance
@every_codec
@pytest.mark.parametrize("world_size", [2, 3, 4, 5])
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("piece", [buckets.PIECE, 700])
def test_codecs_of_every_kind_are_what_they_are_by_hand(codec, world_size, exchange, piece, monkeypatch):
    """Whole, in rows and in several pieces; beside another codec and exact layers."""
    monkeypatch.setattr(buckets, "PIECE", piece)
    own = gaussian(world_size, 5011, seed=world_size) + 0.1
    layers = Segments([7, 3000, 1000], offsets=[0, 9, 3010], layers=[3, 6, 11])
    others = Segments([900], offsets=[4050], layers=[1]), Segments([60], offsets=[4951])
    groups = [(layers, codec), (others[0], Ternary()), (others[1], None)]
    mean = averaged(groups, own, exchange)
    for offset, size, layer in ((0, 7, 3), (9, 3000, 6), (3010, 1000, 11)):
        wanted = by_hand(codec, own[:, offset : offset + size], KEY, layer)
        assert same_bits(mean[offset : offset + size], wanted), layer
    alone = averaged([groups[1]], own)
    assert same_bits(mean[4050:4950], alone[4050:4950])


@every_codec
@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("of_mean", [True, False])
def test_codecs_of_every_kind_are_scattered(codec, world_size, of_mean):
    """As FSDP2 does it; sums come back exactly, for they do not come back."""
    sizes, numbers = [1009, 320, 3], [4, 7, 8]
    own = [gaussian(world_size, size, seed=size) + 0.1 for size in sizes]
    chunks = [-(-size // world_size) for size in sizes]
    shards = Shards.by_chunks(sizes, chunks, numbers, [codec, codec, None], world_size)
    rows = torch.cat(
        [
            torch.nn.functional.pad(each, (0, chunk * world_size - size)).view(world_size, world_size, chunk)
            for each, chunk, size in zip(own, chunks, sizes, strict=True)
        ],
        dim=2,
    )
    divisor = world_size if of_mean else 1.0
    outs = torch.full((world_size, shards.row), torch.nan)
    lockstep(
        [
            reduce_scatter(rows[r].flatten(), shards, Context(KEY, r, world_size), divisor=divisor, out=outs[r])
            for r in range(world_size)
        ]
    )
    parts = torch.split(outs, chunks, dim=1)
    for part, each, number, size in zip(parts[:2], own, numbers, sizes, strict=False):
        wanted = by_hand(codec, each, KEY, number, divisor=divisor, narrow=False)
        assert same_bits(part.flatten()[:size], wanted)


@every_codec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("exchange", ["gather", "two_phase"])
def test_what_is_not_finite_on_one_rank_spoils_its_layer_on_all(codec, bad, exchange):
    for world_size, rank in ((2, 0), (3, 2)):
        own = gaussian(world_size, 3000)
        own[rank, 1500] = bad
        mean = averaged([(Segments([1000, 1000, 1000]), codec)], own, exchange)
        assert not mean[1000:2000].isfinite().any()
        assert mean[:1000].isfinite().all()
        assert mean[2000:].isfinite().all()


@every_codec
def test_layers_that_are_zero_stay_zero(codec):
    own = gaussian(3, 900)
    own[:, 300:600] = 0
    mean = averaged([(Segments([300, 300, 300]), codec)], own)
    assert (mean[300:600] == 0).all()


@pytest.mark.parametrize("codec", [MinMax(), BySign(), Lopsided()], ids=repr)
def test_codecs_of_every_kind_are_unbiased(codec):
    own = gaussian(3, 400) + 0.3
    draws = torch.stack([averaged([(Segments([400]), codec)], own, key=Key(1, step)) for step in range(200)]).double()
    error = draws.mean(dim=0) - own.double().mean(dim=0)
    deviation = draws.std(dim=0).clamp(min=1e-6) / math.sqrt(200)
    assert abs((error / deviation).sum()) / 20 < 5
    assert (error / deviation).abs().max() < 6


def by_ddp(codec, world_size):
    model = DistributedDataParallel(Network(), bucket_cap_mb=0.01)
    terncomm.register(model, codec, seed=5)
    return [reduced(model) for _ in range(2)]


def by_fsdp(codec, world_size):
    model = Network()
    for module in (model.one, model.two, model):
        fully_shard(module)
    terncomm.register(model, codec, seed=5)
    return [{n: g.full_tensor() for n, g in reduced(model).items()} for _ in range(2)]


def reduced(model):
    model.zero_grad()
    model(gradients(0, dist.get_rank())).backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("codec", [MinMax(), BySign(), Lopsided()], ids=repr)
@pytest.mark.parametrize("engine", [by_ddp, by_fsdp])
def test_engines_take_a_codec_of_ones_own(on_ranks, codec, engine):
    world_size = 3
    by_rank = on_ranks(world_size, engine, codec, world_size)
    own = [gradients(0, rank) for rank in range(world_size)]
    for step in range(2):
        for number, name in enumerate(own[0]):
            found = [steps[step][name] for steps in by_rank]
            assert all(same_bits(each, found[0]) for each in found)
            layer = torch.stack([each[name].flatten() for each in own])
            if name in ("one.wide.weight", "two.wide.weight", "filter.weight"):
                wanted = by_hand(codec, layer, Key(5, step), number, narrow=engine is by_ddp)
                assert same_bits(found[0].flatten(), wanted), name


@pytest.mark.parametrize("world_size", [7, 8, 16, 33])
def test_sums_of_ternary_codes_return_in_4_bits(world_size):
    """Where that is fewer bytes. The error is that of rounding a sum once more: unbiased, less than a divisor."""
    n = 100_000
    own = gaussian(1, n).expand(world_size, -1) * torch.linspace(0.5, 1.5, world_size)[:, None]
    exact, narrow = Ternary(), Ternary(returned="int4")
    layers = Segments([n])

    def nbytes(codec):
        path = all_reduce_mean(torch.empty(n, device="meta"), Bucket([(layers, codec)]), Context(KEY, 0, world_size))
        return [call.nbytes for call in counted(path, world_size)]

    scale = torch.stack([exact.measure(each, layers) for each in own]).amax() / world_size
    for key in (KEY, Key(9)):
        sums = averaged([(layers, exact)], own, key=key).double() / scale
        back = averaged([(layers, narrow)], own, key=key).double() / scale
        if world_size < 8:
            assert same_bits(sums, back)
            assert nbytes(narrow) == nbytes(exact)
            continue
        assert sum(nbytes(narrow)) < sum(nbytes(exact))
        divisors = torch.ceil(torch.stack([p.abs().max() for p in sums.round().split(256)]) / 7).clamp(min=1)
        divisor = divisors.repeat_interleave(256)[:n]
        error = back - sums
        assert (error.abs() < divisor).all()
        assert (error.abs() > 0.5).any() == bool((divisors > 1).any())
        variance = ((divisor - sums.round() % divisor) * (sums.round() % divisor)).sum()
        assert abs(error.sum()) <= 5 * variance.sqrt() + 1e-3


def test_narrow_sums_of_ternary_codes_have_words_of_4_bits():
    assert packing_for(-7, 7).nbytes(1000) == 500
    with pytest.raises(ValueError, match="returned must be 'exact' or 'int4', got 'int8'"):
        Ternary(returned="int8")
    assert eval(repr(Ternary(returned="int4"))) == Ternary(returned="int4")
    assert repr(Ternary()) == "Ternary(clip=2.5)"


def calls_of(codec, own, exchange="auto"):
    """The messages of a reduction."""
    calls = []
    ranks, bucket = range(len(own)), Bucket([(Segments([own.shape[1]]), codec)])
    lockstep(
        [all_reduce_mean(own[r].clone(), bucket, Context(KEY, r, len(own)), exchange=exchange) for r in ranks],
        calls=calls,
    )
    return [tuple(call) for call in calls]


@pytest.mark.conformance
@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("piece", [buckets.PIECE, 700])
@pytest.mark.parametrize("returned", ["exact", "int4"])
def test_rows_may_differ_in_length(world_size, exchange, piece, returned, monkeypatch):
    """The same bits as without a byte coder, beside parts that do not vary, for rows of every density."""
    monkeypatch.setattr(buckets, "PIECE", piece)
    monkeypatch.setattr(Ternary, "narrowing", lambda self, w: Narrow(4) if returned == "int4" else None)
    own = gaussian(world_size, 6000, seed=world_size)
    own[0, :2000] = 0  # rows of zeros, of a single element, and such as zlib makes longer
    own[1:, 1000] = 3.0
    layers, second, exact = Segments([4000]), Segments([1500], offsets=[4000]), Segments([500], offsets=[5500])
    plain = averaged([(layers, Ternary()), (second, MinMax()), (exact, None)], own, exchange)
    short = averaged([(layers, Deflated()), (second, MinMax()), (exact, None)], own, exchange)
    assert same_bits(plain, short)


def test_lengths_go_first_and_rows_as_long_as_the_longest():
    own = gaussian(3, 60_000)
    own[:, 5000:] *= 1e-3  # few codes that are not zero
    rows, totals = [call[1] for call in calls_of(Ternary(), own, "two_phase")[1:]]
    _, lengths, few, again, back = calls_of(Deflated(), own, "two_phase")
    assert lengths == again == ("all_gather", 4)
    assert few[0] == "all_to_all"
    assert few[1] < rows / 2
    assert back[1] < totals / 2
    flat, bucket = torch.empty(60_000, device="meta"), Bucket([(Segments([60_000]), Deflated())])
    foretold = counted(all_reduce_mean(flat, bucket, Context(KEY, 0, 3), exchange="two_phase"), 3)
    assert [call.nbytes for call in foretold] == [256, 4, rows, 4, totals], "sizes without a byte coder"


def test_rows_of_different_lengths_are_scattered():
    outs = {}
    for codec in (Ternary(), Deflated()):
        shards = Shards.by_chunks([1000, 300], [500, 150], [0, 1], [codec, None], 2)
        flats, outs[codec] = gaussian(2, 1300), torch.zeros(2, shards.row)
        contexts = [Context(KEY, rank, 2) for rank in range(2)]
        flats[0, :250] = 0
        lockstep(
            [
                reduce_scatter(flat, shards, ctx, divisor=2, out=out)
                for flat, ctx, out in zip(flats, contexts, outs[codec], strict=True)
            ]
        )
    plain, short = outs.values()
    assert plain.any()
    assert same_bits(plain, short)


def by_ddp_with_statistics(codec):
    model = DistributedDataParallel(Network(), bucket_cap_mb=0.01)
    state = terncomm.register(model, codec, seed=5)
    return reduced(model), state.stats()


def test_lengths_are_counted_under_ddp(on_ranks):
    for (plain, before), (short, after) in zip(
        on_ranks(2, by_ddp_with_statistics, Ternary()), on_ranks(2, by_ddp_with_statistics, Deflated()), strict=True
    ):
        assert all(same_bits(mean, short[name]) for name, mean in plain.items())
        assert after["wire_bytes"] > 0
        assert after["wire_bytes/terngrad"] != before["wire_bytes/terngrad"]


def test_divisors_of_two_bytes_are_of_the_larger_end_of_an_alphabet():
    """10 codes of up to 200 in 4 bits: divisors are up to 286."""
    codec = MinMax(levels=200, bits=4)
    own = torch.cat([gaussian(10, 900), torch.full((10, 100), 4.0)], dim=1)
    for exchange in EXCHANGES:
        mean = averaged([(Segments([1000]), codec)], own, exchange)
        assert same_bits(mean, by_hand(codec, own, KEY, 0))


@dataclass(frozen=True)
class Wrong(IntegerCodec):
    """One plane of codes 0 to 3, and one statistic; each option makes one thing wrong."""

    name = "wrong"
    low: int = 0
    high: int = 3
    planes: int = 1
    shape: tuple = (1000,)
    dtype: torch.dtype = torch.int8
    code: int = 3
    statistics: tuple = (1,)
    kind: torch.dtype = torch.float32
    drops: bool = False

    @property
    def alphabet(self):
        return self.low, self.high

    def measure(self, flat, segments):
        return Local(torch.ones(self.statistics, dtype=self.kind))

    def agree(self, everyone):
        return everyone.amax() if self.drops else super().agree(everyone)

    def encode(self, flat, segments, local, shared, key, *, rank=0, world_size=1):
        return torch.full(self.shape, self.code, dtype=self.dtype)

    def decode(self, totals, segments, shared, divisor, *, ranks=1, begin=0, out):
        out[begin : begin + totals.shape[1]] = totals[0]
        return out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"code": 4}, r"Wrong\(.*\).encode: wanted codes in 0..3, got 4..4"),
        ({"code": -1}, r"encode: wanted codes in 0..3, got -1..-1"),
        ({"shape": (2, 1000)}, r"wanted 1 x 1000 integers \(planes is 1\), got shape \(2, 1000\), torch.int8"),
        ({"planes": 2}, r"wanted 2 x 1000 integers \(planes is 2\), got shape \(1000,\), torch.int8"),
        ({"shape": (999,)}, r"wanted 1 x 1000 integers \(planes is 1\), got shape \(999,\), torch.int8"),
        ({"dtype": torch.float32}, r"wanted 1 x 1000 integers .* torch.float32"),
        ({"statistics": (1, 2)}, r"measure: wanted \(L,\) or \(K, L\) torch.float32 with L = 1, got shape \(1, 2\)"),
        ({"kind": torch.int32}, r"measure: wanted .*, torch.int32"),
        ({"drops": True}, r"Wrong.agree: wanted shape \(1,\), torch.float32, got \(\), torch.float32"),
    ],
    ids=str,
)
def test_a_codec_that_does_not_do_what_it_says_is_refused(options, words):
    """It would give a wrong mean, the same on every rank."""
    flats = [torch.zeros(1000) for _ in range(2)]

    def reduce(codec):
        bucket = Bucket([(Segments([1000]), codec)])
        lockstep([all_reduce_mean(flat, bucket, Context(KEY, rank, 2)) for rank, flat in enumerate(flats)])

    with pytest.raises(ValueError, match=words):
        reduce(Wrong(**options))
    assert not any(flat.any() for flat in flats)
    reduce(Wrong())
    assert all((flat == 6).all() for flat in flats)


def test_a_codec_is_a_frozen_dataclass():
    """Its repr is what ranks compare: it must not be an address, nor lack an option."""

    class Bare(Wrong):
        pass

    @dataclass
    class Melts(Codec):
        name = "melts"

    for made in (Bare(), Melts()):
        with pytest.raises(TypeError, match=rf"codec: {type(made).__name__} must be a frozen dataclass itself"):
            codec_for(made)


def test_uniform_noise_is_that_of_the_place_in_the_layer():
    layers = Segments([300, 2000], offsets=[5, 400], layers=[4, 9])
    noise = uniform(layers, KEY, rank=1, world_size=3, device=torch.device("cpu"))
    assert noise.dtype == torch.float32
    assert noise.shape == (2300,)
    for layer, part in ((4, noise[:300]), (9, noise[300:])):
        assert torch.equal(part.double(), by_place(KEY, layer, len(part), 1, 3))
