"""What averages a model's gradients bucket by bucket, whatever calls it: options, layers, step, statistics."""

import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.distributed as dist

from terncomm import ops
from terncomm.codecs import Codec, codec_for
from terncomm.exchange import ALGORITHMS
from terncomm.hooks.connection import Connection
from terncomm.keys import Key
from terncomm.layers import Layers
from terncomm.levels import Levels, all_reduce_mean_between
from terncomm.reduce import DTYPES, Clock, Unchecked, all_reduce_mean, all_reduce_mean_sparse, exact_traffic
from terncomm.segments import Segments
from terncomm.transports import Metered
from terncomm.version import __version__

_log = logging.getLogger("terncomm")

_sparse_warned = False  # once in a process
_CLIP_WARNING = 0.3  # share of a layer's gradient norm
_CLIP_STEPS, _CLIP_EVERY = 3, 100  # the first coded steps, and every so many after, are looked at


class Watching(Protocol):
    """What is told of a state's steps: :class:`terncomm.Watch`."""

    def step_begins(self) -> None:
        """Before each step."""

    def statistics_end(self) -> None:
        """Before statistics are reset."""


class Averaging:
    """Options, layers, step and statistics; a subclass hands it buckets over a transport.

    Args:
        codec: "terngrad", "int8", or a codec such as `Ternary(clip=2.5)`.
        skip: parameters that travel exactly, beside those exempt by rule: names, names of modules, shell patterns.
        min_numel: parameters with fewer elements, or with one dimension, travel exactly (TernGrad's
            `size_to_binarize`).
        warmup_steps: first steps in which everything travels exactly (TernGrad's `floating_grad_epoch`, in steps).
        exchange: "auto", "gather" or "two_phase"; the result is the same bits.
        seed: of the rounding noise; equal on all ranks.
        exempt: groups found by the model's structure that travel exactly, of "embedding" and "head"; `()` codes them
            too, as published.
        named_parameters: of the model.

    Raises:
        ValueError, TypeError: an option that cannot be.
    """

    _OWN: tuple[str, ...] = (
        "_connection",
        "_transport",
        "_levels",
        "_later",
        "_layouts",
        "_watches",
        "_failed",
    )  # what belongs to this process alone

    def __init__(
        self,
        codec: str | Codec,
        *,
        skip: Collection[str],
        min_numel: int,
        warmup_steps: int,
        exchange: str,
        seed: int,
        exempt: Collection[str],
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    ) -> None:
        self.codec = codec_for(codec)
        self.warmup_steps = _count("warmup_steps", warmup_steps)
        if exchange not in ALGORITHMS:
            raise ValueError(f"exchange must be one of {', '.join(ALGORITHMS)}, got {exchange!r}")
        self.exchange = exchange
        self.seed = Key(seed).seed
        named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        for name, parameter in named:
            if not (parameter.dtype in DTYPES or parameter.is_complex()):
                raise TypeError(f"gradients must be {', '.join(map(str, DTYPES))}; {name} is {parameter.dtype}")
        self._layers = Layers(named, skip=skip, min_numel=_count("min_numel", min_numel), exempt=exempt)
        self._step = -1
        self._enabled = self._enabled_next = True
        self._clip_lost: dict[int, float] = {}
        self._clip_unread: dict[tuple[int, ...], torch.Tensor] = {}  # shares that are still on a CUDA device
        self._clip_warned = False
        self._copied = False
        self._in_levels = False  # whether it was made with intra_group, which a copy has not
        self._detach()
        self.reset_stats()
        ops.compile_kernels()

    def _detach(self) -> None:
        """Hold nothing that belongs to this process alone."""
        self._connection: Connection | None = None
        self._transport: Metered | None = None
        self._levels: Levels | None = None
        self._later: list[Unchecked] = []  # headers on their way from the device
        self._layouts: dict[tuple[int, ...], tuple[Segments, Segments]] = {}
        self._watches: list[Watching] = []
        self._failed: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or pickle of a model."""
        return {name: value for name, value in vars(self).items() if name not in self._OWN}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        vars(self).update(saved)
        self._copied = True
        self._layers.forget_unnamed()  # they are numbered as they are seen; without the model these are other objects
        self._detach()
        self.reset_stats()

    # ---- what a user calls --------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The step that was begun last; -1 before the first."""
        return self._step

    @property
    def rank(self) -> int:
        """This rank, of the whole job where that is torch.distributed's."""
        if self._connection is None and self._transport is not None:
            return self._transport.rank
        return dist.get_rank() if dist.is_initialized() else 0

    def stats(self) -> dict[str, int | float]:
        """Plain numbers of this rank since the start or the last :meth:`reset_stats`.

        steps: backward passes that were reduced. raw_bytes: size of the gradients to be averaged. wire_bytes: sent
        by this rank, everything counted (codes, scales, checks, padding, exact parts). exact_bytes: of these, what the
        exact parts took. coded_numel, exact_numel: elements that went either way. encode_s, exchange_s, decode_s:
        seconds in the phases of the path, on its own thread. clip_norm_lost/NAME: share of the layer's gradient norm
        that clipping took, when last looked at (the first three coded steps and every hundredth). intra_bytes, with
        `intra_group`: of wire_bytes, what was sent inside the node.
        """
        self._check_arrived()
        for layers, lost in self._clip_unread.items():
            self._clip_lost.update(zip(layers, lost.tolist(), strict=True))
        self._clip_unread.clear()
        clock = self._clock
        return {
            **self._counts,
            "wire_bytes": self._sent() - self._sent_before,
            **({"intra_bytes": self._levels.inside.sent_bytes - self._inside_before} if self._levels else {}),
            "encode_s": clock.encode_s,
            "exchange_s": clock.exchange_s,
            "decode_s": clock.decode_s,
            **{f"clip_norm_lost/{self._layers.name(number)}": lost for number, lost in sorted(self._clip_lost.items())},
        }

    def reset_stats(self) -> None:
        """Start counting from zero."""
        for each in self._watches:
            each.statistics_end()
        self._counts = dict.fromkeys(("steps", "raw_bytes", "exact_bytes", "coded_numel", "exact_numel"), 0)
        self._clock = Clock()
        self._sent_before = self._sent()
        self._inside_before = self._levels.inside.sent_bytes if self._levels else 0

    def disable(self) -> None:
        """From the next step on, average everything exactly. Call on every rank."""
        self._enabled_next = False

    def enable(self) -> None:
        """From the next step on, code again. Call on every rank."""
        self._enabled_next = True

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs: plain numbers. The noise is a function of seed and step, so nothing else is kept."""
        self._check_arrived()
        return {"step": self._step, "seed": self.seed}

    def load_state_dict(self, saved: dict[str, int]) -> None:
        """Go on after the saved step. On every rank; the world size may be another.

        Raises:
            ValueError: keys are missing, or the seed is another than this state's.
        """
        if missing := {"step", "seed"} - saved.keys():
            raise ValueError(f"not a terncomm state: it lacks {', '.join(sorted(missing))}")
        if saved["seed"] != self.seed:
            raise ValueError(
                f"the checkpoint has seed {saved['seed']}, this state {self.seed}; register with that seed"
            )
        self._step = int(saved["step"])

    def codes(self, parameter: torch.Tensor) -> bool:
        """Whether this parameter's gradient is coded (once warm-up is over), or travels exactly."""
        return self._layers.codes(parameter)

    # ---- what a subclass calls ---------------------------------------------------------------------------------

    def _configuration(self) -> dict[str, Any]:
        """What must be equal on all ranks."""
        return {
            "terncomm version": __version__,
            "codec": repr(self.codec),
            "seed": self.seed,
            "skip": sorted(self._layers.skip),
            "min_numel": self._layers.min_numel,
            "warmup_steps": self.warmup_steps,
            "exchange": self.exchange,
            "exempt": sorted(self._layers.exempt),
            "coded parameters": self._layers.coded_names,
        }

    def _summary(self) -> str:
        """One line for the log."""
        sizes = {parameter: parameter.numel() for parameter in self._layers.numbers}
        coded = [numel for parameter, numel in sizes.items() if self.codes(parameter)]
        total = sum(sizes.values())
        world_size = self._transport.world_size if self._transport else 1
        return (
            f"{self.codec!r}: {len(coded)} of {len(sizes)} parameter tensors coded, "
            f"{sum(coded) / max(total, 1):.1%} of {total} elements; seed {self.seed}, {world_size} ranks"
        )

    def _connect(self, connection: Connection) -> None:
        """Use this connection from now on."""
        self._connection, self._transport = connection, connection.transport
        self._sent_before = 0

    def _sent(self) -> int:
        """Bytes that this rank has sent on all its transports."""
        return sum(each.sent_bytes for each in (self._transport, *(self._levels or ())) if each)

    def _begin_step(self, step: int | None = None) -> None:
        """The first bucket of a backward pass comes; one that is aborted later shifts nothing."""
        for each in list(self._watches):  # one may end
            each.step_begins()
        self._step = self._step + 1 if step is None else step
        self._counts["steps"] += 1
        self._enabled = self._enabled_next

    def _work(
        self, buffer: torch.Tensor, parameters: Sequence[torch.Tensor], index: int, transport: Metered
    ) -> Callable[[], torch.Tensor]:
        """What is to be done with bucket `index`, the gradients of `parameters` in a row; called in bucket order."""
        self._check_arrived()
        key = Key(self.seed, self._step, index)
        if buffer.layout == torch.sparse_coo:
            self._warn_of_sparse(parameters[0], transport)
            return lambda: self._run_sparse(buffer, key, transport)
        if buffer.layout != torch.strided:
            raise TypeError(f"gradients must be dense or sparse_coo, got a bucket of layout {buffer.layout}")
        coded, exact = self._layout(buffer, parameters)
        coding = transport if self._levels is None else self._levels.between
        if not self._enabled or self._step < self.warmup_steps or coding.world_size == 1:
            coded, exact = _nothing_coded(buffer.numel())

        def work() -> torch.Tensor:
            self._run(buffer, coded, exact, key, transport)
            return buffer

        return work

    @contextmanager
    def _failing_together(self, where: Callable[[], str]) -> Iterator[None]:
        """For reductions on the caller's own thread: the other ranks are told of an error, and it stays."""
        if self._failed is not None:
            raise RuntimeError(f"an earlier gradient reduction failed: {self._failed}") from self._failed
        try:
            yield
        except Exception as error:
            self._failed = error
            if self._connection is None:
                raise
            failure = self._connection.fail(error, f"{where()}, {self._clock.phase}")
            raise failure from (None if failure is error else error)

    def _check_arrived(self) -> None:
        """Raise if ranks turned out to differ in an earlier bucket whose headers have reached the host by now."""
        while self._later and self._later[0].arrived():
            self._later[0].check()  # stays, if it raises: whoever comes next must be told, too
            self._later.pop(0)

    def _run(self, flat: torch.Tensor, coded: Segments, exact: Segments, key: Key, transport: Metered) -> None:
        with self._clock("encode", key, "watch clipping"):
            complaint = self._watch_clipping(flat, coded, key.step)
        codec = self.codec if len(coded) else None
        later = self._later if flat.is_cuda else None
        options: Any = {"key": key, "exchange": self.exchange, "exact": exact, "clock": self._clock, "later": later}
        if self._levels is None:
            all_reduce_mean(flat, coded, codec, transport, **options)
            floats = exact_traffic(exact, flat.element_size(), transport.world_size)
        else:
            floats = all_reduce_mean_between(flat, coded, codec, *self._levels, **options)
        counts = self._counts
        counts["raw_bytes"] += flat.numel() * flat.element_size()
        counts["exact_bytes"] += floats
        counts["coded_numel"] += coded.numel
        counts["exact_numel"] += exact.numel
        if complaint is not None:
            advise(complaint, transport)

    def _run_sparse(self, gradient: torch.Tensor, key: Key, transport: Metered) -> torch.Tensor:
        later = self._later if gradient.is_cuda else None
        before = transport.sent_bytes
        mean = all_reduce_mean_sparse(gradient, transport, key=key, clock=self._clock, later=later)
        counts = self._counts
        counts["raw_bytes"] += gradient._values().nbytes + gradient._indices().nbytes
        counts["exact_bytes"] += transport.sent_bytes - before
        counts["exact_numel"] += gradient._values().numel()
        return mean

    def _warn_of_sparse(self, parameter: torch.Tensor, transport: Metered) -> None:
        global _sparse_warned
        if not _sparse_warned:
            _sparse_warned = True
            name = self._layers.name(self._layers.number(parameter))
            text = f"the gradient of {name} is sparse: the rows of such gradients are gathered from all ranks, exactly"
            advise(text, transport)

    def _layout(self, buffer: torch.Tensor, parameters: Sequence[torch.Tensor]) -> tuple[Segments, Segments]:
        """The coded and the exact layers of a bucket; DDP rebuilds buckets, so they are known by their parameters."""
        identity = tuple(map(id, parameters))
        if identity not in self._layouts:
            for parameter in parameters:
                self._check_known(parameter)
            coded, exact = self._layers.of_bucket(parameters)
            if coded.numel + exact.numel != buffer.numel():
                held = coded.numel + exact.numel
                raise RuntimeError(f"a bucket of {buffer.numel()} elements holds parameters of {held}")
            self._layouts[identity] = coded, exact
        return self._layouts[identity]

    def _check_known(self, parameter: torch.Tensor) -> None:
        if self._copied and self._layers.names and parameter not in self._layers.numbers:
            raise RuntimeError(
                "this CommState was copied or pickled without its model, and knows none of these parameters. Make a "
                "new one with the model's named_parameters, and give it load_state_dict(old.state_dict())."
            )

    def _looks_at_clipping(self, step: int) -> bool:
        """Now and then, for it takes time."""
        since = step - self.warmup_steps
        return since < _CLIP_STEPS or since % _CLIP_EVERY == 0

    def _watch_clipping(self, flat: torch.Tensor, coded: Segments, step: int) -> str | None:
        """Note what clipping takes from each layer, now and then; complain once if it is much."""
        if len(coded) == 0 or not self._looks_at_clipping(step):
            return None
        lost = self.codec.norm_lost(flat, coded)
        if lost is None:
            return None
        if lost.is_cuda:  # read when statistics are asked for; the device must not be waited for here
            self._clip_unread[tuple(coded.layers.tolist())] = lost
            return None
        self._clip_lost.update(zip(coded.layers.tolist(), lost.tolist(), strict=True))
        share, worst = lost.max(dim=0)
        if share <= _CLIP_WARNING or self._clip_warned:
            return None
        self._clip_warned = True
        name = self._layers.name(int(coded.layers[worst]))
        return (
            f"clipping takes {share:.0%} of the gradient norm of {name}: its gradient "
            "is far from Gaussian. Consider skip=[...] for such layers, a larger clip, or the int8 codec; "
            "state.stats() has the share of every layer (clip_norm_lost/...)."
        )


@lru_cache(maxsize=1024)
def _nothing_coded(numel: int) -> tuple[Segments, Segments]:
    """The layers of a bucket in which nothing is coded: the same objects each time, by which layouts are cached."""
    return Segments(()), Segments([numel])


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


def advise(text: str, transport: Metered) -> None:
    """Warn on rank 0."""
    if transport.rank != 0:
        return
    try:
        warnings.warn(text, stacklevel=2)
    except UserWarning:  # a filter made it an error: one rank alone must not stop for advice
        _log.warning(text)
