import pytest
import torch
import wire_bytes
from laws import Recorded, gaussian, reduce, same_bits, sent_bytes

from terncomm import Int8, Ternary
from terncomm.keys import Key
from terncomm.ops import reference
from terncomm.reduce import RanksDiffer, all_reduce_mean, messages
from terncomm.segments import Segments
from terncomm.transports import LocalTransport

CODECS = [Ternary(clip=2.5), Ternary(clip=None), Int8(block=100), Int8(block=None), Int8(returned="exact")]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=repr)


def by_definition(codec, gradients, segments, key):
    """The path in plain torch, one step after the other, with no exchange, no packing and no fused kernel."""
    world_size = len(gradients)
    scaled = codec.scaled(segments)
    if isinstance(codec, Ternary) and codec.clip is not None:
        local = [reference.clip_limit(*reference.moments(g, scaled), scaled.lengths, codec.clip) for g in gradients]
    else:
        local = [reference.peaks(g, scaled) for g in gradients]
    shared = torch.stack(local).amax(dim=0)
    total = torch.zeros(scaled.numel, dtype=torch.int32)
    for rank, g in enumerate(gradients):
        keys = key.streams(scaled.layers, rank=rank, world_size=world_size)
        total += reference.encode(g, scaled, reference.rounding(local[rank], shared, keys, codec.levels))
    if getattr(codec, "returned", "exact") == "int8" and world_size > 2:
        pieces = scaled.blocks(256)
        keys = key.streams(pieces.layers, rank=2**32 - 1, world_size=world_size)
        codes, divisor = reference.narrow(total, pieces, keys, 127)
        total = reference.widen(codes, pieces, divisor, 127)
    out = gradients[0].clone()
    reference.decode(total, scaled, reference.split_unit(shared.double() / (codec.levels * world_size)), 0, out)
    return out


@pytest.mark.conformance
@every_codec
@pytest.mark.parametrize("world_size", range(1, 10))
def test_the_path_is_its_definition(world_size, codec):
    """Both exchanges, the fused kernels and the packing give the bits of the plain composition, on ragged layers."""
    gradients = gaussian(world_size, 5011, seed=world_size)
    gradients[:, :7] *= 1e-3
    segments = Segments([7, 0, 1, 3000, 2000], offsets=[0, 7, 8, 9, 3010], layers=[3, 4, 5, 6, 11])
    wanted = by_definition(codec, gradients, segments, Key(9, 4))
    for algorithm in ("gather", "two_phase", "auto"):
        mean = reduce(codec, gradients, segments, key=Key(9, 4), exchange=algorithm)
        assert same_bits(segments.take(mean), segments.take(wanted)), algorithm


@every_codec
def test_elements_outside_the_segments_are_left_alone(codec):
    gradients = gaussian(2, 100)
    mean = reduce_rows(codec, gradients, Segments([30, 20], offsets=[10, 60]))
    for before, after in zip(gradients, mean, strict=True):
        for part in (slice(0, 10), slice(40, 60), slice(80, 100)):
            assert same_bits(before[part], after[part])


def reduce_rows(codec, gradients, segments, **options):
    def work(transport):
        return all_reduce_mean(gradients[transport.rank].clone(), segments, codec, transport, key=0, **options)

    return LocalTransport.run(len(gradients), work)


@pytest.mark.parametrize("world_size", range(1, 10))
@every_codec
def test_exact_mean_on_representable_values(world_size, codec):
    """The mean, not the sum, and no tolerance: all ranks hold +-0.7 in the same pattern."""
    pattern = torch.where(gaussian(2000) > 0, 0.7, -0.7)
    mean = reduce(codec, pattern.expand(world_size, -1), Segments([1500, 500]))
    assert same_bits(mean, pattern)


def test_scales_are_shared_by_their_maximum():
    """With local scales the smaller rank would be coded at full scale and the mean be wrong."""
    gradients = torch.stack([torch.full((4000,), 1.0), torch.full((4000,), 0.25)])
    gradients[:, ::2] *= -1
    mean = torch.stack([reduce(Ternary(clip=None), gradients, Segments([4000]), key=k) for k in range(50)]).mean(0)
    assert mean.abs().mean() == pytest.approx(0.625, abs=0.01)
    assert set(reduce(Ternary(clip=None), gradients, Segments([4000])).abs().tolist()) == {0.5, 1.0}


def test_each_rank_clips_at_its_own_limit():
    """As published: clip locally, then share the maximum. Rank 0's outliers are cut at rank 0's c sigma."""
    gradients = torch.stack([gaussian(20_000), 10 * gaussian(20_000, seed=1)])
    gradients[0, :100] = 8.0
    limit = Ternary(clip=2.5).measure(gradients[0], Segments([20_000])).item()
    assert limit < 3.5
    gradients[1, :100] = 0.0
    draws = [reduce(Ternary(clip=2.5), gradients, Segments([20_000]), key=Key(0, step))[:100] for step in range(60)]
    assert torch.stack(draws).mean() == pytest.approx(limit / 2, rel=0.15)


