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

    def add(self, *, raw_bytes: int, coded_numel: int, exact_numel: int) -> None:
        """Count a bucket."""
        self._counts["raw_bytes"] += raw_bytes
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
            **{name: self._counts[name] for name in ("steps", "raw_bytes", "coded_numel", "exact_numel")},
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

    On CPU the first share above 30 % gives a warning. On CUDA the shares are only reported, by :meth:`read`.

    Args:
        name: number of a layer -> its name.
        warmup_steps: number of steps before the first compressed one.
    """

    def __init__(self, name: Callable[[int], str], warmup_steps: int) -> None:
        self._name, self._warmup_steps = name, warmup_steps
        self._lost: dict[int, float] = {}
        self._unread: dict[tuple[int, ...], torch.Tensor] = {}  # shares that are still on a CUDA device
        self._complained = False

    def measures_at(self, step: int) -> bool:
        """Whether clipping is measured in this step."""
        since = step - self._warmup_steps
        return since < _CLIP_STEPS or since % _CLIP_EVERY == 0

    def measure_bucket(self, flat: torch.Tensor, bucket: Bucket, step: int) -> str | None:
        """Measure the compressed layers of `flat`, (n,). Returns the text of a warning, or None."""
        return self.measure(flat, ((group.codec, group.layers) for group in bucket.coded), step)

    def measure(self, flat: torch.Tensor, groups: Iterable[tuple[Codec, Segments]], step: int) -> str | None:
        """As :meth:`measure_bucket`, with the layers given as pairs of a codec and its layers."""
        if not self.measures_at(step):
            return None
        complaints = [self._measure(flat, codec, layers) for codec, layers in groups]
        return next(filter(None, complaints), None)

    def _measure(self, flat: torch.Tensor, codec: Codec, layers: Segments) -> str | None:
        lost = codec.norm_lost(flat, layers)
        if lost is None:
            return None
        numbers = layers.layers.tolist()
        if lost.is_cuda:  # :meth:`read` copies it to the host; here the host must not wait for the device
            self._unread[tuple(numbers)] = lost
            return None
        self._lost.update(zip(numbers, lost.tolist(), strict=True))
        share, worst = lost.max(dim=0)
        if share <= _CLIP_WARNING or self._complained:
            return None
        self._complained = True
        return (
            f"clipping takes {share:.0%} of the gradient norm of {self._name(numbers[worst])}: its gradient "
            "is far from Gaussian. Consider skip=[...] for such layers, a larger clip, or the int8 codec; "
            "state.stats() has the share of every layer (clip_norm_lost/...)."
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
