"""Laws that every codec, exchange and transport keeps, each one a helper; the tests run them over all of these."""

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch

from terncomm.codecs import Codec
from terncomm.keys import Key
from terncomm.path import reduce as path
from terncomm.path.account import Context
from terncomm.path.drivers import Call, lockstep
from terncomm.reduce import all_reduce_mean, bucket_of
from terncomm.segments import Segments
from terncomm.transports import LocalTransport, Metered, Overlapping, Transport

FALSE_ALARM = 1e-6  # two-sided probability that a sound codec fails one z-test
Z_LIMIT = -torch.special.ndtri(torch.tensor(FALSE_ALARM / 2, dtype=torch.float64)).item()


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, NaN like NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    both_nan = a.isnan() & b.isnan() if a.is_floating_point() else torch.zeros_like(a, dtype=torch.bool)
    return bool(((a == b) | both_nan).all())


def octets(rank: int, *shape: int) -> torch.Tensor:
    """Bytes that a rank may send."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(rank), dtype=torch.uint8)


def rows_in_rank_order(transport: Transport, k: int) -> None:
    """Both collectives of a transport, with rows of `k` bytes; every rank calls it."""
    rank, world_size = transport.rank, transport.world_size
    gathered = transport.all_gather(octets(rank, k))
    assert torch.equal(gathered, torch.stack([octets(r, k) for r in range(world_size)]))
    swapped = transport.all_to_all(octets(rank, world_size, k))
    assert torch.equal(swapped, torch.stack([octets(r, world_size, k)[rank] for r in range(world_size)]))


def messages_in_flight_bring_the_same(transport: Overlapping, sizes: Sequence[int]) -> None:
    """Both collectives at every size, begun before earlier ones have ended; every rank calls it."""
    rank, world_size = transport.rank, transport.world_size
    waits: deque[Callable[[], None]] = deque()
    begun = []
    for number, k in enumerate(sizes):
        for kind, shape in (("all_gather", (k,)), ("all_to_all", (world_size, k))):
            sent = [octets(100 * number + r, *shape) for r in range(world_size)]
            received, transfers = transport.begin(kind, sent[rank].clone())
            wanted = torch.stack(sent if kind == "all_gather" else [rows[rank] for rows in sent])
            begun.append((f"{kind} of {k} bytes", received, wanted))
            for wait in transfers:
                assert world_size > 1
                assert k > 0
                waits.append(wait)
                if len(waits) >= transport.in_flight:
                    waits.popleft()()
    for wait in waits:
        wait()
    for name, received, wanted in begun:
        assert torch.equal(received, wanted), name


def reduce(
    codec: Codec | None,
    gradients: torch.Tensor,
    segments: Segments,
    *,
    key: Key | int = 0,
    exact: Segments | None = None,
    exchange: str = "auto",
) -> torch.Tensor:
    """Gradients (W, n) -> the reduced buffer (n,), after checking that all ranks hold the same bits.

    In lockstep: `test_path.py` has it that every driver gives the same.
    """
    exact = Segments(()) if exact is None else exact
    key = key if isinstance(key, Key) else Key(key)
    bucket, world_size = bucket_of(segments, codec, exact), len(gradients)
    flats = [gradient.clone() for gradient in gradients]
    contexts = [Context(key, rank, world_size) for rank in range(world_size)]
    lockstep(
        [path.all_reduce_mean(flat, bucket, ctx, exchange=exchange) for flat, ctx in zip(flats, contexts, strict=True)]
    )
    for part in (segments, exact):
        first, *others = (part.take(flat) for flat in flats)
        assert all(same_bits(first, other) for other in others), "ranks hold different bits"
    return flats[0]


class Recorded:
    """A transport that writes down its calls."""

    def __init__(self, inner: Transport) -> None:
        self.inner, self.rank, self.world_size = inner, inner.rank, inner.world_size
        self.calls: list[Call] = []

    def all_gather(self, payload: torch.Tensor) -> torch.Tensor:
        self.calls.append(Call("all_gather", payload.numel()))
        return self.inner.all_gather(payload)

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        self.calls.append(Call("all_to_all", rows.shape[1]))
        return self.inner.all_to_all(rows)


def sent_bytes(codec: Codec, gradients: torch.Tensor, segments: Segments, **options: object) -> list[int]:
    """Bytes that each rank sends in one reduction."""

    def work(transport: LocalTransport) -> int:
        metered = Metered(transport)
        all_reduce_mean(gradients[transport.rank].clone(), segments, codec, metered, key=0, **options)
        return metered.sent_bytes

    return LocalTransport.run(len(gradients), work)


def encoded(
    codec: Codec, flat: torch.Tensor, layers: Segments, key: Key, *, rank: int = 0, world_size: int = 1
) -> tuple[torch.Tensor, Segments, torch.Tensor]:
    """Codes of one rank on its own, the scaled segments, and the scales."""
    segments = codec.scaled(layers)
    scale = codec.measure(flat, segments)
    return codec.encode(flat, segments, scale, scale, key, rank=rank, world_size=world_size), segments, scale


def decoded(codec: Codec, flat: torch.Tensor, layers: Segments, key: Key, *, rank: int = 0) -> torch.Tensor:
    """One rank's gradient through its codec and back."""
    codes, segments, scale = encoded(codec, flat, layers, key, rank=rank)
    out = torch.zeros_like(flat)
    return codec.decode(codes.to(torch.int32), segments, scale, 1, out=out)


