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
    assert noise(torch.arange(4), words[0, 0], words[0, 1]).tolist() == [5007771, 13627641, 15360672, 7629810]


@pytest.mark.parametrize("seed", [0, 1, 2, -1, 2**40])
def test_noise_is_uncorrelated(seed):
    noise_is_uncorrelated(lambda step, layer, rank: uniforms(seed, step, layer, rank), N)


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
