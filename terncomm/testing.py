"""Checks for a codec of one's own: the laws of :mod:`terncomm.codecs.base`, as one call for a test.

def test_my_codec():
    terncomm.testing.check_codec(MyCodec(levels=5))
"""

import pickle
from collections.abc import Callable
from typing import NamedTuple

import torch

from terncomm.codecs import Codec, Half, IntegerCodec, codec_for
from terncomm.keys import Key
from terncomm.path.account import Context
from terncomm.path.bucket import Bucket
from terncomm.path.drivers import lockstep
from terncomm.path.message import Path
from terncomm.path.reduce import all_reduce_mean, reduce_scatter
from terncomm.path.shards import Shards
from terncomm.segments import Segments

_SIZES = (1, 3, 64, 65, 700, 2049, 0, 1500)  # elements of the layers of a bucket
_NUMBERS = (4, 0, 9, 2, 7, 3, 8, 1)  # their layer numbers, which key the noise
_WORLD_SIZES = (1, 2, 5)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DRAWS = 64
_NUMEL = 1024  # elements of the layer whose mean over draws is looked at
_Z_LIMIT = 6.0  # standard errors: a sound codec is beyond them once in 500 million tests
_OTHERS = 1.0e3  # what the buffer holds beside a layer


class LawBroken(AssertionError):
    """A codec breaks a law; the message says which, with which input."""


def check_codec(codec: Codec | str, *, unbiased: bool = True) -> list[str]:
    """Check that a codec keeps the laws of its base class. Takes some seconds.

    What is reduced here goes the path of a training job: several ranks, layers of ragged sizes that are not whole
    numbers of words or blocks, uncompressed layers between them, float32, bfloat16 and float16, both exchanges, and
    buckets that are cut into pieces.

    Args:
        codec: the codec, or its name.
        unbiased: also check that the mean of many codings is the gradient. False for a codec that rounds to the nearest
            level, or that clips a uniform distribution. The check is left out where `norm_lost` says that it clips.

    Returns:
        The laws that were checked, in words.

    Raises:
        LawBroken: the codec breaks a law.
        TypeError: it is no frozen dataclass, or no codec.
        ValueError: a method returns what the path refuses; the message says what it wanted.

    >>> from terncomm import Ternary
    >>> check_codec(Ternary())[0]
    'it is a frozen dataclass that can be compared, hashed and pickled'
    """
    codec = codec_for(codec)
    laws: list[tuple[str, Callable[[Codec], None]]] = [
        ("it is a frozen dataclass that can be compared, hashed and pickled", _is_a_value),
        ("the gradient is not changed before it is decoded, nor what lies beside it", _writes_only_its_layers),
        ("what is decoded does not depend on where a layer lies, or on what lies beside it", _place_does_not_matter),
        ("all ranks get the same bits, in both exchanges, with pieces of any size", _same_bits),
        ("a layer of zeros stays zero, and another one does not become zero", _zeros),
        ("an element that is not finite makes its segment non-finite, and no other layer", _not_finite),
        ("ranks may agree on some segments at a time", _agrees_in_parts),
        ("a reduce-scatter, whose rows end inside layers, gives the mean and the sum", _scattered),
        ("each step, each rank and each layer has its own noise, or there is none", _noise),
    ]
    if unbiased and not _clips(codec):
        laws.append(("the mean of many codings is the gradient", _unbiased))
    for law, check in laws:
        try:
            check(codec)
        except LawBroken as broken:
            raise LawBroken(f"{codec!r} breaks a law: {law}. {broken}") from None
    return [law for law, _ in laws]


def _require(holds: bool | torch.Tensor, otherwise: str) -> None:
    if not holds:
        raise LawBroken(otherwise)


class _Layout(NamedTuple):
    """Layers under the codec, and those without one, in one buffer."""

    coded: Segments
    exact: Segments
    words: str

    @property
    def numel(self) -> int:
        return max(self.coded.extent, self.exact.extent)


def _dense() -> _Layout:
    return _Layout(Segments(_SIZES, layers=_NUMBERS), Segments(()), "layers one after another")


