"""What a state counts, and what clipping takes from layers."""

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

_CLIP_WARNING = 0.3  # share of a layer's gradient norm
_CLIP_STEPS, _CLIP_EVERY = 3, 100  # the first coded steps, and every so many after, are looked at
_NOT_CODECS = ("exact", "intra", "scales", "checks", "lengths")  # of the labels that a path counts bytes under


class Watching(Protocol):
    """What is told of a state's steps: :class:`terncomm.Watch`."""

    def step_begins(self) -> None:
        """Before each step."""

    def statistics_end(self) -> None:
        """Before statistics are reset."""


class Statistics:
    """Counters of one state on this rank, since the start or the last :meth:`reset`."""

    def __init__(self) -> None:
        self.account = Account()
        self.watches: list[Watching] = []
        self._counts: Counter[str] = Counter()
        self._transports: dict[str, tuple[Metered, int]] = {}  # and what each had sent before

    def connect(self, transports: Mapping[str, Metered]) -> None:
        """Count what these transports send from now on."""
        self._transports = {group: (each, each.sent_bytes) for group, each in transports.items()}

    def add(self, *, raw_bytes: int, coded_numel: int, exact_numel: int) -> None:
        """Count a bucket."""
        self._counts["raw_bytes"] += raw_bytes
        self._counts["coded_numel"] += coded_numel
        self._counts["exact_numel"] += exact_numel

    def step_begins(self) -> None:
        """Count a step, and tell those that watch."""
        for each in list(self.watches):  # one may end
            each.step_begins()
        self._counts["steps"] += 1

    def reset(self) -> None:
        """Start counting from zero."""
        for each in self.watches:
            each.statistics_end()
        self._counts.clear()
        self.account = Account()
        self.connect({group: each for group, (each, _) in self._transports.items()})

    def read(self) -> dict[str, int | float]:
        """The counters by name; see :meth:`terncomm.hooks.averaging.Averaging.stats`."""
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
    """Looks now and then at what clipping takes from each layer, for it takes time, and complains once if it is much.

    Args:
        name: of a layer, by its number.
        warmup_steps: steps before the first in which anything is coded.
    """

    def __init__(self, name: Callable[[int], str], warmup_steps: int) -> None:
        self._name, self._warmup_steps = name, warmup_steps
        self._lost: dict[int, float] = {}
        self._unread: dict[tuple[int, ...], torch.Tensor] = {}  # shares that are still on a CUDA device
        self._complained = False

    def looks(self, step: int) -> bool:
        """Whether this step is looked at."""
        since = step - self._warmup_steps
        return since < _CLIP_STEPS or since % _CLIP_EVERY == 0

    def look(self, flat: torch.Tensor, bucket: Bucket, step: int) -> str | None:
        """Note the shares of a bucket's coded layers; a complaint, or None."""
        return self.look_at(flat, ((group.codec, group.layers) for group in bucket.coded), step)

    def look_at(self, flat: torch.Tensor, groups: Iterable[tuple[Codec, Segments]], step: int) -> str | None:
        """The same for layers of a buffer, each under a codec."""
        if not self.looks(step):
            return None
        complaints = [self._look(flat, codec, layers) for codec, layers in groups]
        return next(filter(None, complaints), None)

    def _look(self, flat: torch.Tensor, codec: Codec, layers: Segments) -> str | None:
        lost = codec.norm_lost(flat, layers)
        if lost is None:
            return None
        numbers = layers.layers.tolist()
        if lost.is_cuda:  # read when statistics are asked for; the device must not be waited for here
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
        """The share of each layer when last looked at, as clip_norm_lost/NAME."""
        for numbers, lost in self._unread.items():
            self._lost.update(zip(numbers, lost.tolist(), strict=True))
        self._unread.clear()
        return {f"clip_norm_lost/{self._name(number)}": lost for number, lost in sorted(self._lost.items())}


def advise(text: str, rank: int) -> None:
    """Warn on rank 0."""
    if rank != 0:
        return
    try:
        warnings.warn(text, stacklevel=2)
    except UserWarning:  # a filter made it an error: one rank alone must not stop for advice
        _log.warning(text)
