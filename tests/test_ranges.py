"""Gradients in float64 and float16 that codes cannot represent are averaged without a codec, and that is told."""

import warnings

import pytest
import torch
from torch import nn

import terncomm
from terncomm import Int8, Ternary
from terncomm.keys import Key
from terncomm.path.account import Context
from terncomm.path.bucket import Bucket
from terncomm.path.drivers import lockstep
from terncomm.path.reduce import all_reduce_mean, reduce_scatter
from terncomm.path.shards import Shards
from terncomm.segments import Segments
from terncomm.transports import LocalTransport

KEY = Key(7, 3, 0)
SIZE = 5000
CODECS = [Ternary(), Ternary(clip=None), Int8(), Int8(block=None)]


def gradients(dtype, *magnitudes, world_size=3):
    """(W, layers * SIZE): one layer for each magnitude."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor(magnitudes, dtype=torch.float64).repeat_interleave(SIZE)
    uniform = torch.rand(world_size, len(scale), generator=generator, dtype=torch.float64)
    return ((2 * uniform - 1) * scale).to(dtype)


def layers(*numbers):
    """Some of the layers, of which each has SIZE elements."""
    return Segments([SIZE] * len(numbers), offsets=[SIZE * number for number in numbers], layers=list(numbers))


def reduced(bucket, own, exchange="auto"):
    """The buffers of all ranks, and the layers that were outside."""
    flats = list(own.clone())
    contexts = [Context(KEY, rank, len(own)) for rank in range(len(own))]
    told = lockstep([all_reduce_mean(f, bucket, c, exchange=exchange) for f, c in zip(flats, contexts, strict=True)])
    assert len(set(told)) == 1
    assert all(torch.equal(flat.view(torch.int16), flats[0].view(torch.int16)) for flat in flats)
    return flats[0], told[0]


@pytest.mark.parametrize("exchange", ["gather", "two_phase"])
@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_float64_outside_the_range_of_float32_is_exact(codec, exchange):
    own = gradients(torch.float64, 1.0, 1e300, 1e-3, 1e-60)
    found, outside = reduced(Bucket([(layers(0, 1, 2, 3), codec)]), own, exchange)
    assert outside == {1, 3}
    wanted, none = reduced(Bucket([(layers(0, 2), codec), (layers(1, 3), None)]), own, exchange)
    assert not none
    assert torch.equal(found, wanted)
    torch.testing.assert_close(found.view(4, SIZE)[1::2], own.mean(dim=0).view(4, SIZE)[1::2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_all_layers_may_be_outside(codec):
    own = gradients(torch.float64, 1e-200, 1e200)
    found, outside = reduced(Bucket([(layers(0, 1), codec)]), own)
    assert outside == {0, 1}
    torch.testing.assert_close(found, own.mean(dim=0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_zeros_and_small_blocks_stay_inside(codec):
    own = gradients(torch.float64, 1.0, 0.0)
    own[:, :2100] = 1e-60  # a block of a layer
    own[:, 10] = 0.0
    assert reduced(Bucket([(layers(0, 1), codec)]), own)[1] == frozenset()


def test_a_rank_alone_may_have_tiny_gradients():
    own = gradients(torch.float64, 1.0)
    own[1] *= 1e-60
    found, outside = reduced(Bucket([(layers(0), Ternary())]), own)
    assert not outside
    assert found.any()


def test_what_is_not_finite_is_so_where_it_was():
    own = gradients(torch.float64, 1.0, 1.0)
    own[1, 3] = torch.nan
    found, outside = reduced(Bucket([(layers(0, 1), Ternary())]), own)
    assert outside == {0}
    assert found.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_small_gradients_in_float16_are_not_biased(codec):
    own = gradients(torch.float16, 1.0, 1e-6)
    found, outside = reduced(Bucket([(layers(0, 1), codec)]), own)
    assert outside == {1}
    assert torch.equal(found[SIZE:], own[:, SIZE:].float().mean(dim=0).half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_are_always_coded(dtype):
    assert reduced(Bucket([(layers(0, 1), Ternary())]), gradients(dtype, 1e30, 1e-30))[1] == frozenset()


@pytest.mark.parametrize("codec", [Ternary(), Int8(returned="exact")], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_shards_are_treated_alike(dtype, codec):
    world_size = 3
    own = gradients(dtype, 1.0, 1e-7 if dtype == torch.float16 else 1e-60, 1.0)
    row = own.shape[1] // world_size
    offsets = [SIZE * number for number in range(3)]
    shards = Shards.in_a_row([SIZE] * 3, offsets, [0, 1, 2], [codec, codec, None], row, world_size)
    wanted, _ = reduced(Bucket([(layers(0, 1), codec), (layers(2), None)]), own)

    def path(rank):
        out = torch.empty(row, dtype=dtype)
        told = yield from reduce_scatter(own[rank], shards, Context(KEY, rank, world_size), divisor=3, out=out)
        return told, out

    for rank, (told, out) in enumerate(lockstep([path(rank) for rank in range(world_size)])):
        assert told == {1}
        assert torch.equal(out, wanted[rank * row : (rank + 1) * row])
    assert shards.numel_of(frozenset({1, 2})) == SIZE


def test_layers_of_no_element_are_no_trouble():
    own = gradients(torch.float16, 1e-6)
    bucket = Bucket([(Segments([SIZE, 0]), Int8())])
    assert reduced(bucket, own)[1] == {0}


def test_it_is_told_once_by_name_and_counted():
    def work(transport):
        weights = {name: nn.Parameter(torch.zeros(64, 64, dtype=torch.float64)) for name in ("tiny", "usual")}
        averager = terncomm.GradientAverager(weights.items(), "terngrad", transport, exempt=())
        for _ in range(2):
            weights["tiny"].grad = torch.full((64, 64), 1e-60, dtype=torch.float64)
            weights["usual"].grad = torch.full((64, 64), 1.0, dtype=torch.float64)
            averager.reduce()
        stats = averager.stats()
        assert stats["coded_numel"] == stats["exact_numel"] == 2 * 64 * 64
        return weights["tiny"].grad

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        mean, _ = LocalTransport.run(2, work)
    assert (mean == 1e-60).all()
    (text,) = [str(each.message) for each in told if "tiny" in str(each.message)]
    assert text == (
        "the gradient of tiny in torch.float64 is not finite, or outside the range of float32, in which codes are "
        "made. In such a step it is averaged uncompressed"
    )
