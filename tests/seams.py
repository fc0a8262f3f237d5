"""Small codecs, one for each thing that a codec may be, and what each computes, written down once more by hand."""

import math
import zlib
from dataclasses import dataclass

import torch

from terncomm import Ternary
from terncomm.codecs import IntegerCodec
from terncomm.codecs.base import Agreed, Local
from terncomm.keys import NO_RANK
from terncomm.ops import reference
from terncomm.segments import Segments
from terncomm.wire import Narrow


def uniform(key, layer, count, rank, world_size):
    """(count,) float64: the noise of a layer that begins at its first element."""
    words = key.streams(torch.tensor([layer]), rank=rank, world_size=world_size)[0]
    return reference.noise(torch.arange(count), *words).double() / 2**24


class Stochastic(IntegerCodec):
    """One scale or several for each layer, noise by the place in the layer, and arithmetic in float64."""

    def measure(self, flat, segments):
        found = [self.measure_one(flat[o : o + n].float()) for o, n in segment_places(segments)]
        return Local(torch.stack(found, dim=-1) if found else torch.zeros(self.statistics, 0))

    def encode(self, flat, segments, local, shared, key, *, rank=0, world_size=1):
        piece, place, inside = segments.elements(0, segments.numel)
        words = key.streams(segments.layers, rank=rank, world_size=world_size)[piece]
        noise = reference.noise(inside, words[:, 0], words[:, 1]).double() / 2**24
        codes = self.codes(flat[place].float().double(), shared.double()[..., piece], noise)
        low, high = self.alphabet
        return torch.nan_to_num(codes, 0, high, low).clamp(low, high).to(torch.int16)

    def decode(self, totals, segments, shared, divisor, *, ranks=1, begin=0, out):
        totals = totals.view(self.planes, -1)
        piece, place, _ = segments.elements(begin, begin + totals.shape[1])
        values = self.values(totals.double(), shared.double()[..., piece], ranks)
        out[place] = (values / divisor).to(out.dtype)
        return out


def segment_places(segments):
    return zip(segments.offsets.tolist(), segments.sizes, strict=True)


def finite(statistics, values):
    return statistics if values.isfinite().all() else torch.full_like(statistics, torch.inf)


@dataclass(frozen=True, kw_only=True)
class MeanScale(Ternary):
    """The scale is the mean of the ranks' scales: smaller than the largest, which clips the ranks above it."""

    def agree(self, everyone):
        total = torch.zeros_like(everyone[0])
        for one in everyone:
            total = total + one
        return Agreed(total / len(everyone))


@dataclass(frozen=True)
class MinMax(Stochastic):
    """Affine: levels between the least and the largest element of all ranks (asymmetric quantization)."""

    levels: int = 15
    bits: int | None = None  # of sums on their way back
    name = "minmax"
    statistics = 2

    @property
    def alphabet(self):
        return 0, self.levels

    def measure_one(self, values):
        if not len(values):
            return torch.zeros(2)
        return finite(torch.stack([values.min(), values.max()]), values)

    def agree(self, everyone):
        return Agreed(torch.stack([everyone[:, 0].amin(dim=0), everyone[:, 1].amax(dim=0)]))

    def codes(self, values, shared, noise):
        low, high = shared
        step = (high - low) / self.levels
        return torch.where(step > 0, torch.floor((values - low) / step + noise), 0.0)

    def narrowing(self, world_size):
        return Narrow(self.bits) if self.bits else None

    def values(self, totals, shared, ranks):
        low, high = shared
        return totals[0] * ((high - low) / self.levels) + ranks * low


@dataclass(frozen=True)
class BySign(Stochastic):
    """Two planes: bits of what is positive and of what is negative, a scale each.

    Zhu, Han, Mao, Dally, "Trained Ternary Quantization", ICLR 2017 (two scales, of weights; here of gradients).
    """

    name = "bysign"
    alphabet = 0, 1
    planes = 2
    statistics = 2

    def measure_one(self, values):
        peaks = torch.stack([values.clamp(min=0), -values.clamp(max=0)])
        return finite(peaks.amax(dim=1) if len(values) else torch.zeros(2), values)

    def codes(self, values, shared, noise):
        both = torch.stack([values.clamp(min=0), -values.clamp(max=0)])
        return torch.where(shared > 0, torch.floor(both / shared + noise), 0.0)

    def values(self, totals, shared, ranks):
        return totals[0] * shared[0] - totals[1] * shared[1]


