"""The Numba kernels equal the plain-torch definition bit for bit."""

import math

import pytest
import torch
from laws import gaussian, same_bits

from terncomm.keys import Key
from terncomm.ops import cpu, reference
from terncomm.segments import Segments
from terncomm.wire import packing_for

SIZES = [
    [1], [63], [64], [65], [319], [320], [321], [4095], [4096], [4097], [10_000],
    [0, 5, 0, 64, 1000, 3], [0], [2048, 2048, 100], [1023, 4096 * 3 + 7, 2],
]  # fmt: skip
FILLS = ["normal", "zero", "constant", "huge", "denormal", "outlier", "nan", "inf", "-inf", "clipped"]


def filled(n: int, fill: str) -> torch.Tensor:
    flat = gaussian(n, seed=n)
    if n == 0 or fill == "normal":
        return flat
    match fill:
        case "zero":
            flat.zero_()
        case "constant":
            flat.fill_(0.3)
        case "huge":
            flat *= 1e38
        case "denormal":
            flat *= 1e-41
        case "outlier":
            flat[n // 2] = 1e20
        case "clipped":
            flat = flat.sign() * 5
        case bad:
            flat[n // 2] = float(bad)
    return flat


def gapped(sizes: list[int]) -> Segments:
    offsets, at = [], 0
    for i, size in enumerate(sizes):
        at += i % 3
        offsets.append(at)
        at += size
    return Segments(sizes, offsets=offsets, layers=range(10, 10 + len(sizes)))


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request, monkeypatch):
    monkeypatch.setattr(cpu, "_PIECE", 256)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


OTHER_TYPES = [(fill, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64) for fill in FILLS[:2]]


@pytest.mark.parametrize(("fill", "dtype"), [(fill, torch.float32) for fill in FILLS] + OTHER_TYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("threads")
def test_kernels_equal_the_reference(sizes, fill, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "_SCRATCH", 1000)
    layers = gapped(sizes)
    flat = filled(layers.extent + 2, fill).to(dtype)
    found, wanted = cpu.moments(flat, layers), reference.moments(flat, layers)
    assert same_bits(found[0], wanted[0])
    finite = wanted[0].isfinite()
    assert same_bits(found[1][finite], wanted[1][finite])
    assert same_bits(found[2][finite], wanted[2][finite])
    limit = reference.clip_limit(*wanted, layers.lengths, 2.5)

    blocks = layers.blocks(2048)
    for segments, local, levels in ((layers, limit, 1), (blocks, reference.peaks(flat, blocks), 127)):
        assert same_bits(cpu.peaks(flat, segments), reference.peaks(flat, segments))
        keys = Key(5, 6).streams(segments.layers, rank=1, world_size=4)
        how = reference.rounding(local, local, keys, levels)
        codes = reference.encode(flat, segments, how)
        assert same_bits(cpu.encode(flat, segments, how), codes)
        for world_size in (1, 2, 3, 4, 8):
            packing = packing_for(-levels * world_size, levels * world_size)
            rows = [reference.pack(codes, packing), reference.pack(-codes, packing)] * 2
            assert same_bits(cpu.pack(codes, packing), rows[0])
            rows = torch.stack(rows[:3])
            assert same_bits(cpu.unpack_sum(rows, packing, len(codes)), reference.unpack_sum(rows, packing, len(codes)))
            unit = reference.split_unit(local.double() / (levels * world_size))
            for row_count in (1, 3):
                outs = [torch.full_like(flat, 7.0) for _ in range(2)]
                for ops, out in zip((cpu, reference), outs, strict=True):
                    where = (packing, segments, unit, 0, len(codes), len(codes), out)
                    ops.unpack_decode(rows[:row_count], *where)
                assert same_bits(*outs)
            third = len(codes) // 3
            for begin, length in ((0, len(codes)), (third, third + 7), (len(codes), 3)):
                packed = [torch.empty(packing.nbytes(length), dtype=torch.uint8) for _ in range(2)]
                for ops, out in zip((cpu, reference), packed, strict=True):
                    ops.encode_pack(flat, segments, how, packing, begin, length, out)
                assert same_bits(*packed)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_narrow_and_widen_equal_the_reference(sizes):
    window = Segments(sizes).blocks(100)
    totals = torch.randint(-127 * 9, 127 * 9 + 1, (window.numel,), generator=torch.Generator().manual_seed(1))
    totals[: window.numel // 2] //= 20
    keys = Key(1).streams(window.layers, rank=9, world_size=9)
    wanted = reference.narrow(totals.int(), window, keys)
    found = cpu.narrow(totals.int(), window, keys)
    assert same_bits(found[0], wanted[0])
    assert same_bits(found[1], wanted[1])
    back = reference.widen(*[wanted[0], window, wanted[1]])
    assert same_bits(cpu.widen(wanted[0], window, wanted[1]), back)
    each = torch.repeat_interleave(wanted[1], window.lengths)
    assert ((back - totals).abs() < each.clamp(min=1)).all(), "narrowing is off by less than a divisor"
    assert same_bits(back[each == 1], totals.int()[each == 1]), "sums that fit 8 bits return exactly"


def test_narrow_is_unbiased():
    window = Segments([500])
    totals = torch.randint(-127 * 8, 127 * 8 + 1, (500,), generator=torch.Generator().manual_seed(2)).int()
    totals[0] = 127 * 8
    mean = torch.zeros(500, dtype=torch.float64)
    draws = 2000
    for step in range(draws):
        codes, divisor = cpu.narrow(totals, window, Key(0, step).streams(window.layers, rank=9, world_size=8))
        mean += cpu.widen(codes, window, divisor) / draws
    error = (mean - totals).abs()
    assert error.max() < 5.5 * 8 / 2 / math.sqrt(draws)
    assert error.max() > 0, "nothing was rounded: the test tests nothing"


@pytest.mark.parametrize("fill", ["normal", "outlier", "denormal", "huge"])
def test_limit_is_the_published_one(fill):
    """min(max|g|, c sigma), sigma with the mean removed and divided by n, against float64."""
    flat = filled(10_007, fill) + (0.2 if fill == "normal" else 0)
    layers = Segments([10_007])
    limit = reference.clip_limit(*cpu.moments(flat, layers), layers.lengths, 2.5)
    wanted = min(flat.abs().max().item(), 2.5 * flat.double().std(correction=0).item())
    assert limit.item() == pytest.approx(wanted, rel=1e-5, abs=2e-45)


def test_the_largest_magnitude_always_takes_the_largest_code():
    scales = torch.cat([torch.logspace(-45, 38, 4001), torch.tensor([1e-45, 3.4e38, 1 / 3, 0.7])])
    layers = Segments([1] * len(scales))
    for levels in (1, 127):
        for step in range(3):
            keys = Key(0, step).streams(layers.layers, rank=0, world_size=1)
            how = reference.rounding(scales, scales, keys, levels)
            product = how.scale.double() * (scales * how.lift).double()
            assert (product >= levels * 2**24)[scales > 0].all(), "rounded down, one code in 2^24 would be too small"
            codes = cpu.encode(scales, layers, how)
            assert (codes == levels)[scales > 0].all()


def test_decode_rounds_once():
    """Total * scale / (levels W) correctly rounded: an exact mean comes out exact, whatever W."""
    for world_size in range(1, 10):
        scale = gaussian(64, seed=world_size).abs() + 1e-3
        layers = Segments([2 * world_size + 1] * 64)
        totals = torch.arange(-world_size, world_size + 1, dtype=torch.int32).repeat(64)
        out = torch.empty(len(totals))
        cpu.decode(totals, layers, reference.split_unit(scale.double() / world_size), 0, out)
        wanted = (totals.double() * scale.double().repeat_interleave(2 * world_size + 1) / world_size).float()
        assert same_bits(out, wanted)
