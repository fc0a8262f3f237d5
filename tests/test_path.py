"""The path of a bucket: its parts, its exchanges and its drivers, most of it in lockstep in one thread."""

import threading
from dataclasses import dataclass

import pytest
import torch
import wire_bytes
from laws import Recorded, gaussian, same_bits
from pipelines import Chunked, ask, octets, pipelined

from terncomm import Int8, Ternary
from terncomm.codecs import Half, IntegerCodec, codec_for
from terncomm.codecs.base import Agreed, Local
from terncomm.keys import Key
from terncomm.path import bucket as buckets
from terncomm.path import exchanges
from terncomm.path.account import Account, Clock, Context
from terncomm.path.bucket import Bucket
from terncomm.path.drivers import Call, blocking, counted, lockstep, sent
from terncomm.path.exchanges import Piece
from terncomm.path.header import Header, RanksDiffer
from terncomm.path.message import Message, Start
from terncomm.path.parts import Floats, Statistics
from terncomm.path.reduce import (
    agree,
    all_gather_number,
    all_reduce_mean,
    all_reduce_mean_between_nodes,
    reduce_scatter,
)
from terncomm.path.shards import Shards
from terncomm.path.sums import row_edges
from terncomm.reduce import messages_of
from terncomm.segments import Segments
from terncomm.transports import LocalTransport, Metered

EXCHANGES = ("auto", "gather", "two_phase")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KEY = Key(9, 4)


@dataclass(frozen=True)
class Plain(IntegerCodec):
    """Gradients that are integers already, in one plane or in two by sign; decoding gives the exact sum."""

    low: int
    high: int
    planes: int = 1
    name = "plain"

    @property
    def alphabet(self):
        return self.low, self.high

    def measure(self, flat, segments):
        return Local(torch.ones(len(segments)))

    def encode(self, flat, segments, local, shared, key, *, rank=0, world_size=1):
        codes = segments.take(flat).to(torch.int32)
        return torch.stack([codes.clamp(min=0), codes.clamp(max=0)]) if self.planes == 2 else codes

    def decode(self, totals, segments, shared, divisor, *, ranks=1, begin=0, out):
        total = totals.view(self.planes, -1).sum(dim=0)
        for at, offset, count in segments.spans(begin, begin + len(total)):
            out[offset : offset + count] = total[at : at + count]
        return out


def contexts(world_size, key=KEY):
    return [Context(key, rank, world_size) for rank in range(world_size)]


def reduced(bucket, gradients, *, exchange="auto", calls=None, key=KEY):
    """Gradients (W, n) -> each rank's buffer (W, n)."""
    flats = [gradient.clone() for gradient in gradients]
    each = zip(flats, contexts(len(flats), key), strict=True)
    lockstep([all_reduce_mean(flat, bucket, ctx, exchange=exchange) for flat, ctx in each], calls=calls)
    return torch.stack(flats)