def _with_gaps() -> _Layout:
    """A layer of 5 elements without a codec before each coded layer, and one at the end."""
    ends = torch.tensor(_SIZES).cumsum(0)
    offsets = (ends - torch.tensor(_SIZES) + 5 * torch.arange(1, len(_SIZES) + 1)).tolist()
    gaps = [offset - 5 for offset in offsets] + [offsets[-1] + _SIZES[-1]]
    others = [100 + number for number in range(len(gaps))]
    return _Layout(
        Segments(_SIZES, offsets=offsets, layers=_NUMBERS),
        Segments([5] * len(gaps), offsets=gaps, layers=others),
        "layers with uncompressed layers between them",
    )


def _gradients(world_size: int, layout: _Layout, dtype: torch.dtype) -> torch.Tensor:
    """(W, n): the same values for each layer, wherever it lies; large ones beside them."""
    found = torch.full((world_size, layout.numel), _OTHERS, dtype=dtype)
    for rank in range(world_size):
        generator = torch.Generator().manual_seed(rank)
        for offset, size in zip(layout.coded.offsets.tolist(), layout.coded.sizes, strict=True):
            found[rank, offset : offset + size] = torch.randn(size, generator=generator).to(dtype)
    return found


def _reduced(
    codec: Codec, layout: _Layout, own: torch.Tensor, *, exchange: str = "auto", piece: int | None = None, step: int = 0
) -> torch.Tensor:
    """The mean, (n,), after checking that all ranks have the same bits."""
    bucket = Bucket([(layout.coded, codec), (layout.exact, None)])
    contexts = [Context(Key(5, step, 3), rank, len(own), piece=piece) for rank in range(len(own))]
    flats: list[torch.Tensor] = list(own.clone())
    lockstep([all_reduce_mean(f, bucket, c, exchange=exchange) for f, c in zip(flats, contexts, strict=True)])
    for rank, flat in enumerate(flats):
        place = f"{len(own)} ranks, {own.dtype}, {layout.words}, exchange {exchange}, pieces of {piece} elements"
        _require(_equal(flat, flats[0]), f"Ranks 0 and {rank} have different bits: {place}")
    return flats[0]


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _is_a_value(codec: Codec) -> None:
    _require(bool(codec.name), "Its name is empty")
    try:
        copy = pickle.loads(pickle.dumps(codec))
    except Exception as error:
        raise LawBroken(f"It cannot be pickled: {error}") from error
    _require(copy == codec and hash(copy) == hash(codec) and repr(copy) == repr(codec), f"A copy is {copy!r}")
    if isinstance(codec, IntegerCodec):
        low, high = codec.alphabet
        _require(low <= 0 <= high and low < high, f"The alphabet {low}..{high} does not hold 0 and another code")
        _require(codec.planes >= 1, f"planes is {codec.planes}")


def _same_bits(codec: Codec) -> None:
    for world_size in _WORLD_SIZES:
        for dtype in _DTYPES:
            layout = _with_gaps()
            own = _gradients(world_size, layout, dtype)
            first = _reduced(codec, layout, own, exchange="gather")
            _require(bool(first.isfinite().all()), f"Finite gradients became non-finite: {world_size} ranks, {dtype}")
            for exchange, piece in (("two_phase", None), ("gather", 900), ("two_phase", 900)):
                other = _reduced(codec, layout, own, exchange=exchange, piece=piece)
                words = f"{world_size} ranks, {dtype}: exchange {exchange} in pieces of {piece} elements"
                _require(_equal(first, other), f"Other bits than with an undivided gather: {words}")


def _place_does_not_matter(codec: Codec) -> None:
    alone = _dense()
    for world_size in (1, 3):
        for dtype in _DTYPES:
            wanted = alone.coded.take(_reduced(codec, alone, _gradients(world_size, alone, dtype)))
            among = _with_gaps()
            found = among.coded.take(_reduced(codec, among, _gradients(world_size, among, dtype)))
            pairs = zip(torch.split(wanted, list(_SIZES)), torch.split(found, list(_SIZES)), strict=True)
            for number, size, (one, other) in zip(_NUMBERS, _SIZES, pairs, strict=True):
                _require(
                    _equal(one, other),
                    f"Layer {number}, of {size} elements in {dtype}, is decoded to {_some(other)} with uncompressed "
                    f"layers beside it, and to {_some(one)} without. `flat` is the whole buffer: segment s is "
                    "flat[segments.offsets[s] : segments.offsets[s] + segments.sizes[s]]",
                )


