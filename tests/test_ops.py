"""Every back end of the kernels equals the plain-torch definition bit for bit."""

import logging
import math
import sys
import tempfile
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from laws import gaussian, same_bits

from terncomm import ops
from terncomm.keys import Key
from terncomm.ops import Rounding, caching, cpu, reference, shapes
from terncomm.segments import Segments
from terncomm.wire import Packing, packing_for

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


class Elsewhere:
    """The functions of `terncomm.ops` on another device, called with tensors of the host."""

    def __init__(self, device: str) -> None:
        self._device = device

    def _there(self, argument):
        if isinstance(argument, Rounding):
            return Rounding(*map(self._there, argument))
        return argument.to(self._device) if isinstance(argument, torch.Tensor) else argument

    def __getattr__(self, name):
        def call(*arguments):
            there = [self._there(argument) for argument in arguments]
            found = getattr(ops, name)(*there)
            if found is None:  # it writes to its last argument
                arguments[-1].copy_(there[-1])
                return None
            return found.cpu() if isinstance(found, torch.Tensor) else tuple(part.cpu() for part in found)

        return call


CUDA = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *CUDA])
def kernels(request):
    """A back end: everything that can be compared with the reference."""
    return cpu if request.param == "cpu" else Elsewhere(request.param)


def split(n: int, count: int) -> list[int]:
    """Edges of `count` rows of n elements: of unequal length, some empty, and not all of n."""
    wanted = {
        1: [0, n],
        2: [n // 3, n // 3, n],
        3: [0, n // 5, n - n // 3, n - n // 3],
        4: [0, 64, n // 2, n, n],
        5: [1, 2, n // 2 + 1, n // 2 + 1, n - 1, n],
    }[count]
    return sorted(min(max(edge, 0), n) for edge in wanted)


def columns(count: int, width: int, *, begin: int = 16, beyond: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A message whose rows begin at multiples of 16 bytes, and the columns of it that one part has."""
    message = torch.full((count, begin + -(-width // 16) * 16 + 16 + beyond), 99, dtype=torch.uint8)
    return message, message[:, begin : begin + width]


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


OTHER_TYPES = [(fill, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64) for fill in FILLS[:2]]


class Case(NamedTuple):
    """Arguments of the kernels that encode, pack and decode."""

    segments: Segments
    how: Rounding
    codes: torch.Tensor
    packing: Packing
    edges: list[int]
    length: int
    unit: torch.Tensor
    received: torch.Tensor  # (rows, nbytes) uint8, for the sum


def cases_of(flat: torch.Tensor, layers: Segments) -> list[Case]:
    """Made by the reference, for both alphabets and several numbers of ranks."""
    limit = reference.clip_limit(*reference.moments(flat, layers), layers.lengths, 2.5)
    blocks, cases = layers.blocks(2048), []
    for segments, local, levels in ((layers, limit, 1), (blocks, reference.peaks(flat, blocks), 127)):
        keys = Key(5, 6).streams(segments.layers, rank=1, world_size=4)
        how = reference.rounding(local, local, keys, levels)
        codes = reference.encode(flat, segments, how)
        for world_size, row_count in ((1, 1), (2, 2), (3, 3), (4, 4), (8, 5)):
            packing = packing_for(-levels * world_size, levels * world_size)
            edges = split(len(codes), row_count)
            length = max(end - begin for begin, end in pairwise(edges)) + 7 * (row_count % 2)
            unit = reference.split_unit(local.double() / (levels * world_size))
            _, received = columns(row_count, packing.nbytes(len(codes)))
            for row in received:
                row.copy_(reference.pack(codes if row_count % 2 else -codes, packing))
            cases.append(Case(segments, how, codes, packing, edges, length, unit, received))
    return cases


def computed(kernels, flat: torch.Tensor, case: Case) -> list[torch.Tensor]:
    """What a back end makes of a case."""
    segments, packing, count, elements = case.segments, case.packing, len(case.edges) - 1, len(case.codes)
    message, packed = columns(count, packing.nbytes(case.length))
    kernels.encode_pack(flat, segments, case.how, packing, case.edges, case.length, packed)
    rows, total = torch.full_like(flat, 7.0), torch.full_like(flat, 7.0)
    kernels.decode_rows(packed, packing, segments, case.unit, case.edges, case.length, rows)
    kernels.unpack_decode(case.received, packing, segments, case.unit, 0, elements, elements, total)
    return [
        kernels.peaks(flat, segments),
        kernels.encode(flat, segments, case.how),
        message,
        rows,
        kernels.pack(case.codes, packing),
        kernels.unpack_sum(case.received, packing, elements),
        total,
    ]


@pytest.mark.parametrize(("fill", "dtype"), [(fill, torch.float32) for fill in FILLS] + OTHER_TYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernels_equal_the_reference(kernels, sizes, fill, dtype, monkeypatch):
    """On one thread and on two."""
    monkeypatch.setattr(cpu, "_SCRATCH", 1000)
    monkeypatch.setattr(cpu, "_PIECE", 256)
    layers = gapped(sizes)
    flat = filled(layers.extent + 2, fill).to(dtype)
    moments = reference.moments(flat, layers)
    cases = cases_of(flat, layers)
    wanted = [computed(reference, flat, case) for case in cases]
    for count in (1, 2):
        with threads(count):
            found = kernels.moments(flat, layers)
            assert same_bits(found[0], moments[0])
            finite = moments[0].isfinite()
            assert same_bits(found[1][finite], moments[1][finite])
            assert same_bits(found[2][finite], moments[2][finite])
            for case, those in zip(cases, wanted, strict=True):
                for mine, other in zip(computed(kernels, flat, case), those, strict=True):
                    assert same_bits(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("levels", [1, 4, 127])
def test_rows_hold_the_codes_of_their_elements(levels, dtype):
    """The definition itself: rows against whole buffers, many short rows, and the elements between the edges alone."""
    layers = gapped([0, 3000, 0, 64, 2000, 1200])
    flat = gaussian(layers.extent).to(dtype)
    limit = reference.peaks(flat, layers)
    how = reference.rounding(limit, limit, Key(1).streams(layers.layers, rank=0, world_size=1), levels)
    codes, packing = reference.encode(flat, layers, how), packing_for(-levels, levels)
    unit = reference.split_unit(limit.double() / levels)
    edges = list(range(64, 64 + 97 * 63, 97))
    message, packed = columns(len(edges) - 1, packing.nbytes(100))
    ops.encode_pack(flat, layers, how, packing, edges, 100, packed)
    assert (message[:, :16] == 99).all()
    assert (message[:, 16 + packed.shape[1] :] == 99).all()
    out, wanted = torch.full_like(flat, 7.0), torch.full_like(flat, 7.0)
    for row, (begin, end) in zip(packed, pairwise(edges), strict=True):
        padded = torch.nn.functional.pad(codes[begin:end], (0, 3))
        assert same_bits(row, reference.pack(padded, packing))
        reference.decode(codes[begin:end].int(), layers, unit, begin, wanted)
    ops.decode_rows(packed, packing, layers, unit, edges, 100, out)
    assert same_bits(out, wanted)


@pytest.mark.parametrize("world_size", [1, 2, 4, 127])
@pytest.mark.parametrize("begin", [1, 3, 4])
def test_rows_at_odd_places_are_read_and_written_too(kernels, world_size, begin):
    """No word of these rows lies at a multiple of its size."""
    layers = Segments([700])
    flat, packing = gaussian(700), packing_for(-world_size, world_size)
    limit = reference.peaks(flat, layers)
    how = reference.rounding(limit, limit, Key(1).streams(layers.layers, rank=0, world_size=1), 1)
    unit = reference.split_unit(limit.double())
    codes = reference.encode(flat, layers, how)
    messages, outs = [], []
    for each in (kernels, reference):
        message, rows = columns(2, packing.nbytes(400), begin=begin, beyond=1)
        each.encode_pack(flat, layers, how, packing, [0, 300, 700], 400, rows)
        outs += [torch.zeros(700), torch.zeros(700)]
        each.decode_rows(rows, packing, layers, unit, [0, 300, 700], 400, outs[-2])
        each.unpack_decode(rows, packing, layers, unit, 100, 450, 400, outs[-1])
        outs.append(each.unpack_sum(rows, packing, 400))
        messages.append(message)
        each.pack(codes[:400], packing, message[0, begin : begin + packing.nbytes(400)])
    assert same_bits(*messages)
    for found, wanted in zip(outs[:3], outs[3:], strict=True):
        assert same_bits(found, wanted)


def test_pack_writes_where_it_is_told(kernels):
    codes, packing = torch.tensor([1, -1, 0, 1, -1, 1, 1]), packing_for(-1, 1)
    out = torch.zeros(4, dtype=torch.uint8)
    kernels.pack(codes, packing, out[1:3])
    assert out.tolist() == [0, *reference.pack(codes, packing).tolist(), 0]
    with pytest.raises(ValueError, match="7 codes take 2 bytes"):
        ops.pack(codes, packing, out)


@pytest.mark.parametrize("edges", [[0, 5], [-1, 2, 10], [0, 11, 10], [0, 5, 4], [0, 2, 10], [0, 5, 11]], ids=str)
def test_edges_that_cannot_be_are_refused(edges):
    layers = Segments([10])
    limit = torch.ones(1)
    how = reference.rounding(limit, limit, torch.zeros(1, 2, dtype=torch.int64), 1)
    rows = torch.zeros(2, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="edges"):
        ops.encode_pack(torch.zeros(10), layers, how, packing_for(-1, 1), edges, 5, rows)
    with pytest.raises(ValueError, match="edges"):
        ops.decode_rows(
            rows, packing_for(-1, 1), layers, reference.split_unit(limit.double()), edges, 5, torch.ones(10)
        )


def test_rows_too_short_for_their_codes_are_refused():
    """The compiled kernels do not look: they would read and write beside the rows."""
    layers, limit, packing = Segments([10]), torch.ones(1), packing_for(-1, 1)
    how = reference.rounding(limit, limit, torch.zeros(1, 2, dtype=torch.int64), 1)
    unit, rows, flat = reference.split_unit(limit.double()), torch.zeros(2, 1, dtype=torch.uint8), torch.zeros(10)
    for call in (
        lambda: ops.encode_pack(flat, layers, how, packing, [0, 5, 10], 6, rows),
        lambda: ops.unpack_sum(rows, packing, 6),
        lambda: ops.unpack_decode(rows, packing, layers, unit, 0, 5, 6, flat),
        lambda: ops.decode_rows(rows, packing, layers, unit, [0, 5, 10], 6, flat),
    ):
        with pytest.raises(ValueError, match="6 codes take rows of 2 bytes"):
            call()


@pytest.mark.parametrize("top", [127, 63, 7, 1])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_narrow_and_widen_equal_the_reference(kernels, sizes, top):
    window = Segments(sizes).blocks(100)
    totals = torch.randint(-127 * 9, 127 * 9 + 1, (window.numel,), generator=torch.Generator().manual_seed(1))
    totals[: window.numel // 2] //= 20
    keys = Key(1).streams(window.layers, rank=9, world_size=9)
    wanted = reference.narrow(totals.int(), window, keys, top)
    found = kernels.narrow(totals.int(), window, keys, top)
    assert same_bits(found[0], wanted[0])
    assert same_bits(found[1], wanted[1])
    assert wanted[0].numel() == 0 or wanted[0].max() <= 2 * top
    back = reference.widen(wanted[0], window, wanted[1], top)
    assert same_bits(kernels.widen(wanted[0], window, wanted[1], top), back)
    each = torch.repeat_interleave(wanted[1], window.lengths)
    assert ((back - totals).abs() < each.clamp(min=1)).all(), "narrowing is off by less than a divisor"
    assert same_bits(back[each == 1], totals.int()[each == 1]), "sums that fit return exactly"
    for wrong in (0, 128):
        with pytest.raises(ValueError, match=r"top must be in 1\.\.127"):
            ops.narrow(totals.int(), window, keys, wrong)


def test_narrow_is_unbiased(kernels):
    window = Segments([500])
    totals = torch.randint(-127 * 8, 127 * 8 + 1, (500,), generator=torch.Generator().manual_seed(2)).int()
    totals[0] = 127 * 8
    mean = torch.zeros(500, dtype=torch.float64)
    draws = 2000
    for step in range(draws):
        codes, divisor = kernels.narrow(totals, window, Key(0, step).streams(window.layers, rank=9, world_size=8), 127)
        mean += kernels.widen(codes, window, divisor, 127) / draws
    error = (mean - totals).abs()
    assert error.max() < 5.5 * 8 / 2 / math.sqrt(draws)
    assert error.max() > 0, "nothing was rounded: the test tests nothing"


@pytest.mark.parametrize("fill", ["normal", "outlier", "denormal", "huge"])
def test_limit_is_the_published_one(kernels, fill):
    """min(max|g|, c sigma), sigma with the mean removed and divided by n, against float64."""
    flat = filled(10_007, fill) + (0.2 if fill == "normal" else 0)
    layers = Segments([10_007])
    limit = reference.clip_limit(*kernels.moments(flat, layers), layers.lengths, 2.5)
    wanted = min(flat.abs().max().item(), 2.5 * flat.double().std(correction=0).item())
    assert limit.item() == pytest.approx(wanted, rel=1e-5, abs=2e-45)


def test_the_largest_magnitude_always_takes_the_largest_code(kernels):
    scales = torch.cat([torch.logspace(-45, 38, 4001), torch.tensor([1e-45, 3.4e38, 1 / 3, 0.7])])
    layers = Segments([1] * len(scales))
    for levels in (1, 127):
        for step in range(3):
            keys = Key(0, step).streams(layers.layers, rank=0, world_size=1)
            how = reference.rounding(scales, scales, keys, levels)
            product = how.scale.double() * (scales * how.lift).double()
            assert (product >= levels * 2**24)[scales > 0].all(), "rounded down, one code in 2^24 would be too small"
            codes = kernels.encode(scales, layers, how)
            assert (codes == levels)[scales > 0].all()


def test_decode_rounds_once(kernels):
    """Total * scale / (levels W) correctly rounded: an exact mean comes out exact, whatever W."""
    for world_size in range(1, 10):
        scale = gaussian(64, seed=world_size).abs() + 1e-3
        layers = Segments([2 * world_size + 1] * 64)
        totals = torch.arange(-world_size, world_size + 1, dtype=torch.int32).repeat(64)
        out = torch.empty(len(totals))
        kernels.decode(totals, layers, reference.split_unit(scale.double() / world_size), 0, out)
        wanted = (totals.double() * scale.double().repeat_interleave(2 * world_size + 1) / world_size).float()
        assert same_bits(out, wanted)


def every_call(device: str) -> dict[str, tuple[object, ...]]:
    """Arguments for every function that a back end may have; what a function writes comes last."""
    layers = gapped([300, 0, 40])
    flat, limit = gaussian(layers.extent).to(device), torch.ones(3, device=device)
    keys = Key(1).streams(layers.layers, rank=0, world_size=1).to(device)
    how, packing = reference.rounding(limit, limit, keys, 1), packing_for(-1, 1)
    unit = reference.split_unit(limit.double())
    rows = torch.zeros(2, 100, dtype=torch.uint8, device=device)[:, :40]
    totals = torch.zeros(340, dtype=torch.int32, device=device)
    return {
        "peaks": (flat, layers),
        "moments": (flat, layers),
        "encode": (flat, layers, how),
        "unpack_sum": (rows, packing, 200),
        "narrow": (totals, layers, keys, 127),
        "widen": (totals.to(torch.uint8), layers, torch.ones(3, dtype=torch.int32, device=device), 127),
        "decode": (totals, layers, unit, 0, flat),
        "unpack_decode": (rows, packing, layers, unit, 10, 210, 200, flat),
        "decode_rows": (rows, packing, layers, unit, [0, 200, 340], 200, flat),
        "encode_pack": (flat, layers, how, packing, [0, 200, 340], 200, rows),
        "pack": (totals, packing),
    }


def tensors(found: object) -> tuple[torch.Tensor, ...]:
    """What a function returned: nothing, a tensor, or some."""
    return (found,) if isinstance(found, torch.Tensor) else tuple(found or ())


def functions(module: object) -> set[str]:
    return {name for name in vars(module) if name in ops.__all__ and callable(getattr(ops, name))}


def test_meta_tensors_have_the_shapes_of_real_ones():
    here, there = every_call("cpu"), every_call("meta")
    plain = {"Packing", "Rounding", "clip_limit", "rounding", "split_unit"}  # torch alone, on any device
    assert functions(reference) - plain == set(here), "a function without a case"
    assert functions(shapes) - plain == set(here), "the meta back end lacks a function"
    for name in here:
        found, wanted = getattr(ops, name)(*there[name]), getattr(ops, name)(*here[name])
        assert type(found) is type(wanted), name
        for one, other in zip(tensors(found), tensors(wanted), strict=True):
            assert (one.shape, one.dtype, one.device.type) == (other.shape, other.dtype, "meta"), name
    out = torch.empty(68, dtype=torch.uint8, device="meta")
    assert ops.pack(*there["pack"], out) is out


def test_codecs_run_on_meta_tensors():
    from terncomm.codecs import Int8, Ternary

    layers = Segments([5000, 300])
    flat = torch.empty(5300, device="meta")
    for codec in (Ternary(), Ternary(clip=None), Int8()):
        scaled = codec.scaled(layers)
        scale = codec.measure(flat, scaled)
        codes = codec.encode(flat, scaled, scale, scale, Key(1))
        assert (scale.shape, codes.shape, codes.device.type) == ((len(scaled),), (5300,), "meta")
        codec.decode(codes.int(), scaled, scale, 1, out=flat)


@pytest.fixture
def cpu_is():
    """Call it with a back end that is to serve the CPU in this test."""
    before = ops.use("cpu", None)
    yield lambda mine: ops.use("cpu", mine)
    ops.use("cpu", before)


def test_what_a_back_end_lacks_the_reference_does(cpu_is):
    called = []

    class Three:
        def peaks(self, flat, segments):
            called.append("peaks")
            return reference.peaks(flat, segments)

        def pack(self, codes, how, out=None):
            called.append("pack")
            return reference.pack(codes, how, out)

        def narrow(self, totals, window, keys, top):
            called.append("narrow")
            return reference.narrow(totals, window, keys, top)

    mine = Three()
    assert cpu_is(mine) is None
    for name, arguments in every_call("cpu").items():
        found = getattr(ops, name)(*arguments)
        wanted = getattr(cpu, name)(*arguments)
        for one, other in zip(tensors(found), tensors(wanted), strict=True):
            assert same_bits(one, other), name
    assert called == ["peaks", "narrow", "pack"]
    assert cpu_is(None) is mine


def test_without_numba_the_reference_serves_the_cpu(monkeypatch, caplog):
    import importlib

    def missing(name):
        raise ImportError(f"no module {name}")

    compiled = ops.compile_kernels()
    ops.compile_kernels.cache_clear()
    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(ops, "_found", {})
    monkeypatch.setattr(ops, "compile_kernels", ops.compile_kernels.__wrapped__)
    assert compiled is cpu
    assert same_bits(ops.peaks(torch.ones(3), Segments([3])), torch.ones(1))
    (record,) = caplog.records
    assert "Numba is not usable (no module numba)" in record.message


def test_a_cache_on_disk_that_cannot_be_used_is_named_and_done_without(monkeypatch, caplog):
    import importlib

    def broken(name):
        if name == "terncomm.ops.cpu" and caching.enabled:
            raise EOFError("Ran out of input")
        return cpu if name == "terncomm.ops.cpu" else real(name)

    real = importlib.import_module
    for name in ("terncomm.ops.cpu", "terncomm.ops._numba"):
        monkeypatch.setitem(sys.modules, name, sys.modules[name])  # they are put back
    monkeypatch.setattr(caching, "enabled", True)
    monkeypatch.setattr(importlib, "import_module", broken)
    assert ops.compile_kernels.__wrapped__() is cpu
    assert not caching.enabled
    assert list(Path(caching.folder()).glob("_numba*.nbi")), "the folder in which the kernels are kept"
    told = f"Numba's cache in {caching.folder()} cannot be used (EOFError: Ran out of input). This process compiles"
    assert [told in record.message for record in caplog.records if record.levelname == "WARNING"] == [True]


def test_a_device_without_kernels_is_told_once(caplog, monkeypatch):
    monkeypatch.setattr(ops, "_told", set())
    monkeypatch.setattr(ops, "_found", {})
    tensor = SimpleNamespace(device=torch.device("xpu"))
    with caplog.at_level(logging.WARNING, logger="terncomm"):
        for name in ("peaks", "pack", "peaks"):
            ops._found.clear()
            assert ops._function(name, tensor) is getattr(reference, name)
        ops._function("narrow", SimpleNamespace(device=torch.device("cpu")))
        ops._function("narrow", SimpleNamespace(device=torch.device("meta")))
    assert [record.args for record in caplog.records] == [("peaks", "xpu"), ("pack", "xpu")]


def test_the_folder_of_the_compile_lock_is_ones_own(monkeypatch, tmp_path):
    """A folder that others can write to, or a link in its place, is refused; the lock follows no link."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = ops._private_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    target = tmp_path / "precious"
    (folder / "compile.lock").symlink_to(target)
    with ops._one_at_a_time():
        assert not target.exists()
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="is not a folder that only you can write to"):
        ops._private_folder()
    elsewhere = tmp_path / "elsewhere"
    folder.rename(elsewhere)
    elsewhere.chmod(0o700)
    folder.symlink_to(elsewhere)
    with pytest.raises(PermissionError, match="is not a folder that only you can write to"):
        ops._private_folder()
