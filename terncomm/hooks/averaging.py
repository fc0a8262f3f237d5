"""What averages a model's gradients bucket by bucket, whatever calls it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from terncomm import ops
from terncomm.codecs import Codec, Rules
from terncomm.hooks.connection import Connection
from terncomm.hooks.nodes import Levels
from terncomm.hooks.options import Options
from terncomm.hooks.statistics import ClipWatch, Statistics, advise
from terncomm.keys import Key
from terncomm.layers import Layers
from terncomm.path.account import Clock, Context
from terncomm.path.bucket import Bucket, piece_for
from terncomm.path.drivers import blocking
from terncomm.path.header import Unchecked
from terncomm.path.message import Path
from terncomm.path.reduce import DTYPES, all_reduce_mean, all_reduce_mean_between_nodes, all_reduce_mean_sparse
from terncomm.path.stages import Staging
from terncomm.segments import Segments
from terncomm.torch_internals import sparse_parts
from terncomm.transports import Metered
from terncomm.version import __version__

T = TypeVar("T")

_sparse_warned = False  # once in a process


class Averaging:
    """Options, layers, steps and statistics; a subclass hands it buckets, and drives their paths.

    Args:
        options: see there.
        named_parameters: of the model.

    Raises:
        ValueError, TypeError: options that do not fit the model.
    """

    OWN: tuple[str, ...] = (
        "connection",
        "statistics",
        "transport",
        "_levels",
        "_staging",
        "_later",
        "_buckets_known",
        "_failed",
    )  # what belongs to this process alone

    def __init__(self, options: Options, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        self.options = options
        named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        for name, parameter in named:
            if not (parameter.dtype in DTYPES or parameter.is_complex()):
                raise TypeError(f"gradients must be {', '.join(map(str, DTYPES))}; {name} is {parameter.dtype}")
        self.layers = Layers(
            named, rules=options.rules, skip=options.skip, min_numel=options.min_numel, exempt=options.exempt
        )
        self.clip_watch = ClipWatch(self.layers.name, options.warmup_steps)
        self._step = -1
        self._enabled = self._enabled_next = True
        self._copied = False
        self._had_levels = False  # whether it was made with intra_group, which a copy has not
        self._detach()
        ops.compile_kernels()

    def _detach(self) -> None:
        """Hold nothing that belongs to this process alone."""
        self.connection: Connection | None = None
        self.transport: Metered | None = None
        self.statistics = Statistics()
        self._levels: Levels | None = None
        self._staging = Staging(self.options.stages)
        self._later: list[Unchecked] = []  # headers on their way from the device
        self._buckets_known: dict[tuple[int, ...], Bucket] = {}
        self._failed: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or pickle of a model."""
        return {name: value for name, value in vars(self).items() if name not in self.OWN}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        vars(self).update(saved)
        self._copied = True
        self.layers.forget_unnamed()  # they are numbered as they are seen; without the model these are other objects
        self._detach()

    # ---- what a user calls --------------------------------------------------------------------------------------

    @property
    def codec(self) -> Codec | Rules | None:
        """The codec, or the rules."""
        rules = self.options.rules
        return rules.default if len(rules.pairs) == 1 else rules

    @property
    def seed(self) -> int:
        """Of the rounding noise."""
        return self.options.seed

    @property
    def warmup_steps(self) -> int:
        """First steps in which everything travels exactly."""
        return self.options.warmup_steps

    @property
    def exchange(self) -> str:
        """As it was asked for."""
        return self.options.exchange

    @property
    def step(self) -> int:
        """The step that was begun last; -1 before the first."""
        return self._step

    @property
    def rank(self) -> int:
        """This rank, of the whole job where that is torch.distributed's."""
        if self.connection is None and self.transport is not None:
            return self.transport.rank
        return dist.get_rank() if dist.is_initialized() else 0

    def stats(self) -> dict[str, int | float]:
        """Plain numbers of this rank since the start or the last :meth:`reset_stats`.

        steps: backward passes that were reduced. raw_bytes: size of the gradients to be averaged. wire_bytes: sent
        by this rank, everything counted (codes, scales, checks, padding, exact parts). wire_bytes/CODEC: of these, what
        a codec's codes took, up and back. exact_bytes: of these, what the exact parts took. coded_numel, exact_numel:
        elements that went either way. encode_s, exchange_s, decode_s: seconds in the phases of the path, which overlap.
        clip_norm_lost/NAME: share of the layer's gradient norm that clipping took, when last looked at (the first three
        coded steps and every hundredth). intra_bytes, with `intra_group`: of wire_bytes, what was sent inside the node.
        """
        self.check_arrived()
        return {**self.statistics.read(), **self.clip_watch.read()}

    def reset_stats(self) -> None:
        """Start counting from zero."""
        self.statistics.reset()

    def disable(self) -> None:
        """From the next step on, average everything exactly. Call on every rank."""
        self._enabled_next = False

    def enable(self) -> None:
        """From the next step on, code again. Call on every rank."""
        self._enabled_next = True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: plain numbers. The noise is a function of seed and step, so nothing else is kept.

        With stages, their state too, "stages", by the names of parameters. It belongs to this rank: each saves its own.
        """
        self.check_arrived()
        kept: dict[str, Any] = {"step": self._step, "seed": self.seed}
        if self._staging.stages:
            kept["stages"] = self._staging.state_dict(*self._place, self.layers.name)
        return kept

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on after the saved step. On every rank; the world size may be another.

        State of stages belongs to a rank of a world size. Where none is given, stages go on with what they have.

        Raises:
            ValueError: keys are missing, or the seed is another than this state's; or the state of other stages, or of
                another rank or world size.
        """
        if missing := {"step", "seed"} - saved.keys():
            raise ValueError(f"not a terncomm state: it lacks {', '.join(sorted(missing))}")
        if saved["seed"] != self.seed:
            raise ValueError(
                f"the checkpoint has seed {saved['seed']}, this state {self.seed}; register with that seed"
            )
        if self._staging.stages and "stages" in saved:
            self._staging.load_state_dict(saved["stages"], *self._place, self.layers.named)
        self._step = int(saved["step"])

    @property
    def _place(self) -> tuple[int, int]:
        """Rank and world size."""
        transport = self.transports["all"]
        return transport.rank, transport.world_size

    def codes(self, parameter: torch.Tensor) -> bool:
        """Whether this parameter's gradient goes through a codec (once warm-up is over), or travels exactly."""
        return self.layers.codes(parameter)

    # ---- what engines call -------------------------------------------------------------------------------------

    def configuration(self) -> dict[str, Any]:
        """What must be equal on all ranks."""
        return {
            "terncomm version": __version__,
            **self.options.compared(),
            "skip": sorted(self.layers.skip),
            "exempt": sorted(self.layers.exempt),
            "coded parameters": self.layers.coded_names,
        }

    def summary(self) -> str:
        """One line for the log."""
        sizes = {parameter: parameter.numel() for parameter in self.layers.numbers}
        coded = [numel for parameter, numel in sizes.items() if self.codes(parameter)]
        total = sum(sizes.values())
        world_size = self.transport.world_size if self.transport else 1
        return (
            f"{self.codec!r}: {len(coded)} of {len(sizes)} parameter tensors coded, "
            f"{sum(coded) / max(total, 1):.1%} of {total} elements; seed {self.seed}, {world_size} ranks"
        )

    def connect(self, transport: Metered, connection: Connection | None = None, levels: Levels | None = None) -> None:
        """Use these from now on, and count from zero."""
        self.connection, self.transport, self._levels = connection, transport, levels
        self._had_levels = levels is not None
        self.statistics.connect(self.transports)
        self.statistics.reset()

    @property
    def transports(self) -> dict[str, Metered]:
        """This rank's transports, by the group of a message."""
        if self.transport is None:
            raise RuntimeError("a copy of this object is connected to no other ranks; make a new one")
        nodes = {} if self._levels is None else {"node": self._levels.inside, "between": self._levels.between}
        return {"all": self.transport, **nodes}

    @property
    def clock(self) -> Clock:
        """Where time is written down."""
        return self.statistics.account.clock

    def begin_step(self, step: int | None = None) -> None:
        """Begins a step; called for the first bucket.

        An aborted pass uses up its number on every rank, so ranks stay aligned.
        """
        self.statistics.step_begins()
        self._staging.settle()
        self._step = self._step + 1 if step is None else step
        self._enabled = self._enabled_next

    def codes_in(self, step: int) -> bool:
        """Whether anything is coded in a step that begins now."""
        return self._enabled_next and step >= self.options.warmup_steps

    def context(self, key: Key, transport: Metered) -> Context:
        """For the path of a bucket over this transport."""
        piece = piece_for(transport.chunk)
        return Context(key, transport.rank, transport.world_size, self.statistics.account, piece)

    def later(self, buffer: torch.Tensor) -> list[Unchecked] | None:
        """Where headers are put that cannot be checked at once; see :func:`terncomm.path.reduce.agree`."""
        return self._later if buffer.is_cuda else None

    def path(
        self, buffer: torch.Tensor, parameters: Sequence[torch.Tensor], index: int, *, final: bool
    ) -> Path[torch.Tensor]:
        """The path of bucket `index`, the gradients of `parameters` in a row; called in bucket order.

        final: no bucket of the step follows.
        """
        path = self._path(buffer, parameters, index)
        return self._staging.watched(path, self._step, final) if self._staging.stages else path

    def _path(self, buffer: torch.Tensor, parameters: Sequence[torch.Tensor], index: int) -> Path[torch.Tensor]:
        self.check_arrived()
        key = Key(self.seed, self._step, index)
        if buffer.layout == torch.sparse_coo:
            self._warn_of_sparse(parameters[0])
            return self._sparse(buffer, key)
        if buffer.layout != torch.strided:
            raise TypeError(f"gradients must be dense or sparse_coo, got a bucket of layout {buffer.layout}")
        bucket = self._bucket(buffer, parameters)
        coding = self.transports["all" if self._levels is None else "between"]
        if not self._enabled or self._step < self.options.warmup_steps or coding.world_size == 1:
            bucket = _nothing_coded(buffer.numel())
        return self.dense(buffer, bucket, key)

    def run(self, path: Path[T], index: int) -> T:
        """Run the path of bucket `index` to its end on this thread."""
        return blocking(path, self.transports, self.clock, index)

    def run_together(self, path: Path[T], index: int, where: str) -> T:
        """The same, and the other ranks are told of an error. where: the bucket and the step, in words."""
        with self.failing_together(lambda: where):
            return self.run(path, index)

    def dense(self, flat: torch.Tensor, bucket: Bucket, key: Key) -> Path[torch.Tensor]:
        """The path of a dense bucket, and what is counted of it."""
        with self.clock("encode", key.bucket, "watch clipping"):
            complaint = self.clip_watch.look(flat, bucket, key.step)
        options: Any = {"exchange": self.options.exchange, "later": self.later(flat)}
        if self._levels is None:
            context = self.context(key, self.transports["all"])
            yield from all_reduce_mean(flat, bucket, context, staging=self._staging, **options)
        else:
            levels = (self.context(key, each) for each in self._levels)
            yield from all_reduce_mean_between_nodes(flat, bucket, *levels, **options)
        exact_numel = bucket.numel - bucket.coded_numel
        self.statistics.add(raw_bytes=flat.nbytes, coded_numel=bucket.coded_numel, exact_numel=exact_numel)
        self.complain(complaint)
        return flat

    def complain(self, complaint: str | None) -> None:
        """Warn on rank 0, if there is something to say."""
        if complaint is not None:
            advise(complaint, self.transports["all"].rank)

    def _sparse(self, gradient: torch.Tensor, key: Key) -> Path[torch.Tensor]:
        """The path of a sparse gradient, and what is counted of it."""
        context = self.context(key, self.transports["all"])
        mean = yield from all_reduce_mean_sparse(gradient, context, later=self.later(gradient))
        indices, values = sparse_parts(gradient)
        self.statistics.add(raw_bytes=values.nbytes + indices.nbytes, coded_numel=0, exact_numel=values.numel())
        return mean

    @contextmanager
    def failing_together(self, where: Callable[[], str]) -> Iterator[None]:
        """For reductions on the caller's own thread: the other ranks are told of an error, and it stays."""
        if self._failed is not None:
            raise RuntimeError(f"an earlier gradient reduction failed: {self._failed}") from self._failed
        try:
            yield
        except Exception as error:
            failure = self.fail(error, where(), self.clock.phase)
            raise failure from failure.__cause__

    def fail(self, error: Exception, where: str, phase: str) -> Exception:
        """Tell the other ranks of an error, and refuse reductions from now on; returns what to raise."""
        self._failed = error
        if self.connection is None:
            return error
        failure = self.connection.fail(error, f"{where}, {phase}" if phase else where)
        if failure is not error:
            failure.__cause__ = error
        return failure

    def give_up(self, error: Exception) -> None:
        """Refuse reductions from now on, for other ranks have met this error."""
        self._failed = error

    def check_arrived(self) -> None:
        """Raise if ranks turned out to differ in an earlier bucket whose headers have reached the host by now."""
        while self._later and self._later[0].arrived():
            self._later[0].check()  # stays, if it raises: whoever comes next must be told, too
            self._later.pop(0)

    def _warn_of_sparse(self, parameter: torch.Tensor) -> None:
        global _sparse_warned
        if not _sparse_warned:
            _sparse_warned = True
            name = self.layers.name(self.layers.number(parameter))
            self.complain(
                f"the gradient of {name} is sparse: the rows of such gradients are gathered from all ranks, exactly"
            )

    def _bucket(self, buffer: torch.Tensor, parameters: Sequence[torch.Tensor]) -> Bucket:
        """The layers of a bucket; DDP rebuilds buckets, so they are known by their parameters."""
        identity = tuple(map(id, parameters))
        if identity not in self._buckets_known:
            for parameter in parameters:
                self._check_known(parameter)
            bucket = Bucket(self.layers.groups_of(parameters))
            if bucket.numel != buffer.numel():
                raise RuntimeError(f"a bucket of {buffer.numel()} elements holds parameters of {bucket.numel}")
            self._buckets_known[identity] = bucket
        return self._buckets_known[identity]

    def _check_known(self, parameter: torch.Tensor) -> None:
        if self._copied and self.layers.names and parameter not in self.layers.numbers:
            raise RuntimeError(
                "this CommState was copied or pickled without its model, and knows none of these parameters. Make a "
                "new one with the model's named_parameters, and give it load_state_dict(old.state_dict())."
            )


@lru_cache(maxsize=1024)
def _nothing_coded(numel: int) -> Bucket:
    """A bucket in which nothing is coded."""
    return Bucket([(Segments([numel]), None)])
