"""`check_codec` passes sound codecs, and finds what is wrong with others."""

from dataclasses import dataclass

import pytest
import seams
import torch

from terncomm import Int8, Ternary
from terncomm.codecs.base import Agreed, Half, Local
from terncomm.keys import Key
from terncomm.testing import LawBroken, check_codec

SOUND = [
    Ternary(),
    Ternary(clip=1.0),
    Int8(),
    Int8(block=100, returned="exact"),
    Half("bf16"),
    "fp16",
    seams.MeanScale(),
    seams.BySign(),
    seams.MinMax(bits=8),
    seams.Deflated(),
]


@pytest.mark.parametrize("codec", SOUND, ids=repr)
def test_sound_codecs_pass(codec):
    laws = check_codec(codec)
    assert len(laws) == len(set(laws)) == (9 if codec == Ternary(clip=1.0) else 10), "one that clips is not unbiased"
    assert "the mean of many codings is the gradient" not in check_codec(Ternary(), unbiased=False)


class Mine(seams.Lopsided):
    """Sound; the codecs below each do one thing wrong."""


@dataclass(frozen=True)
class Dense(Mine):
    def measure(self, flat, segments):
        return super().measure(flat[: segments.numel], seams.Segments(segments.sizes, layers=segments.layers.tolist()))


@dataclass(frozen=True)
class WritesDense(Mine):
    def decode(self, totals, segments, shared, divisor, *, ranks=1, begin=0, out):
        dense = seams.Segments(segments.sizes)
        return super().decode(totals, dense, shared, divisor, ranks=ranks, begin=begin, out=out)


@dataclass(frozen=True)
class ForgetsBegin(Mine):
    def decode(self, totals, segments, shared, divisor, *, ranks=1, begin=0, out):
        return super().decode(totals, segments, shared, divisor, ranks=ranks, out=out)


@dataclass(frozen=True)
class Random(Mine):
    def codes(self, values, shared, noise):
        return super().codes(values, shared, torch.rand(noise.shape))


@dataclass(frozen=True)
class ByPlace(Mine):
    def encode(self, flat, segments, local, shared, key, **where):
        moved = seams.Segments(
            segments.sizes,
            offsets=segments.offsets.tolist(),
            layers=[n + o for n, o in zip(segments.layers.tolist(), segments.offsets.tolist(), strict=True)],
        )
        return super().encode(flat, moved, local, shared, key, **where)


@dataclass(frozen=True)
class ByBucket(Mine):
    def encode(self, flat, segments, local, shared, key, **where):
        return super().encode(flat, segments, local, shared, Key(key.seed, key.step + 1000 * key.bucket), **where)


@dataclass(frozen=True)
class OneNoise(Mine):
    def encode(self, flat, segments, local, shared, key, *, rank=0, world_size=1):
        return super().encode(flat, segments, local, shared, key, rank=0, world_size=world_size)


@dataclass(frozen=True)
class OneStep(Mine):
    def encode(self, flat, segments, local, shared, key, **where):
        return super().encode(flat, segments, local, shared, Key(key.seed, 0), **where)


@dataclass(frozen=True)
class Nearest(Mine):
    def codes(self, values, shared, noise):
        return super().codes(values, shared, torch.full_like(noise, 0.5))


@dataclass(frozen=True)
class Truncates(Mine):
    def codes(self, values, shared, noise):
        return super().codes(values, shared, noise * 0.9)


@dataclass(frozen=True)
class Erases(Mine):
    def measure_one(self, values):
        return super().measure_one(torch.nan_to_num(values, 0.0, 1.0, -1.0))


@dataclass(frozen=True)
class Spreads(Mine):
    def measure(self, flat, segments):
        found = super().measure(flat, segments)
        return Local(found if found.isfinite().all() else torch.full_like(found, torch.inf))


@dataclass(frozen=True)
class Changes(Mine):
    def measure(self, flat, segments):
        flat.mul_(0.5)
        return super().measure(flat, segments)


@dataclass(frozen=True)
class Lifts(Mine):
    def values(self, totals, shared, ranks):
        return totals[0] * shared + 1e-3