def in_rank_order(rows, divisor=None):
    """The mean of (W, n) floats, added one after the other in float32 or wider."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = rows[0].to(wide)
    for row in rows[1:]:
        total = total + row.to(wide)
    return (total / (divisor or len(rows))).to(rows.dtype)


def integers(world_size, n, low, high):
    generator = torch.Generator().manual_seed(world_size * 1000 + n)
    return torch.randint(low, high + 1, (world_size, n), generator=generator).float()


# ---- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.conformance
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("alphabet", [(-1, 1), (-127, 127), (0, 3)], ids=str)
@pytest.mark.parametrize("world_size", range(1, 10))
def test_every_exchange_gives_the_exact_sum_on_all_ranks(world_size, alphabet, planes):
    for n in (0, 1, 2, 5, 63, 64, 65, 319, 320, 321, 1000, 4099):
        gradients = integers(world_size, n, *alphabet)
        wanted = gradients.sum(dim=0).expand(world_size, -1)
        for exchange in EXCHANGES:
            bucket = Bucket([(Segments([n - n // 3, n // 3]), Plain(*alphabet, planes))])
            assert same_bits(reduced(bucket, gradients, exchange=exchange), wanted), (n, exchange)


def test_the_sum_of_ternary_codes_has_every_level():
    world_size = 4
    codes = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * world_size).T.contiguous()
    for exchange in ("gather", "two_phase"):
        total = reduced(Bucket([(Segments([codes.shape[1]]), Plain(-1, 1))]), codes, exchange=exchange)[0]
        assert sorted(set(total.tolist())) == list(range(-world_size, world_size + 1))


@pytest.mark.conformance
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", range(1, 10))
def test_floats_are_added_in_rank_order(world_size, dtype):
    """Whole where that is small, else in rows; elements between the layers stay as they are."""
    for n in (0, 1, 10, 1000, 5000):
        values = (gaussian(world_size, n + 7) * 100).to(dtype)
        layers = Segments([n // 3, n - n // 3], offsets=[0, n // 3 + 7])
        calls = []
        found = reduced(Bucket([(layers, None)]), values, calls=calls)
        wanted = in_rank_order(values)
        for before, after in zip(values, found, strict=True):
            assert same_bits(layers.take(after), layers.take(wanted))
            gap = slice(n // 3, n // 3 + 7)
            assert same_bits(after[gap], before[gap])
        kinds = [call.kind for call in calls[1:]]
        whole, row = n * dtype.itemsize, -(-n // world_size) * dtype.itemsize
        small = (world_size - 1) * whole <= 8192 and wire_bytes.aligned(whole) <= 2 * wire_bytes.aligned(row)
        assert kinds == ([] if n == 0 else ["all_gather"] if small else ["all_to_all", "all_gather"])


@pytest.mark.conformance
@pytest.mark.parametrize("world_size", [2, 3, 4, 8, 16])
def test_a_bucket_never_sends_more_than_an_all_reduce_of_its_floats_and_one_header(world_size):
    """Beside what rounding up to 16 bytes takes, in each row, of each part."""
    for coded in (0, 1, 20, 1024, 5000, 60_000):
        for exact in (0, 1, 21, 300, 2000, 9000):
            for codec in (Ternary(), Int8(), Int8(returned="int8"), Half("bf16")):
                bucket = Bucket([(Segments([coded]), codec), (Segments([exact], offsets=[coded]), None)])
                calls = messages_of(bucket, world_size)
                ring = 2 * (world_size - 1) * 4 * (coded + exact) // world_size
                parts = (coded > 0) + (exact > 0)
                rounding = (world_size - 1) * parts * 2 * (16 + 4)
                assert sent(calls, world_size) <= ring + (world_size - 1) * wire_bytes.HEADER + rounding


@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 1e38), (torch.float32, -3e38), (torch.float64, 1e308)])
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_mean_that_is_finite_does_not_overflow(world_size, dtype, large):
    """As DDP, which divides before it adds; what is not finite stays so."""
    own = torch.ones(world_size, 9000, dtype=dtype)
    own[:, 5000:] = large
    own[0, 7] = torch.inf
    own[1, 8001] = torch.nan
    mean = reduced(Bucket([(Segments([9000]), None)]), own)
    wanted = own[0].clone()
    wanted[8001] = torch.nan
    for each in mean:
        assert torch.allclose(each, wanted, rtol=1e-6, atol=0, equal_nan=True)
        assert same_bits(each, mean[0])


@pytest.mark.parametrize("rows", ["whole", "in rows"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_parts_alone_whole_and_in_rows(world_size, rows):
    """What :func:`terncomm.path.exchanges.all_reduce` needs to know of a part is the part's own."""
    values = gaussian(world_size, 1001)
    edges = row_edges(1001, 1 if rows == "whole" else world_size)

    def path(flat, ctx):
        floats = Floats(flat, Segments([1001]), edges, divisor=world_size)
        statistics = Statistics(Local(flat[:77].clone()), lambda every: Agreed(every.amin(dim=0)), [0, 77])
        piece = Piece([floats, statistics], []) if rows == "whole" else Piece([statistics], [floats])
        yield from exchanges.all_reduce([piece], ctx, flat.device)
        return flat, statistics.shared

    each = zip(values.clone(), contexts(world_size), strict=True)
    for mean, least in lockstep([path(*one) for one in each]):
        assert same_bits(mean, in_rank_order(values))
        assert same_bits(least, values[:, :77].amin(dim=0))


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_statistics_are_agreed_on_inline_whole_and_in_rows(world_size):
    """By their maximum and by their minimum, one a segment or three, of two groups at once."""
    inline, whole, rows = (10, 3), (60, 20), (5000, 1700)
    for sizes in (inline, whole, rows):
        maxima = gaussian(world_size, sizes[0]).abs()
        maxima[0, 5] = torch.inf
        minima = gaussian(world_size, 3, sizes[1], seed=1)
        ways = [Ternary().agree, lambda every: Agreed(every.amin(dim=0))]

        def path(rank, ctx, ways=ways, maxima=maxima, minima=minima):
            local = [Local(maxima[rank]), Local(minima[rank])]
            return agree(Header(0, 0, 0, 0, 0, 0, 0), local, ways, ctx, torch.device("cpu"))

        calls = []
        found = lockstep([path(*each) for each in enumerate(contexts(world_size))], calls=calls)
        for first, second in found:
            assert same_bits(first, maxima.amax(dim=0))
            assert same_bits(second, minima.amin(dim=0))
        kinds = [call.kind for call in calls]
        in_rows = world_size > 1 and world_size * 4 * (sizes[0] + 3 * sizes[1]) > 8192
        further = [] if sizes == inline else ["all_to_all", "all_gather"] if in_rows else ["all_gather"]
        assert kinds == ["all_gather", *further]


