"""Statistics of a state, and the share of each layer's gradient norm that is clipped."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from logging import getLogger
from typing import Protocol

import torch

from terncomm.codecs import Codec
from terncomm.path.account import Account
from terncomm.path.bucket import Bucket
from terncomm.segments import Segments
from terncomm.transports import Metered

_log = getLogger("terncomm")

_CLIP_WARNING = 0.3  # warn if more than this share of a layer's gradient norm is clipped
_CLIP_WORSE = 0.1  # and again if the largest share has grown by this
_CLIP_NAMED = 5  # layers that a warning names at most
_CLIP_STEPS, _CLIP_EVERY = 3, 100  # measured in the first 3 compressed steps, then in every 100th
_NOT_CODECS = ("exact", "intra", "scales", "checks", "lengths")  # labels of counted bytes that are no codec's name


class Watching(Protocol):
    """Interface of an observer of a state's steps, such as :class:`terncomm.Watch`."""

    def on_step(self) -> None:
        """Called before each step."""

    def on_reset(self) -> None:
        """Called before statistics are reset."""


class Statistics:
    """Counters of one state on this rank, since the start or the last :meth:`reset`."""

    def __init__(self) -> None:
        self.account = Account()
        self.watches: list[Watching] = []
        self._counts: Counter[str] = Counter()
        self._transports: dict[str, tuple[Metered, int]] = {}  # and its sent_bytes when counting began

    def connect(self, transports: Mapping[str, Metered]) -> None:
        """Count what these transports send from now on."""
        self._transports = {group: (each, each.sent_bytes) for group, each in transports.items()}

    def add(self, *, raw_bytes: int, ring_bytes: int, coded_numel: int, exact_numel: int) -> None:
        """Count a bucket."""
        self._counts["raw_bytes"] += raw_bytes
        self._counts["ring_bytes"] += ring_bytes
        self._counts["coded_numel"] += coded_numel
        self._counts["exact_numel"] += exact_numel

    def on_step(self) -> None:
        """Call all observers, then count a step."""
        for each in list(self.watches):  # a copy: an observer may remove itself
            each.on_step()
        self._counts["steps"] += 1

    def reset(self) -> None:
        """Start counting from zero."""
        for each in self.watches:
            each.on_reset()
        self._counts.clear()
        self.account = Account()
        self.connect({group: each for group, (each, _) in self._transports.items()})

    def read(self) -> dict[str, int | float]:
        """The counters by name; see :meth:`terncomm.hooks.reducer.GradientReducer.stats`."""
        clock, labels = self.account.clock, self.account.sent_bytes
        sent = {group: each.sent_bytes - before for group, (each, before) in self._transports.items()}
        return {
            **{name: self._counts[name] for name in ("steps", "raw_bytes", "ring_bytes", "coded_numel", "exact_numel")},
            "exact_bytes": labels["exact"] + labels["intra"],
            "wire_bytes": sum(sent.values()),
            **({"intra_bytes": sent["node"]} if "node" in sent else {}),
            **{f"wire_bytes/{label}": n for label, n in sorted(labels.items()) if label not in _NOT_CODECS},
            "encode_s": clock.encode_s,
            "exchange_s": clock.exchange_s + clock.wire_s,
            "decode_s": clock.decode_s,
        }


class ClipWatch:
    """Measures which share of each layer's gradient norm is clipped, in some steps only, for it takes time.

    On CPU the step after a measurement gives a warning if shares are above 30 %, and again if the largest share has
    grown by 10 points. On CUDA the shares are only reported, by :meth:`read`.

    Args:
        name: number of a layer -> its name.
        warmup_steps: number of steps before the first compressed one.
    """

    def __init__(self, name: Callable[[int], str], warmup_steps: int) -> None:
        self._name, self._warmup_steps = name, warmup_steps
        self._lost: dict[int, float] = {}
        self._unread: dict[tuple[int, ...], torch.Tensor] = {}  # shares that are still on a CUDA device
        self._measured: int | None = None  # a step whose shares have not been looked at
        self._told = _CLIP_WARNING - _CLIP_WORSE  # the largest share that a warning has named

    def measures_at(self, step: int) -> bool:
        """Whether clipping is measured in this step."""
        since = step - self._warmup_steps
        return since < _CLIP_STEPS or since % _CLIP_EVERY == 0

    def measure_bucket(self, flat: torch.Tensor, bucket: Bucket, step: int) -> None:
        """Measure the compressed layers of `flat`, (n,)."""
        self.measure(flat, ((group.codec, group.layers) for group in bucket.coded), step)

    def measure(self, flat: torch.Tensor, groups: Iterable[tuple[Codec, Segments]], step: int) -> None:
        """As :meth:`measure_bucket`, with the layers given as pairs of a codec and its layers."""
        if not self.measures_at(step):
            return
        for codec, layers in groups:
            if (lost := codec.norm_lost(flat, layers)) is None:
                continue
            numbers = layers.layers.tolist()
            if lost.is_cuda:  # :meth:`read` copies it to the host; here the host must not wait for the device
                self._unread[tuple(numbers)] = lost
                continue
            self._lost.update(zip(numbers, lost.tolist(), strict=True))
            self._measured = step

    def complaint(self, step: int) -> str | None:
        """The text of a warning about the steps before this one, or None."""
        if self._measured is None or self._measured == step:
            return None
        self._measured = None
        lost = sorted(((share, number) for number, share in self._lost.items() if share > _CLIP_WARNING), reverse=True)
        if not lost or lost[0][0] <= self._told + _CLIP_WORSE:
            return None
        self._told = lost[0][0]
        named = ", ".join(f"{share:.0%} of {self._name(number)}" for share, number in lost[:_CLIP_NAMED])
        more = f" and over {_CLIP_WARNING:.0%} of {len(lost) - _CLIP_NAMED} more" if len(lost) > _CLIP_NAMED else ""
        return (
            f"clipping takes much of the gradient norm of some layers: {named}{more}. Their gradients are far from "
            "Gaussian. Consider skip=[...] for such layers, a larger clip, or the int8 codec; state.stats() has the "
            "share of every layer (clip_norm_lost/...)."
        )

    def read(self) -> dict[str, float]:
        """clip_norm_lost/NAME: the share of each layer, in [0, 1], when last measured."""
        for numbers, lost in self._unread.items():
            self._lost.update(zip(numbers, lost.tolist(), strict=True))
        self._unread.clear()
        return {f"clip_norm_lost/{self._name(number)}": lost for number, lost in sorted(self._lost.items())}


def warn_on_rank_0(text: str, rank: int) -> None:
    """Warn on rank 0."""
    if rank != 0:
        return
    try:
        warnings.warn(text, stacklevel=2)
    except UserWarning:  # the user's filter makes warnings errors, but rank 0 must not stop alone
        _log.warning(text)