@dataclass(frozen=True)
class Loses(Mine):
    def measure_one(self, values):
        found = super().measure_one(values)
        return torch.where(found < 3.0, 0.0, found)


@dataclass(frozen=True)
class InItsType(Mine):
    def measure(self, flat, segments):
        return Local(super().measure(flat * 30_000, segments) / 30_000)


@dataclass(frozen=True)
class Counts(Mine):
    def agree(self, everyone):
        return Agreed(everyone.amax(dim=0) * (1 + everyone.shape[-1] / 1000))


@dataclass(frozen=True)
class ByPiece(Mine):
    def encode(self, flat, segments, local, shared, key, **where):
        whole = seams.Segments(segments.sizes, offsets=segments.offsets.tolist(), layers=segments.layers.tolist())
        return super().encode(flat, whole, local, shared, key, **where)


@dataclass(frozen=True)
class OneLayer(Mine):
    def encode(self, flat, segments, local, shared, key, **where):
        alike = seams.Segments(segments.sizes, offsets=segments.offsets.tolist(), layers=[0] * len(segments))
        return super().encode(flat, alike, local, shared, key, **where)


@dataclass(frozen=True)
class ByDivisor(seams.MinMax):
    def decode(self, totals, segments, shared, divisor, *, ranks=1, begin=0, out):
        ranks = round(divisor)
        return super().decode(totals, segments, shared, divisor, ranks=ranks, begin=begin, out=out)


@dataclass(frozen=True)
class Fine(seams.Lopsided):
    """Rounds to the nearest of many levels."""

    bits: int | None = None
    alphabet = -63, 126

    def codes(self, values, shared, noise):
        return torch.where(shared > 0, torch.floor(63 * values / shared + 0.5), 0.0)

    def values(self, totals, shared, ranks):
        return totals[0] * shared / 63


@dataclass(frozen=True)
class Nameless(Mine):
    name = ""


@dataclass(frozen=True)
class WithoutZero(Mine):
    alphabet = 1, 2


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        (Dense(), "with uncompressed layers beside it.*`flat` is the whole buffer"),
        (WritesDense(), "have different bits.*layers with uncompressed layers between them"),
        (ForgetsBegin(), "Other bits than with an undivided gather"),
        (Random(), "have different bits|with uncompressed layers beside it"),
        (ByPlace(), "with uncompressed layers beside it"),
        (ByBucket(), "Codes depend on the bucket"),
        (OneNoise(), "Two ranks round alike"),
        (OneStep(), "Two steps round alike"),
        (Nearest(), "the mean of many codings is the gradient"),
        (Truncates(), "standard errors off"),
        (Erases(), "(nan|inf) on rank 0 of 3 became"),
        (Spreads(), "nan in layer 3 made another layer non-finite"),
        (Changes(), "measure or encode changed `flat`"),
        (Lifts(), r"A layer of 1 zeros became 0\.00"),
        (Loses(), "became zeros in 8 steps"),
        (InItsType(), "Finite gradients became non-finite: . ranks, torch.float16"),
        (Counts(), "Of segments 0 to 0 alone ranks agree on"),
        (ByPiece(bits=None), "by an all-reduce|Other bits"),
        (OneLayer(), "Two equal layers round alike"),
        (ByDivisor(), "The sum over 3 ranks is .* where the mean is"),
        (Fine(), "It rounds alike in all steps"),
        (Nameless(), "Its name is empty"),
        (WithoutZero(), "does not hold 0"),
    ],
    ids=lambda each: "" if isinstance(each, str) else type(each).__name__,
)
def test_what_is_wrong_is_told(codec, words):
    with pytest.raises(LawBroken, match=rf"(?s)^{type(codec).__name__}\(.*breaks a law: .*({words})"):
        check_codec(codec)


def test_what_is_no_codec_is_refused():
    class Open(Ternary):
        pass

    with pytest.raises(TypeError, match="Open must be a frozen dataclass itself"):
        check_codec(Open())
    with pytest.raises(TypeError, match="codec must be a name or a terncomm codec, got 3"):
        check_codec(3)
