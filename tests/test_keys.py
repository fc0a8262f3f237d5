import pytest
import torch
from laws import noise_is_uncorrelated

from terncomm.keys import Key
from terncomm.ops.reference import noise

N = 1 << 18


def uniforms(seed: int, step: int, layer: int, rank: int, world_size: int = 4, n: int = N) -> torch.Tensor:
    words = Key(seed, step).streams(torch.tensor([layer]), rank=rank, world_size=world_size)[0]
    return noise(torch.arange(n), words[0], words[1]).double() / 2**24


def test_streams_are_pinned():
    """Golden words, from an implementation in Python integers; a change would break every resumed run."""
    words = Key(7, 3).streams(torch.tensor([0, 1, 2**31]), rank=2, world_size=4)
    assert words.tolist() == [[1174829713, 43805431], [3829546700, 2908625600], [957991273, 3850257263]]
    places = torch.tensor([0, 1, 2, 3, 2**31, 2**32 - 1])
    assert noise(places, words[0, 0], words[0, 1]).tolist() == [16298143, 15334761, 4762373, 1953104, 4224289, 4774324]


@pytest.mark.parametrize("seed", [0, 1, 2, -1, 2**40])
def test_noise_is_uncorrelated(seed):
    noise_is_uncorrelated(lambda step, layer, rank: uniforms(seed, step, layer, rank), N)


def lag_errors(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Two streams of unit variance -> the mean of a[i] * b[i + lag] in standard errors, lags 1, 2, ..., by FFT."""
    n = len(a)
    product = torch.fft.rfft(a, 2 * n).conj() * torch.fft.rfft(b, 2 * n)
    lags = torch.arange(1, n - n // 64)
    return torch.fft.irfft(product)[lags] / (n - lags).sqrt()


def strided(key: Key, stride: int, n: int, bit: int | None = None, *, layer: int = 0, rank: int = 0) -> torch.Tensor:
    """(n,) float32 of unit variance: every `stride`-th value of a stream, or one bit of it."""
    words = key.streams(torch.tensor([layer]), rank=rank, world_size=4)[0]
    values = noise(torch.arange(n) * stride % 2**32, words[0], words[1])
    if bit is not None:
        return ((values >> bit) & 1).float() * 2 - 1
    return (values.float() / 2**24 - 0.5) * 12**0.5


@pytest.mark.parametrize(
    ("stride", "n", "bit"),
    [
        (1, 1 << 22, None),  # one Weyl sequence through lowbias32: 10 standard errors at lag 525175
        (1, 1 << 20, 0),
        (1, 1 << 20, 23),
        (320, 1 << 20, None),
        (4096, 1 << 20, None),
        (16384, 1 << 18, None),  # and 75 at lag 34542
        (16384, 1 << 18, 0),
        (1 << 20, 1 << 12, None),
    ],
)
def test_no_lag_is_correlated(stride, n, bit):
    x = strided(Key(3), stride, n, bit)
    z = lag_errors(x, x).abs()
    assert z.max() < 7, f"lag {int(z.argmax()) + 1}: correlation of {z.max():.1f} standard errors"


@pytest.mark.parametrize("other", [{"layer": 1}, {"rank": 1}, {"key": Key(3, 1)}, {"key": Key(4)}], ids=str)
def test_streams_are_uncorrelated_at_all_lags(other):
    a, b = (strided(x.pop("key", Key(3)), 1, N, **x) for x in ({}, dict(other)))
    for first, second in ((a, b), (b, a)):
        z = lag_errors(first, second).abs()
        assert z.max() < 7, f"lag {int(z.argmax()) + 1}: correlation of {z.max():.1f} standard errors"


def test_every_part_of_the_key_changes_the_stream():
    streams = {
        tuple(Key(seed, step).streams(torch.tensor([layer]), rank=rank, world_size=world)[0].tolist())
        for seed in (0, 1)
        for step in (0, 1)
        for layer in (0, 1)
        for rank in (0, 1)
        for world in (2, 4)
    }
    assert len(streams) == 32


def test_seeds_that_differ_in_one_bit_are_unrelated():
    base = uniforms(0, 0, 0, 0, n=N // 8) - 0.5
    for bit in range(63):
        z = (base * (uniforms(1 << bit, 0, 0, 0, n=N // 8) - 0.5)).mean() * 12 * (N // 8) ** 0.5
        assert abs(z) < 5.5, f"seed bit {bit}: {z:.1f}"


def test_streams_are_not_shifted_copies():
    """Neighbouring seeds must not give one stream from another place: no 4 values in a row are shared."""
    a, b = (uniforms(seed, 0, 0, 0, n=4096) for seed in (0, 1))
    rows = {tuple(row) for row in a.unfold(0, 4, 1).tolist()}
    assert not rows & {tuple(row) for row in b.unfold(0, 4, 1).tolist()}


def test_all_24_bits_are_even():
    bits = (uniforms(5, 0, 0, 0) * 2**24).long()
    for bit in range(24):
        z = (((bits >> bit) & 1).double().mean() - 0.5) * 2 * N**0.5
        assert abs(z) < 5.5, f"bit {bit}"


@pytest.mark.parametrize("bad", [1.5, "1", True, None])
def test_a_seed_that_is_not_an_int_is_refused(bad):
    with pytest.raises(TypeError, match="seed must be an int"):
        Key(bad)


def test_the_bucket_is_not_part_of_the_noise():
    layers = torch.arange(3)
    assert torch.equal(
        Key(1, 2, 3).streams(layers, rank=0, world_size=2), Key(1, 2).streams(layers, rank=0, world_size=2)
    )