def _some(values: torch.Tensor) -> str:
    return ", ".join(f"{value:.3g}" for value in values[:3].tolist()) + (", ..." if len(values) > 3 else "")


def _writes_only_its_layers(codec: Codec) -> None:
    layout = _with_gaps()
    for dtype in _DTYPES:
        own = _gradients(2, layout, dtype)
        if isinstance(codec, IntegerCodec):
            flat, segments = own[0].clone(), codec.scaled(layout.coded)
            local = codec.measure(flat, segments)
            codec.encode(flat, segments, local, codec.agree(local[None]), Key(1))
            _require(_equal(flat, own[0]), f"measure or encode changed `flat`, {dtype}")
        mean = _reduced(codec, layout, own)
        _require(_equal(layout.exact.take(mean), layout.exact.take(own[0])), f"Elements beside it changed, {dtype}")


def _zeros(codec: Codec) -> None:
    layout = _with_gaps()
    own = _gradients(3, layout, torch.float32)
    places = list(zip(layout.coded.offsets.tolist(), _SIZES, strict=True))
    for offset, size in places[::2]:
        own[:, offset : offset + size] = 0
    mean = torch.stack([_reduced(codec, layout, own, step=step).abs() for step in range(8)]).sum(dim=0)
    for place, (offset, size) in enumerate(places):
        values = mean[offset : offset + size]
        if place % 2 == 0:
            _require(not values.any(), f"A layer of {size} zeros became {_some(values)}")
        elif size:
            _require(bool(values.any()), f"A layer of {size} elements became zeros in 8 steps")


def _not_finite(codec: Codec) -> None:
    layout = _with_gaps()
    layers = layout.coded
    for bad in (torch.nan, torch.inf, -torch.inf):
        for rank in (0, 2):
            own = _gradients(3, layout, torch.float32)
            place = _NUMBERS.index(3)
            offset, size = int(layers.offsets[place]), layers.sizes[place]
            own[rank, offset + 100] = bad
            mean = _reduced(codec, layout, own)
            part = mean[_segment_at(codec, layers, offset + 100)]
            _require(not part.isfinite().any(), f"{bad} on rank {rank} of 3 became {_some(part[part.isfinite()])}")
            mean[offset : offset + size] = 0
            _require(bool(mean.isfinite().all()), f"{bad} in layer 3 made another layer non-finite")


def _segment_at(codec: Codec, layers: Segments, place: int) -> slice:
    """The part of the buffer that an element at `place` makes non-finite: its segment, or itself alone."""
    if isinstance(codec, IntegerCodec):
        for offset, size in zip(*codec.scaled(layers).table[:2].tolist(), strict=True):
            if offset <= place < offset + size:
                return slice(offset, offset + size)
    return slice(place, place + 1)


def _noise(codec: Codec) -> None:
    if not isinstance(codec, IntegerCodec):
        return
    layout = _dense()
    segments = codec.scaled(layout.coded)
    flat = _gradients(1, layout, torch.float32)[0]
    local = codec.measure(flat, segments)
    shared = codec.agree(local[None])

    def codes(key: Key, rank: int = 0) -> torch.Tensor:
        return codec.encode(flat, segments, local, shared, key, rank=rank, world_size=2)

    first = codes(Key(1))
    _require(torch.equal(first, codes(Key(1))), "The same key gives other codes: a random generator, or a state")
    _require(torch.equal(first, codes(Key(1, bucket=7))), "Codes depend on the bucket, which DDP may rebuild")
    if torch.equal(first, codes(Key(1, step=1))) and torch.equal(first, codes(Key(2))):
        return  # it rounds without noise
    _require(not torch.equal(first, codes(Key(1, step=1))), "Two steps round alike")
    _require(not torch.equal(first, codes(Key(2))), "Two seeds round alike")
    _require(not torch.equal(first, codes(Key(1), rank=1)), "Two ranks round alike, so their errors do not cancel")
    twice, both = flat[-1500:].repeat(2), codec.scaled(Segments([1500, 1500], layers=[1, 2]))
    local = codec.measure(twice, both)
    one, other = (
        codec.encode(twice, both, local, codec.agree(local[None]), Key(1)).view(codec.planes, 2, 1500).unbind(1)
    )
    _require(not torch.equal(one, other), "Two equal layers round alike")


