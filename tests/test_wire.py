import pytest
import torch

from terncomm.ops import pack, unpack_sum
from terncomm.wire import packing_for

ALPHABETS = [
    (-1, 1),
    (-2, 2),
    (-3, 3),
    (-4, 4),
    (-5, 5),
    (-6, 6),
    (-8, 8),
    (-9, 9),
    (-16, 16),
    (-127, 127),
    (-508, 508),
    (-(2**20) + 1, 2**20),
]


def codes_of(alphabet: tuple[int, int], n: int, seed: int = 0) -> torch.Tensor:
    low, high = alphabet
    return torch.randint(low, high + 1, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_round_trip_of_every_length(alphabet):
    packing = packing_for(*alphabet)
    block = 64 * packing.digits
    for n in [*range(1, 301), *(k * block + d for k in (1, 2, 3) for d in (-1, 0, 1))]:
        codes = codes_of(alphabet, n, seed=n)
        packed = pack(codes, packing)
        assert packed.dtype == torch.uint8
        assert len(packed) == packing.nbytes(n) == -(-n // packing.digits) * packing.word_bytes
        assert torch.equal(unpack_sum(packed[None], packing, n), codes)


def test_words_are_the_tightest():
    layout = {W: (packing_for(-W, W).digits, packing_for(-W, W).word_bytes) for W in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16)}
    assert layout == {
        1: (5, 1), 2: (27, 8), 3: (11, 4), 4: (5, 2), 5: (9, 4), 6: (17, 8), 7: (2, 1), 8: (15, 8), 9: (15, 8),
        16: (3, 2),
    }  # fmt: skip
    assert packing_for(-127, 127)[2:] == (1, 1)
    for high in range(1, 400):
        packing = packing_for(-high, high)
        radix = 2 * high + 1
        assert radix**packing.digits <= 2 ** (8 * packing.word_bytes) < radix ** (packing.digits + 1)


def test_golden_bytes():
    """The format on the wire, written out by hand from the specification; never regenerated."""
    ternary = packing_for(-1, 1)
    # 7 codes: words ceil(7 / 5) = 2, so word j = sum over k of digit[2 k + j] 3^k; missing codes are 0, digit 1.
    codes = torch.tensor([1, -1, 0, 1, -1, 1, 1])
    # word 0: digits 2, 1, 0, 2, 1 -> 2 + 3 + 0 + 54 + 81; word 1: digits 0, 2, 2, 1, 1 -> 0 + 6 + 18 + 27 + 81
    assert pack(codes, ternary).tolist() == [140, 132]
    # A whole block: word j holds codes j, 64 + j, ..., 256 + j.
    block = torch.zeros(320, dtype=torch.int32)
    block[[0, 64, 256, 319]] = torch.tensor([1, -1, 1, -1], dtype=torch.int32)
    golden = [121] * 64
    golden[0] = 121 + 1 - 3 + 81
    golden[63] = 121 - 81
    assert pack(block, ternary).tolist() == golden
    # Sums of 4: base 9, 16 bits, little-endian. digits 8, 0, 4, 4, 4 -> 8 + 0 + 324 + 2916 + 26244 = 29492 = 0x7334.
    assert pack(torch.tensor([4, -4]), packing_for(-4, 4)).tolist() == [0x34, 0x73]
    # Sums of 8: base 17, 15 digits in 64 bits; the first digit 16, all others 8.
    word = 16 + sum(8 * 17**k for k in range(1, 15))
    assert bytes(pack(torch.tensor([8]), packing_for(-8, 8)).tolist()) == word.to_bytes(8, "little")
    assert pack(torch.tensor([-127, 0, 127]), packing_for(-127, 127)).tolist() == [0, 127, 254]


@pytest.mark.parametrize("alphabet", [(1, 3), (-3, -1), (0, 0), (-(2**20), 2**20)])
def test_alphabets_that_cannot_be_are_refused(alphabet):
    with pytest.raises(ValueError, match="an alphabet must hold 0"):
        packing_for(*alphabet)