def test_the_cut_of_a_buffer_does_not_change_the_result():
    """Two layers in one buffer, or each in its own: the same bits, for noise is keyed by layer."""
    gradients = gaussian(4, 6000)
    for codec in (Ternary(), Int8(), Int8(block=1000, returned="exact")):
        whole = reduce(codec, gradients, Segments([4000, 2000], layers=[5, 6]))
        parts = [
            reduce(codec, gradients[:, :4000].contiguous(), Segments([4000], layers=[5])),
            reduce(codec, gradients[:, 4000:].contiguous(), Segments([2000], layers=[6])),
        ]
        assert same_bits(whole, torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_come_back_as_they_went(dtype):
    gradients = gaussian(3, 3000).to(dtype)
    for codec in (Ternary(), Int8()):
        mean = reduce(codec, gradients, Segments([1000, 2000]))
        assert mean.dtype == dtype
        wanted = reduce(codec, gradients.float(), Segments([1000, 2000])).to(dtype)
        assert same_bits(mean, wanted)


def test_exact_layers_travel_exactly_beside_coded_ones():
    gradients = gaussian(4, 3000)
    coded, exact = Segments([1000, 1000], offsets=[0, 1500], layers=[0, 2]), Segments([500, 500], offsets=[1000, 2500])
    mean = reduce(Ternary(), gradients, coded, exact=exact)
    total = ((gradients[0] + gradients[1]) + gradients[2]) + gradients[3]
    for part in (slice(1000, 1500), slice(2500, 3000)):
        assert same_bits(mean[part], (total / 4)[part])
        assert not same_bits(mean[:1000], (total / 4)[:1000])
    alone = reduce(Ternary(), gradients, coded)
    assert same_bits(mean[:1000], alone[:1000])
    everything = reduce(None, gradients, Segments(()), exact=Segments([3000]))
    assert same_bits(everything, total / 4)


def test_a_layer_cannot_be_both_coded_and_exact():
    with pytest.raises(ValueError, match="both coded and exact"):
        reduce(Ternary(), gaussian(2, 100), Segments([60]), exact=Segments([50], offsets=[50]))


def test_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    reduce(Ternary(), gaussian(2, 5000), Segments([5000]))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("world_size", "ternary", "int8"), [(2, 19, 3.9), (4, 13, 3.9), (8, 10.5, 3.9)])
def test_bytes_sent_in_all_against_a_ring(world_size, ternary, int8):
    """Scales, checks and padding included, on half a million elements."""
    n = 500_000
    ring = wire_bytes.float_bytes(n, 4, world_size)
    layers = Segments([400_000, 100_000])
    for codec, times in ((Ternary(), ternary), (Int8(block=2048), int8)):
        sent = sent_bytes(codec, gaussian(1, n).expand(world_size, -1), layers)
        assert len(set(sent)) == 1, "ranks send alike"
        assert ring / sent[0] > times, codec
        assert sent[0] == wire_bytes.bucket([(codec, codec.scaled(layers).sizes)], [], world_size)


def test_many_scales_are_shared_in_two_phases():
    """W times the block scales must not weigh on the wire."""
    n, world_size = 400_000, 8
    sent = sent_bytes(Int8(block=128), gaussian(1, n).expand(world_size, -1), Segments([n]))[0]
    scales = 4 * n / 128
    row = n / world_size
    codes = (world_size - 1) * (2 * row + row / 128)
    assert sent - codes < 2 * scales + (world_size - 1) * 800 < (world_size - 1) * scales


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": 1}, "seed 0 here, 1 there"),
        ({"key": Key(0, step=3)}, "step 0 here, 3 there"),
        ({"key": Key(0, bucket=2)}, "bucket 0 here, 2 there"),
        ({"codec": Ternary(clip=2.0)}, "another codec, exchange or dtype."),
        ({"flat": torch.ones(101)}, "a bucket of 100 elements here, of 101 there"),
        ({"segments": Segments([61, 39])}, "different layers, or a different choice of coded layers"),
        ({"segments": Segments([60, 39])}, "coded elements 100 here, 99 there"),
        ({"exchange": "gather"}, "another codec, exchange or dtype."),
    ],
)
def test_ranks_out_of_step_get_an_error_naming_both_sides(change, words):
    told = {}

    def work(transport):
        common = {"segments": Segments([60, 40]), "codec": Ternary(), "key": 0}
        options = common | (change if transport.rank == 2 else {})
        try:
            flat = options.pop("flat", torch.ones(100))
            all_reduce_mean(flat, options.pop("segments"), options.pop("codec"), transport, **options)
        except RanksDiffer as error:
            told[transport.rank] = str(error)

    LocalTransport.run(3, work)
    assert set(told) == {0, 1, 2}, "every rank raises"
    assert words in told[0]
    assert "Rank 0 (here) and rank 2 (there)" in told[0]