def _agrees_in_parts(codec: Codec) -> None:
    if not isinstance(codec, IntegerCodec):
        return
    layout = _dense()
    segments = codec.scaled(layout.coded)
    everyone = torch.stack([codec.measure(own, segments) for own in _gradients(3, layout, torch.float32)])
    whole = codec.agree(everyone)
    for begin, end in ((0, 1), (1, 5), (5, len(segments))):
        part = codec.agree(everyone[..., begin:end])
        words = f"Of segments {begin} to {end - 1} alone ranks agree on {_some(part.flatten())}, among all on others"
        _require(_equal(part, whole[..., begin:end]), words)


def _scattered(codec: Codec) -> None:
    world_size, layout = 3, _dense()
    row = -(-layout.numel // world_size)
    own = torch.nn.functional.pad(_gradients(world_size, layout, torch.float32), (0, world_size * row - layout.numel))
    places = layout.coded.offsets.tolist()
    shards = Shards.in_a_row(_SIZES, places, _NUMBERS, [codec] * len(_SIZES), row, world_size)

    def path(rank: int, divisor: float) -> Path[torch.Tensor]:
        out = torch.empty(row)
        ctx = Context(Key(5, 0, 3), rank, world_size)
        yield from reduce_scatter(own[rank], shards, ctx, divisor=divisor, out=out)
        return out

    mean, total = (torch.cat(lockstep([path(rank, divisor) for rank in range(world_size)])) for divisor in (3.0, 1.0))
    where = int((total - 3 * mean).abs().argmax())
    rounding = 1e-2 if isinstance(codec, Half) else 1e-4
    close = torch.allclose(total, 3 * mean, rtol=rounding, atol=1e-6)
    _require(close, f"The sum over 3 ranks is {total[where]:.3g} where the mean is {mean[where]:.3g}")
    if not isinstance(codec, IntegerCodec) or codec.narrowing(world_size) is None:
        wanted = _reduced(codec, layout, own[:, : layout.numel])
        where = int((mean[: layout.numel] - wanted).abs().argmax())
        words = f"Element {where} is {mean[where]:.3g}, and by an all-reduce {wanted[where]:.3g}"
        _require(_equal(mean[: layout.numel], wanted), words)


def _uniform() -> torch.Tensor:
    """(2, n): the gradients of two ranks, uniform, so that the largest is only 1.7 standard deviations."""
    generator = torch.Generator().manual_seed(8)
    return 2 * torch.rand(2, _NUMEL, generator=generator) - 1


def _clips(codec: Codec) -> bool:
    lost = codec.norm_lost(_uniform().view(-1), Segments([2 * _NUMEL]))
    return lost is not None and bool(lost.max() > 1e-4)


def _unbiased(codec: Codec) -> None:
    own = _uniform()
    layout = _Layout(Segments([_NUMEL]), Segments(()), "one layer")
    wanted = own.double().mean(dim=0)
    draws = torch.stack([_reduced(codec, layout, own, step=step).double() for step in range(_DRAWS)])
    error = draws - wanted
    alike = isinstance(codec, IntegerCodec) and bool((draws == draws[0]).all())
    _require(not alike or bool(error.abs().max() < 1e-6), "It rounds alike in all steps, so errors do not cancel")
    allowed = 1e-4 if isinstance(codec, Half) else 1e-5  # for the last rounding, to the nearest float
    for words, sign in (("their sum", torch.ones(())), ("their magnitude", wanted.sign())):
        each = (error * sign).mean(dim=1)
        z = _standard_errors(each, allowed)
        _require(abs(z) < _Z_LIMIT, f"Over {_DRAWS} steps {words} is {z:.1f} standard errors off")


def _standard_errors(samples: torch.Tensor, allowed: float) -> float:
    """The mean of samples in its standard errors, but at least in units of `allowed`."""
    return float(samples.mean() / torch.clamp(samples.std() / len(samples) ** 0.5, min=allowed))