def test_a_rank_that_joins_is_told_that_others_reduce_and_they_are_told_too():
    assert lockstep([all_gather_number(7 + rank, rank, torch.device("cpu")) for rank in range(3)]) == [[7, 8, 9]] * 3
    told = []

    def noting(path):
        try:
            return (yield from path)
        except RanksDiffer as error:
            told.append(str(error))
            raise

    bucket = Bucket([(Segments([100]), Ternary())])
    paths = [noting(all_gather_number(7, 0, torch.device("cpu")))]
    paths += [noting(all_reduce_mean(torch.ones(100), bucket, Context(KEY, rank, 3))) for rank in (1, 2)]
    with pytest.raises(RanksDiffer, match="Rank 0 begins with new parameters, types or options, and rank 1, 2 reduces"):
        lockstep(paths)
    assert len(told) == 1, "lockstep ends with the first error"
    transports = LocalTransport.world(2)
    mixed = [all_gather_number(7, 0, torch.device("cpu")), all_reduce_mean(torch.ones(100), bucket, Context(KEY, 1, 2))]

    def run(transport):
        with pytest.raises(RanksDiffer, match="Rank 0 begins with new parameters"):
            blocking(mixed[transport.rank], transport)

    threads = [threading.Thread(target=run, args=(transport,)) for transport in transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


# ---- pieces, groups, halves ------------------------------------------------------------------------------------------

CODECS = [Ternary(), Int8(block=100), Int8(block=None), Int8(returned="exact"), Plain(-60, 60, 2), None, Half("bf16")]


def gradients_for(codec, world_size, n):
    return integers(world_size, n, -60, 60) if isinstance(codec, Plain) else gaussian(world_size, n)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_pieces_change_no_bit(monkeypatch, world_size, codec):
    gradients = gradients_for(codec, world_size, 20_011)
    layers = Segments([7, 0, 9000, 11_000], offsets=[0, 7, 8, 9010], layers=[3, 4, 5, 6])
    for exchange in EXCHANGES:
        calls = {}
        found = {}
        for size in (1 << 20, 3000, 500):
            monkeypatch.setattr(buckets, "PIECE", size)
            found[size] = reduced(
                Bucket([(layers, codec)]), gradients, exchange=exchange, calls=calls.setdefault(size, [])
            )
        assert same_bits(found[3000], found[1 << 20]), exchange
        assert same_bits(found[500], found[1 << 20]), exchange
        assert len(calls[1 << 20]) < len(calls[3000]) < len(calls[500])


def test_a_piece_is_small_beside_its_bucket():
    """Six messages may be in memory at a time. Codes of a bit or two per element are no burden."""
    n = 1 << 23
    layers = Segments([n])
    count = {
        (codec, dtype): len(Bucket([(layers, codec)]).cuts("auto", 8, dtype, 1 << 23))
        for codec in (Ternary(), Int8(), None)
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    }
    assert [count[Ternary(), dtype] for dtype in (torch.float64, torch.float32, torch.bfloat16)] == [1, 1, 1]
    assert [count[Int8(), dtype] for dtype in (torch.float64, torch.float32)] == [1, 1]
    assert count[Int8(), torch.bfloat16] >= 3
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert count[None, dtype] >= 6
    small = Bucket([(Segments([1 << 17]), None)])
    assert len(small.cuts("auto", 8, torch.float64)) == 1, "memory is no reason to cut half a million bytes"


def test_groups_that_share_a_bucket_share_its_memory():
    """Half floats, half 8-bit codes of 16-bit gradients: neither alone would need pieces as small."""
    n = 5 << 20
    bucket = Bucket([(Segments([n]), Int8()), (Segments([n], offsets=[n]), None)])
    cuts = bucket.cuts("auto", 8, torch.bfloat16, 1 << 23)
    widest = max(sum(edges[-1] - edges[0] for _, edges in (*cut.whole, *cut.rows)) for cut in cuts)
    assert 6 * widest * 2 <= 1.25 * 2 * n * 2


def four_groups():
    layers = [
        Segments([3000, 500], offsets=[0, 4000], layers=[0, 4]),
        Segments([900, 2000], offsets=[3000, 5000], layers=[1, 6]),
        Segments([100], offsets=[3900]),
        Segments([450], offsets=[4510]),
    ]
    return list(zip(layers, [Ternary(), Int8(block=16), None, Half("fp16")], strict=True))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_groups_share_the_messages_and_each_has_the_bits_it_has_alone(monkeypatch, world_size, exchange):
    groups, gradients = four_groups(), gaussian(world_size, 7000)
    for size in (1 << 20, 1000):
        monkeypatch.setattr(buckets, "PIECE", size)
        calls = []
        together = reduced(Bucket(groups), gradients, exchange=exchange, calls=calls)
        for layers, codec in groups:
            alone = reduced(Bucket([(layers, codec)]), gradients, exchange=exchange)
            for one, other in zip(together, alone, strict=True):
                assert same_bits(layers.take(one), layers.take(other)), codec
        gap = slice(4500, 4510)
        assert same_bits(together[:, gap], gradients[:, gap])
        if size == 1 << 20:
            assert len(calls) <= 5, "a header, statistics and back, rows, totals"


def test_a_bucket_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="both coded and exact: elements from 50 on"):
        Bucket([(Segments([60]), Ternary()), (Segments([50], offsets=[50]), Int8())])
    with pytest.raises(TypeError, match="codec must be a terncomm codec such as"):
        Bucket([(Segments([60]), "terngrad")])
    with pytest.raises(ValueError, match="exchange must be one of auto, gather, two_phase, got 'ring'"):
        reduced(Bucket([(Segments([60]), Ternary())]), gaussian(2, 60), exchange="ring")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_halves(world_size, name, dtype):
    """Rounded, added in rank order in float32, divided, and rounded again; 16 bits on the wire."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    for n in (10, 20_000):
        gradients = (gaussian(world_size, n) * 50).to(dtype)
        calls = []
        found = reduced(Bucket([(Segments([n]), codec_for(name))]), gradients, calls=calls)
        total = gradients[0].to(half).float()
        for row in gradients[1:]:
            total = total + row.to(half).float()
        wanted = (total / world_size).to(half).to(dtype)
        for row in found:
            assert same_bits(row, wanted)
        assert sent(calls, world_size) == wire_bytes.bucket([], [(n, 2)], world_size)


def test_a_half_is_told_from_others_by_its_header():
    paths = [
        all_reduce_mean(torch.ones(10), Bucket([(Segments([10]), codec)]), Context(KEY, rank, 2))
        for rank, codec in enumerate((Half("bf16"), Half("fp16")))
    ]
    with pytest.raises(RanksDiffer, match="another codec, exchange or dtype"):
        lockstep(paths)


# ---- bytes -----------------------------------------------------------------------------------------------------------

LAYOUTS = {  # elements of coded layers, elements that travel exactly
    "a few scales": ([5000, 2500], [900]),
    "exact ones in rows": ([5000, 1000], [140_000]),
    "many elements": ([200_000, 100_000], [4000]),
    "small": ([20, 10], [7]),
    "nothing exact": ([9000], []),
    "nothing coded": ([], [5000]),
    "nothing": ([], []),
    "ragged": ([7, 0, 1, 3001], [13, 1]),
}


@pytest.mark.parametrize("codec", [Ternary(), Int8(), Int8(block=128), Int8(block=30, returned="exact")], ids=repr)
@pytest.mark.parametrize(
    ("world_size", "dtype"),
    [*((ranks, torch.float32) for ranks in (1, 2, 3, 4, 8)), (3, torch.bfloat16), (3, torch.float64)],
    ids=str,
)
def test_bytes_are_counted_without_sending_and_by_formula(world_size, codec, dtype):
    for name, (coded, exact) in LAYOUTS.items():
        n = sum(coded) + sum(exact)
        offsets = [sum(coded) + sum(exact[:place]) for place in range(len(exact))]
        layers, rest = Segments(coded), Segments(exact, offsets=offsets)
        for exchange in EXCHANGES:
            bucket = Bucket([(layers, codec), (rest, None)])
            calls = []
            reduced(bucket, torch.ones(world_size, n, dtype=dtype), exchange=exchange, calls=calls)
            ctx = Context(Key(5), 0, world_size)
            flat = torch.empty(n, dtype=dtype, device="meta")
            assert counted(all_reduce_mean(flat, bucket, ctx, exchange=exchange), world_size) == calls, name
            scaled = codec.scaled(layers).sizes if len(layers) else ()
            formula = wire_bytes.bucket(
                [(codec, scaled)] if scaled else [], [(sum(exact), dtype.itemsize)], world_size, exchange
            )
            assert sent(calls, world_size) == formula, (name, exchange)


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_are_those_that_a_transport_sends(monkeypatch, world_size):
    """In pieces, too; and those that are written down by kind, but for what pads and what checks."""
    bucket, gradients = Bucket(four_groups()), gaussian(world_size, 7000)
    monkeypatch.setattr(buckets, "PIECE", 1000)
    calls = []
    reduced(bucket, gradients, calls=calls)

    def work(transport):
        recorded = Recorded(transport)
        metered, account = Metered(recorded), Account()
        ctx = Context(KEY, transport.rank, world_size, account)
        blocking(all_reduce_mean(gradients[transport.rank].clone(), bucket, ctx), metered)
        return recorded.calls, metered.sent_bytes, account.sent_bytes

    flat = torch.empty(7000, device="meta")
    foretold = counted(all_reduce_mean(flat, bucket, Context(KEY, 0, world_size)), world_size)
    for made, nbytes, by_kind in LocalTransport.run(world_size, work):
        assert made == calls == foretold
        assert nbytes == sent(calls, world_size)
        assert set(by_kind) == {"checks", "scales", "terngrad", "int8", "exact", "fp16"}
        parts = 16 * (world_size - 1) * (len(calls) * len(by_kind))
        assert nbytes - parts < sum(by_kind.values()) <= nbytes


def in_rows(n, world_size):
    flat = torch.empty(n, device="meta")
    bucket = Bucket([(Segments([n]), Ternary())])
    calls = counted(all_reduce_mean(flat, bucket, Context(KEY, 0, world_size)), world_size)
    return "all_to_all" in {call.kind for call in calls}, calls


def test_auto_takes_the_fewer_bytes_and_one_round_for_small_messages():
    assert not in_rows(10**6, 2)[0]
    assert in_rows(10**6, 4)[0]
    assert not in_rows(1000, 8)[0]


def test_bytes_against_a_float32_ring():
    """Of a large bucket, everything counted: at least 19x fewer at W = 2, 13x at W = 4, 10.5x at W = 8."""
    n = 6_553_600
    for world_size, times in ((2, 19), (4, 13), (8, 10.5)):
        ring = 2 * (world_size - 1) / world_size * 4 * n
        assert ring / sent(in_rows(n, world_size)[1], world_size) > times
        exact = Bucket([(Segments([n]), None)])
        flat = torch.empty(n, device="meta")
        calls = counted(all_reduce_mean(flat, exact, Context(KEY, 0, world_size)), world_size)
        assert sent(calls, world_size) == pytest.approx(ring, rel=1e-4)


# ---- drivers ---------------------------------------------------------------------------------------------------------


@pytest.mark.conformance
@pytest.mark.parametrize("driver", ["blocking", "pipelined over calls that block", "pipelined over messages in flight"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_driver_gives_the_same_bits(monkeypatch, world_size, driver):
    """Five buckets, in pieces, some with nothing coded."""
    monkeypatch.setattr(buckets, "PIECE", 1000)
    made = [Bucket(four_groups()), Bucket([(Segments([7000]), None)]), Bucket([]), Bucket([(Segments([6000]), Int8())])]
    made.append(made[0])
    everyone = [gaussian(world_size, 7000, seed=index) for index in range(len(made))]
    keys = [Key(3, 1, index) for index in range(len(made))]
    wanted = [
        reduced(bucket, gradients, exchange="two_phase", key=key)
        for bucket, gradients, key in zip(made, everyone, keys, strict=True)
    ]
    flats = [[gradients[rank].clone() for gradients in everyone] for rank in range(world_size)]
    clocks = [Clock() for _ in range(world_size)]

    def paths_of(rank):
        clock = clocks[rank]
        for flat, bucket, key in zip(flats[rank], made, keys, strict=True):
            ctx = Context(key, rank, world_size, Account(clock))
            yield all_reduce_mean(flat, bucket, ctx, exchange="two_phase"), clock

    if driver == "blocking":
        LocalTransport.run(world_size, lambda t: [blocking(path, t, clock) for path, clock in paths_of(t.rank)])
    else:
        wrapped = Chunked if "flight" in driver else Recorded
        outcomes, failed = pipelined(paths_of, world_size, wrapped)
        assert outcomes == [[frozenset()] * len(made)] * world_size, "no layer is outside the range of codes"
        assert not failed
    for rank in range(world_size):
        for index, flat in enumerate(flats[rank]):
            assert same_bits(flat, wanted[index][rank]), (rank, index)
        clock = clocks[rank]
        assert clock.encode_s > 0
        assert clock.decode_s > 0
        assert clock.exchange_s + clock.wire_s > 0


def test_messages_of_lockstep_are_those_of_a_transport():
    paths = [ask(Message("all_to_all", octets(*range(4 * rank, 4 * rank + 4)).view(2, 2))) for rank in range(2)]
    first, second = lockstep(paths)
    assert first.tolist() == [[0, 1], [4, 5]]
    assert second.tolist() == [[2, 3], [6, 7]]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (ask(), "some ranks asked for a message and others did not"),
        (ask(Start(Message("all_gather", octets(1)))), "some ranks asked for a message and others did not"),
        (ask(Message("all_to_all", octets(1, 2).view(2, 1))), "ranks asked for different messages"),
        (ask(Message("all_gather", octets(1), group="node")), "ranks asked for different messages"),
        (ask(Message("all_gather", octets(1, 2))), r"ranks sent different sizes: \[\(1,\), \(2,\)\]"),
    ],
)
def test_paths_that_part_in_lockstep_raise(other, words):
    closed = []

    def noting(path):
        try:
            return (yield from path)
        finally:
            closed.append(path)

    paths = [noting(ask(Message("all_gather", octets(1)))), noting(other)]
    with pytest.raises(RuntimeError, match=words):
        lockstep(paths)
    assert len(closed) == 2, "no path is left half done"


def test_a_path_that_raises_in_lockstep_ends_the_others():
    def raises():
        yield Message("all_gather", octets(1))
        raise ZeroDivisionError("boom")

    closed = []

    def other():
        try:
            yield Message("all_gather", octets(1))
            yield Message("all_gather", octets(1))
        finally:
            closed.append(True)

    with pytest.raises(ZeroDivisionError, match="boom"):
        lockstep([raises(), other()])
    assert closed == [True]


# ---- half an all-reduce, and nodes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [Ternary(), Ternary(clip=None), Int8(block=50, returned="exact"), None], ids=repr)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_reduce_scatter_is_the_all_reduce_cut_into_rows(world_size, codec):
    sizes, numbers, codecs = [1200, 33, 801, 0], [4, 1, 7, 2], [codec, None, codec, None]
    offsets = [0, 1200, 1233, 2034]
    row = -(-2040 // world_size)
    gradients = gaussian(world_size, world_size * row)
    gradients[:, 2034:] = 5.0
    shards = Shards.in_a_row(sizes, offsets, numbers, codecs, row, world_size)

    def path(ctx, out):
        yield from reduce_scatter(gradients[ctx.rank], shards, ctx, divisor=world_size, out=out)
        return out

    calls = []
    paths = [path(ctx, torch.full((row,), torch.nan)) for ctx in contexts(world_size)]
    found = torch.cat(lockstep(paths, calls=calls))
    assert [call.kind for call in calls if call.nbytes > 256 or call.kind == "all_to_all"][-1] == "all_to_all"
    kept = [place for place, each in enumerate(codecs) if each]
    layers = Segments([sizes[k] for k in kept], offsets=[offsets[k] for k in kept], layers=[numbers[k] for k in kept])
    rest = [place for place, each in enumerate(codecs) if not each]
    exact = Segments([sizes[k] for k in rest], offsets=[offsets[k] for k in rest])
    wanted = reduced(Bucket([(layers, codec), (exact, None)]), gradients)[0]
    for each in (layers, exact):
        assert same_bits(each.take(found), each.take(wanted))
    assert (found[2034:] == 0).all(), "padding becomes 0"


@pytest.mark.parametrize("nodes", [[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0]], ids=str)
@pytest.mark.parametrize("codec", [Ternary(), Int8(block=64), None], ids=repr)
def test_between_nodes_in_lockstep(nodes, codec):
    """Floats are averaged inside a node; row by row, that mean goes the path between the nodes."""
    n, world_size = 1001, len(nodes)
    members = [[rank for rank in range(world_size) if nodes[rank] == node] for node in sorted(set(nodes))]
    per_node = len(members[0])
    groups = [(Segments([700, 290], offsets=[0, 711], layers=[5, 7]), codec), (Segments([11], offsets=[700]), None)]
    bucket, gradients = Bucket(groups), gaussian(world_size, n)
    flats = [gradient.clone() for gradient in gradients]
    in_order = [next(m for m in members if 0 in m), *(m for m in members if 0 not in m)]
    order = sorted(range(len(in_order)), key=lambda node: in_order[node][0])
    paths = []
    for rank in range(world_size):
        mine = next(node for node in order if rank in in_order[node])
        place = in_order[mine].index(rank)
        peers = sorted(member[place] for member in members)
        node, between = Context(KEY, place, per_node), Context(KEY, peers.index(rank), len(peers))
        paths.append(all_reduce_mean_between_nodes(flats[rank], bucket, node, between))
    lockstep(paths, nodes=nodes)
    width = -(-n // per_node)
    rows = []
    for place in range(per_node):
        begin, end = place * width, min((place + 1) * width, n)
        peers = sorted((member[place], member) for member in members)
        means = torch.stack([in_rank_order(gradients[member][:, begin:end]) for _, member in peers])
        rows.append(reduced(bucket.clipped(begin, end), means.contiguous())[0])
    wanted = torch.cat(rows)
    for flat in flats:
        assert same_bits(flat, wanted)


def test_calls_are_noted_once():
    calls = []
    reduced(Bucket([(Segments([1000]), Ternary())]), gaussian(2, 1000), calls=calls)
    assert calls == [Call("all_gather", 256), Call("all_gather", 208)]