@pytest.mark.parametrize(
    ("flat", "options", "error", "words"),
    [
        (torch.zeros(4, dtype=torch.int32), {}, TypeError, "must be torch.float32, .*, got torch.int32"),
        (torch.zeros(4, dtype=torch.float8_e5m2), {}, TypeError, "must be torch.float32, .*, got torch.float8_e5m2"),
        (torch.zeros(3), {}, ValueError, "reach to element 4, the buffer has 3"),
        (torch.zeros(4, 4).T[0], {}, ValueError, "contiguous"),
        (torch.zeros(4), {"exchange": "ring"}, ValueError, "got 'ring'"),
        (torch.zeros(4), {"codec": None}, ValueError, "no codec"),
        (torch.zeros(4), {"key": (0, 1)}, TypeError, "seed must be an int, got \\(0, 1\\)"),
        (torch.zeros(4), {"codec": "terngrad"}, TypeError, "codec must be a terncomm codec"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(flat, options, error, words):
    arguments = {"codec": Ternary(), "key": 0} | options
    with pytest.raises(error, match=words):
        all_reduce_mean(flat, Segments([4]), arguments.pop("codec"), LocalTransport.world(1)[0], **arguments)


def test_the_fused_kernel_is_what_runs(monkeypatch):
    """The path packs with the layout of the alphabet: five ternary codes a byte."""
    seen = []

    class Spy:
        def __init__(self, inner):
            self.inner, self.rank, self.world_size = inner, inner.rank, inner.world_size

        def all_gather(self, payload):
            seen.append(len(payload))
            return self.inner.all_gather(payload)

        def all_to_all(self, rows):
            seen.append(tuple(rows.shape))
            return self.inner.all_to_all(rows)

    all_reduce_mean(gaussian(1000), Segments([1000]), Ternary(), Spy(LocalTransport.world(1)[0]), key=0)
    assert seen == [256, 208]
    seen.clear()
    two = Spy(LocalTransport.world(1)[0])
    all_reduce_mean(gaussian(1000), Segments([1000]), Ternary(), two, key=0, exchange="two_phase")
    assert seen == [256, (1, 208), 208]


def test_headers_that_arrive_later_poison_now_and_raise_then():
    """As on CUDA, where the host must not wait: no rank goes on with garbage that looks like a gradient."""
    told = []

    def work(transport):
        later = []
        key = Key(0, step=1 if transport.rank == 2 else 0)
        mean = all_reduce_mean(torch.ones(100), Segments([100]), Ternary(), transport, key=key, later=later)
        assert later[0].arrived()
        with pytest.raises(RanksDiffer, match="step") as caught:
            later[0].check()
        told.append(str(caught.value))
        return mean

    assert not torch.stack(LocalTransport.run(3, work)).isfinite().any()
    assert len(told) == 3

    def agreeing(transport):
        later = []
        mean = all_reduce_mean(torch.ones(100), Segments([100]), Ternary(), transport, key=0, later=later)
        later[0].check()
        return mean

    assert torch.equal(LocalTransport.run(3, agreeing)[1], torch.ones(100))


@pytest.mark.parametrize("codec", [*CODECS, None], ids=repr)
@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_messages_are_foretold(codec, world_size, dtype):
    """A few scales and many, exact parts that travel along or do not, both exchanges, nothing coded."""
    for coded, exact in [(5000, 900), (300_000, 140_000), (30, 7), (9000, 0), (0, 3), (0, 5000)]:
        whole = codec is None or not coded
        layers = Segments([] if whole else [coded - coded // 3, coded // 3])
        rest = Segments([coded + exact] if whole else [exact], offsets=[0 if whole else coded])
        for algorithm in ("auto", "two_phase"):

            def work(transport, algorithm=algorithm, layers=layers, rest=rest, n=coded + exact):
                recorded = Recorded(transport)
                flat = torch.ones(n, dtype=dtype)
                used = codec if len(layers) else None
                all_reduce_mean(flat, layers, used, recorded, key=0, exchange=algorithm, exact=rest)
                return recorded.calls

            calls = LocalTransport.run(world_size, work)[0]
            foretold = messages(
                layers, codec, world_size, exchange=algorithm, exact=rest, itemsize=torch.zeros(0, dtype=dtype).itemsize
            )
            assert foretold == [call for call in calls if call.nbytes], (coded, exact, algorithm)