def codes_lie_within_the_alphabet(codec: Codec, flat: torch.Tensor, layers: Segments) -> None:
    codes, _, _ = encoded(codec, flat, layers, Key(1))
    low, high = codec.alphabet
    assert codes.min() >= low
    assert codes.max() <= high
    assert {low, high} & set(codes.tolist()), "the largest magnitude takes the largest code"


def codes_are_a_function_of_input_and_key(codec: Codec, flat: torch.Tensor, layers: Segments) -> None:
    before = flat.clone()
    first, _, _ = encoded(codec, flat, layers, Key(1))
    assert same_bits(flat, before), "encode changed its input"
    assert same_bits(first, encoded(codec, flat.clone(), layers, Key(1))[0])
    for other in (Key(2), Key(1, step=1)):
        assert not same_bits(first, encoded(codec, flat, layers, other)[0])
    assert same_bits(first, encoded(codec, flat, layers, Key(1, bucket=7))[0]), "noise must not depend on the bucket"
    assert not same_bits(first, encoded(codec, flat, layers, Key(1), rank=1)[0])
    assert not same_bits(first, encoded(codec, flat, layers, Key(1), world_size=2)[0])


def unbiased_inside_the_clip(codec: Codec, flat: torch.Tensor, layers: Segments, *, draws: int = 400) -> None:
    """z-tests of the mean of `draws` codings: over all elements (chi-square) and of their signed sum."""
    segments = codec.scaled(layers)
    scale = codec.measure(flat, segments)
    step = (scale / codec.levels).repeat_interleave(segments.lengths)
    limit = scale.repeat_interleave(segments.lengths)
    wanted = flat.clamp(-limit, limit)
    total = torch.zeros_like(flat, dtype=torch.float64)
    for draw in range(draws):
        codes = codec.encode(flat, segments, scale, scale, Key(3, step=draw))
        total += codes * step.double()
    fraction = (wanted.abs() / step).double().frac()
    variance = step.double() ** 2 * fraction * (1 - fraction)
    random = variance > 1e-4 * step.double() ** 2
    error = (total / draws - wanted.double())[random]
    z = error.sum() / (variance[random].sum() / draws).sqrt()
    assert abs(z) < Z_LIMIT, f"sum of errors is {z:.1f} standard errors from zero"
    z = (error * wanted[random].sign()).sum() / (variance[random].sum() / draws).sqrt()
    assert abs(z) < Z_LIMIT, f"magnitudes are biased by {z:.1f} standard errors"
    chi = (error**2 / (variance[random] / draws)).sum()
    count = int(random.sum())
    assert abs(chi - count) / math.sqrt(2 * count) < Z_LIMIT + 3, "errors are not of the size that rounding makes"


def error_is_at_most_one_step(codec: Codec, flat: torch.Tensor, layers: Segments) -> None:
    segments = codec.scaled(layers)
    scale = codec.measure(flat, segments)
    limit = scale.repeat_interleave(segments.lengths)
    step = limit / codec.levels
    error = (decoded(codec, flat, layers, Key(4)) - flat.clamp(-limit, limit)).abs()
    assert (error <= step * (1 + 1e-5)).all()