@dataclass(frozen=True)
class Lopsided(Stochastic):
    """Codes -1, 0, 1 and 2, whose sums come back in few bits."""

    bits: int | None = 4
    name = "lopsided"
    alphabet = -1, 2
    statistics = 1

    def measure(self, flat, segments):
        return Local(super().measure(flat, segments).view(-1))

    def measure_one(self, values):
        largest = torch.maximum(values / 2, -values).amax().view(1) if len(values) else torch.zeros(1)
        return finite(largest, values)

    def codes(self, values, shared, noise):
        return torch.where(shared > 0, torch.floor(values / shared + noise), 0.0)

    def values(self, totals, shared, ranks):
        return totals[0] * shared

    def narrowing(self, world_size):
        return Narrow(self.bits) if self.bits and world_size > 2 else None


@dataclass(frozen=True)
class Deflate:
    """zlib; what follows the end of its stream is not looked at."""

    level: int = 6

    def shorten(self, packed):
        return torch.frombuffer(bytearray(zlib.compress(packed.numpy().tobytes(), self.level)), dtype=torch.uint8)

    def restore(self, received, nbytes):
        octets = zlib.decompressobj().decompress(received.numpy().tobytes())
        assert len(octets) == nbytes
        return torch.frombuffer(bytearray(octets), dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Deflated(Ternary):
    """The codes and sums of another codec, on the wire through zlib."""

    byte_coder = Deflate()


def codes_and_values(codec, own, noise):
    """What ranks' gradients of one layer, (W, n) float64, become: codes (W, planes, n), and the sum for their total."""
    world_size = len(own)
    if isinstance(codec, MeanScale):
        local = [codec.measure(each.float(), Segments([len(each)])).item() for each in own]
        scale = torch.tensor(0.0)
        for each in local:
            scale = scale + each
        scale = (scale / world_size).double()
        limits = torch.tensor(local).double().clamp(max=scale)[:, None]
        factor = (2**24 / scale).float()  # rounded up
        factor = factor if factor.double() * scale >= 2**24 else torch.nextafter(factor, torch.tensor(torch.inf))
        fixed = (own.abs().minimum(limits).float() * factor).double().floor().clamp(max=2**24)
        codes = own.sign() * (fixed / 2**24 + noise).floor()
        return codes[:, None], lambda total: total[0] * scale
    if isinstance(codec, MinMax):
        low, high = own.min(), own.max()
        step = (high - low) / codec.levels
        codes = ((own - low) / step + noise).floor()
        return codes[:, None], lambda total: total[0] * step + world_size * low
    if isinstance(codec, BySign):
        up, down = own.clamp(min=0), (-own).clamp(min=0)
        codes = torch.stack([(up / up.max() + noise).floor(), (down / down.max() + noise).floor()], dim=1)
        return codes, lambda total: total[0] * up.max() - total[1] * down.max()
    scale = torch.maximum(own.max() / 2, -own.min())
    return (own / scale + noise).floor()[:, None], lambda total: total[0] * scale


def by_hand(codec, gradients, key, layer, divisor=None, narrow=True):
    """Gradients of one layer, (W, n) -> their mean, without the path: no rows, no wire, no kernels."""
    world_size, count = gradients.shape
    noise = torch.stack([uniform(key, layer, count, rank, world_size) for rank in range(world_size)])
    codes, value = codes_and_values(codec, gradients.float().double(), noise)
    total = codes.sum(dim=0)
    how = codec.narrowing(world_size) if narrow else None
    if how is not None:
        shared = uniform(key, layer, count, NO_RANK, world_size)
        for begin in range(0, count, how.block):
            block = total[:, begin : begin + how.block]
            for plane in block:
                by = max(1, math.ceil(plane.abs().max() / how.top))
                plane.copy_(((plane + (shared[begin : begin + how.block] * by).floor()) / by).floor() * by)
    return (value(total) / (world_size if divisor is None else divisor)).to(gradients.dtype)


CODECS = [MeanScale(), MinMax(), MinMax(levels=200), BySign(), Lopsided(), Lopsided(bits=None), Lopsided(bits=8)]