def decoding_is_linear(codec: Codec, layers: Segments) -> None:
    segments = codec.scaled(layers)
    scale = torch.linspace(0.5, 2.0, len(segments))
    n = layers.numel
    a = torch.randint(-9, 10, (n,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    b = a.flip(0)

    def back(total: torch.Tensor) -> torch.Tensor:
        return codec.decode(total, segments, scale, 1, out=torch.empty(n))

    torch.testing.assert_close(back(a) + back(b), back(a + b), rtol=1e-6, atol=1e-9)
    assert same_bits(back(2 * a), 2 * back(a))


def zero_layers_stay_zero(codec: Codec, world_size: int) -> None:
    gradients = gaussian(world_size, 3000)
    gradients[:, 1000:2000] = 0
    mean = reduce(codec, gradients, Segments([1000, 1000, 1000]))
    assert (mean[1000:2000] == 0).all()
    assert mean[:1000].any()
    assert mean[2000:].any()


def nonzero_layers_have_a_limit(codec: Codec) -> None:
    """Constant, one-element, single-outlier and denormal layers must not be erased for ever."""
    for layer in (
        torch.full((500,), 0.7),
        torch.full((500,), -3e-39),
        torch.tensor([1e-45]),
        torch.tensor([3e38]),
        torch.cat([torch.zeros(4999), torch.tensor([1e-3])]),
        torch.cat([torch.zeros(9999), torch.tensor([1e-45])]),
    ):
        segments = codec.scaled(Segments([len(layer)]))
        limits = codec.measure(layer, segments)
        assert limits.max() > 0, layer
        back = torch.stack([decoded(codec, layer, Segments([len(layer)]), Key(5, step=s)) for s in range(8)])
        assert back.isfinite().all()
        assert back.any(), f"{layer[-1]} was erased"


def nonfinite_poisons_its_layer_and_no_other(codec: Codec, world_size: int) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        for rank in range(world_size):
            gradients = gaussian(world_size, 4000)
            gradients[rank, 1500] = bad
            mean = reduce(codec, gradients, Segments([1000, 2000, 1000]))
            poisoned = codec.scaled(Segments([1000, 2000, 1000]))
            hit = [
                (o, n)
                for o, n, layer in zip(poisoned.offsets.tolist(), poisoned.sizes, poisoned.layers, strict=True)
                if layer == 1 and o <= 1500 < o + n
            ]
            ((offset, size),) = hit
            assert not mean[offset : offset + size].isfinite().any(), (bad, rank)
            outside = torch.cat([mean[:1000], mean[3000:]])
            assert outside.isfinite().all(), (bad, rank)


def noise_is_uncorrelated(draw: Callable[[int, int, int], torch.Tensor], n: int) -> None:
    """draw(step, layer, rank) -> (n,) uniforms in [0, 1): no correlation over neighbours, steps, layers or ranks."""
    base = draw(0, 0, 0)
    centred = base - 0.5
    assert abs(centred.mean()) * math.sqrt(12 * n) < Z_LIMIT
    assert abs((centred**2).mean() * 12 - 1) * math.sqrt(n / 0.8) < Z_LIMIT
    others = {f"lag {lag}": (centred[:-lag], centred[lag:]) for lag in (1, 2, 3, 8, 64, 320, 4096)}
    others |= {
        "step": (centred, draw(1, 0, 0) - 0.5),
        "layer": (centred, draw(0, 1, 0) - 0.5),
        "rank": (centred, draw(0, 0, 1) - 0.5),
    }
    for name, (a, b) in others.items():
        z = (a * b).mean() * 12 * math.sqrt(len(a))
        assert abs(z) < Z_LIMIT, f"{name}: correlation of {z:.1f} standard errors"


def variance_falls_as_one_over_world_size(codec: Codec) -> None:
    """The same gradient on all ranks: independent noise makes the error of the mean fall as 1 / W."""
    errors = {}
    n = 20_000
    g = gaussian(n)
    for world_size in (1, 2, 4, 8):
        mean = reduce(codec, g.expand(world_size, -1), Segments([n]))
        limit = codec.measure(g, codec.scaled(Segments([n]))).repeat_interleave(codec.scaled(Segments([n])).lengths)
        errors[world_size] = float((mean - g.clamp(-limit, limit)).square().mean())
    for world_size in (2, 4, 8):
        ratio = errors[1] / errors[world_size] / world_size
        assert 0.9 < ratio < 1.1, errors
