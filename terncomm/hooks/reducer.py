"""The base class of all states that average gradients: of DDP, of FSDP and of training loops."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from terncomm import ops
from terncomm.codecs import Codec, Rules
from terncomm.hooks import coverage
from terncomm.hooks.connection import Connection
from terncomm.hooks.nodes import NodeTransports
from terncomm.hooks.options import Options
from terncomm.hooks.rhythm import Rhythm
from terncomm.hooks.statistics import ClipWatch, Statistics, warn_on_rank_0
from terncomm.hooks.use_watch import UseWatch
from terncomm.keys import Key
from terncomm.layers import Layers
from terncomm.path.account import Clock, Context
from terncomm.path.bucket import Bucket, piece_for
from terncomm.path.drivers import blocking
from terncomm.path.header import Unchecked
from terncomm.path.message import Path
from terncomm.path.ranges import in_words
from terncomm.path.reduce import DTYPES, all_reduce_mean, all_reduce_mean_between_nodes, all_reduce_mean_sparse
from terncomm.path.stages import Staging
from terncomm.path.sums import row_edges
from terncomm.segments import Segments
from terncomm.torch_internals import sparse_parts
from terncomm.transports import Metered
from terncomm.version import __version__

T = TypeVar("T")

_NAMED = 5  # layers that a warning names at most

_log = logging.getLogger("terncomm")

_sparse_warned = _structure_warned = False  # these warnings are given once per process


class GradientReducer:
    """Averages a model's gradients over ranks, bucket by bucket: options, layers, step counter and statistics.

    A subclass takes buckets from its framework, and runs the path of each (see :mod:`terncomm.path.message`).

    Args:
        options: see :class:`terncomm.hooks.options.Options`.
        named_parameters: names and parameters of the model.

    Raises:
        ValueError, TypeError: the options do not fit the model.
    """

    PROCESS_LOCAL: tuple[str, ...] = (
        "connection",
        "statistics",
        "transport",
        "_nodes",
        "_staging",
        "_rhythm",
        "_unchecked",
        "_use_watch",
        "_buckets_known",
        "_failed",
    )  # attributes that are not copied or pickled: they belong to this process

    UNUSED: str | None = None  # how gradients come to be averaged, in words; None: the framework sees to it

    def __init__(self, options: Options, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        self.options = options
        self.layers = Layers(
            named_parameters,
            rules=options.rules,
            skip=options.skip,
            min_numel=options.min_numel,
            exempt=options.exempt,
        )
        self.clip_watch = ClipWatch(self.layers.name, options.warmup_steps)
        self._step = -1
        self._enabled = self._enabled_next = True
        self._copied = False
        self._told_outside: set[int] = set()  # layers of which it was told that codes cannot represent them
        self._had_nodes = False  # whether intra_group was given; a copy does not have these groups
        self._detach()

    def _detach(self) -> None:
        """Set what belongs to this process to its initial state: not connected, no statistics, no error."""
        self.connection: Connection | None = None
        self.transport: Metered | None = None
        self.statistics = Statistics()
        self._nodes: NodeTransports | None = None
        self._staging = Staging(self.options.stages)
        self._unchecked: list[Unchecked] = []  # headers that are still being copied from the device
        self._buckets_known: dict[tuple[int, ...], Bucket] = {}
        self._failed: Exception | None = None
        self._use_watch, self._rhythm = UseWatch(), Rhythm()

    def __getstate__(self) -> dict[str, Any]:
        """The attributes that a copy or a pickle keeps: all but those in `PROCESS_LOCAL`."""
        return {name: value for name, value in vars(self).items() if name not in self.PROCESS_LOCAL}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        vars(self).update(saved)
        self._copied = True
        self.layers.forget_unnamed()  # numbered when first seen; the model of a copy may have other parameter objects
        self._detach()

    def __repr__(self) -> str:
        where = "not connected"
        if self.transport is not None:
            where = f"rank {self.transport.rank} of {self.transport.world_size}"
        switched = "" if self.enabled else ", disabled"
        return f"<{type(self).__name__}: {self.codec!r}, step {self._step}, {where}{switched}>"

    # ---- what a user calls --------------------------------------------------------------------------------------

    @property
    def codec(self) -> Codec | Rules | None:
        """The codec; or the rules, if there are several."""
        rules = self.options.rules
        return rules.default if len(rules.pairs) == 1 else rules

    @property
    def seed(self) -> int:
        """Seed of the rounding noise."""
        return self.options.seed

    @property
    def warmup_steps(self) -> int:
        """Number of first steps in which all gradients are averaged uncompressed."""
        return self.options.warmup_steps

    @property
    def exchange(self) -> str:
        """The option `exchange`: "auto", "gather" or "two_phase"."""
        return self.options.exchange

    @property
    def step(self) -> int:
        """Number of the last step that has begun; -1 before the first."""
        return self._step

    @property
    def rank(self) -> int:
        """The global rank; with a transport of the user's own, the rank in that transport."""
        if self.connection is None and self.transport is not None:
            return self.transport.rank
        return dist.get_rank() if dist.is_initialized() else 0

    def stats(self) -> dict[str, int | float]:
        """Statistics of this rank since the start or the last :meth:`reset_stats`.

        steps: steps begun. raw_bytes: size of the gradients before compression. ring_bytes: what this rank would have
        sent without a codec, by a ring: 2 (W - 1) / W of raw_bytes for an all-reduce, (W - 1) / W for the
        reduce-scatter of FSDP, W - 1 times a sparse gradient. wire_bytes: all bytes that this rank
        sent (codes, scales, headers, padding, uncompressed layers). wire_bytes/CODEC: the part of wire_bytes that holds
        the layers of a codec, without scales. exact_bytes: the part that holds uncompressed gradients. coded_numel,
        exact_numel: elements averaged through a codec, and uncompressed. encode_s, exchange_s, decode_s: seconds in
        each phase; phases overlap. clip_norm_lost/NAME: share of the layer's gradient norm that was clipped, in [0, 1],
        when last measured (the first three compressed steps, then every hundredth). intra_bytes, with `intra_group`:
        the part of wire_bytes that was sent inside the node.
        """
        self.check_arrived()
        return {**self.statistics.read(), **self.clip_watch.read()}

    def reset_stats(self) -> None:
        """Start counting from zero."""
        self.statistics.reset()

    @property
    def enabled(self) -> bool:
        """Whether gradients are compressed from the next step on: what :meth:`disable` and :meth:`enable` switch."""
        return self._enabled_next

    def disable(self) -> None:
        """From the next step on, average all gradients uncompressed. Call on every rank."""
        self._enabled_next = False

    def enable(self) -> None:
        """From the next step on, compress again. Call on every rank."""
        self._enabled_next = True

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint: the integers "step" and "seed", and "enabled", False after :meth:`disable`.

        The rounding noise has no other state. With stages also "stages": their state, by parameter name. It differs
        between ranks, so each rank saves its own.
        """
        self.check_arrived()
        kept: dict[str, Any] = {"step": self._step, "seed": self.seed, "enabled": self._enabled_next}
        if self._staging.stages:
            kept["stages"] = self._staging.state_dict(*self._place, self.layers.name)
        return kept

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue after the saved step. Call on every rank. The world size may differ from the saved one.

        The state of stages fits only the rank and the world size that saved it. If `saved` has no "stages", the stages
        keep their current state.

        Raises:
            ValueError: "step" or "seed" is missing, or the seed differs from this state's. Or "stages" is of other
                stages, another rank or another world size.
        """
        if missing := {"step", "seed"} - saved.keys():
            raise ValueError(f"wanted what state_dict() returned, got a dict that lacks {', '.join(sorted(missing))}")
        if saved["seed"] != self.seed:
            raise ValueError(
                f"the checkpoint has seed {saved['seed']}, this state {self.seed}; give seed={saved['seed']} instead"
            )
        if not self._staging.stages and any(saved.get("stages", {}).get("states", ())):
            raise ValueError(
                f"the checkpoint has the state of stages {saved['stages']['stages']}, and this state has no stages: "
                'give the same stages=, or remove "stages" from what you load'
            )
        if self._staging.stages and "stages" in saved:
            self._staging.load_state_dict(saved["stages"], *self._place, self.layers.number_of)
        self._step = int(saved["step"])
        self._enabled_next = bool(saved.get("enabled", self._enabled_next))

    @property
    def _place(self) -> tuple[int, int]:
        """Rank and world size; of the default process group before the ranks are connected."""
        if self.transport is None and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        transport = self.transports["all"]
        return transport.rank, transport.world_size

    def codes(self, parameter: torch.Tensor) -> bool:
        """Whether this parameter's gradient goes through a codec, once warm-up is over."""
        return self.layers.codes(parameter)

    # ---- what engines call -------------------------------------------------------------------------------------

    def get_ready(self, device: torch.device) -> None:
        """Compile the kernels, if gradients on this device need them. Called before other ranks are waited for."""
        if device.type in ("cpu", "meta"):
            ops.compile_kernels()

    def check_dtypes(self) -> None:
        """Check the dtypes of the gradients to come.

        Raises:
            TypeError: the dtype of a trainable parameter is not supported.
        """
        for each in self.layers.trainable:
            self._check_dtype(each)

    def _check_dtype(self, parameter: torch.Tensor) -> None:
        if not (parameter.dtype in DTYPES or parameter.is_complex()):
            name = self.layers.name_of(parameter)
            raise TypeError(f"gradients must be {', '.join(map(str, DTYPES))}; {name} is {parameter.dtype}")

    def configuration(self) -> dict[str, Any]:
        """What must be equal on all ranks."""
        return {
            "terncomm version": __version__,
            **self.options.compared(),
            "skip": sorted(set(self.layers.skip)),
            "exempt": sorted(set(self.layers.exempt)),
            "coded parameters": self.layers.coded_names,
        }

    def announce(self) -> None:
        """Called when connected: log on rank 0 how much is compressed, warn if it is little, begin to watch for use."""
        global _structure_warned
        if self.transports["all"].rank == 0 and self.layers.trainable:
            size = self.transports["all"].world_size
            _log.info("%r: %s; seed %d, %d ranks", self.codec, coverage.summary(self.layers), self.seed, size)
        self.warn(coverage.too_little(self.layers))
        if not _structure_warned and (complaint := coverage.without_structure(self.layers)) is not None:
            _structure_warned = True
            self.warn(complaint)
        if self.UNUSED is not None and self.layers.trainable:
            self._use_watch.watch(self.layers.trainable[-1], self.warn, self.UNUSED)

    def connect(
        self, transport: Metered, connection: Connection | None = None, nodes: NodeTransports | None = None
    ) -> None:
        """Use this transport from now on, and reset the statistics.

        Args:
            transport: over all ranks.
            connection: what the transport belongs to; None for a transport of the user's own.
            nodes: the transports inside and between nodes, with `intra_group`.
        """
        self.connection, self.transport, self._nodes = connection, transport, nodes
        self._had_nodes = nodes is not None
        self.statistics.connect(self.transports)
        self.statistics.reset()

    @property
    def transports(self) -> dict[str, Metered]:
        """This rank's transports, by the group of a message: "all"; with `intra_group` also "node" and "between"."""
        if self.transport is None:
            raise RuntimeError("this object is not connected to other ranks; if it is a copy, make a new one instead")
        nodes = {} if self._nodes is None else {"node": self._nodes.inside, "between": self._nodes.between}
        return {"all": self.transport, **nodes}

    @property
    def clock(self) -> Clock:
        """The clock that adds up encode_s, exchange_s and decode_s."""
        return self.statistics.account.clock

    @property
    def counts_passes(self) -> bool:
        """Whether a step that begins now is a backward pass to be compared with those of other ranks."""
        return self.UNUSED is not None  # else the framework runs the passes, and keeps shards of the parameters

    def begin_step(self, step: int | None = None) -> None:
        """Begin a step; called before its first bucket. step: its number; by default that of the last step plus 1.

        An aborted pass uses up its number on every rank, so ranks stay aligned.
        """
        self._use_watch.stop()
        if self.counts_passes:
            self._rhythm.begin(self.layers.trainable)
        self.statistics.on_step()
        self._staging.adopt_states()
        self._step = self._step + 1 if step is None else step
        self._enabled = self._enabled_next

    def compresses_at(self, step: int) -> bool:
        """Whether gradients are compressed in `step`, if it begins now: enabled, and warm-up is over."""
        return self._enabled_next and step >= self.options.warmup_steps

    def context(self, key: Key, transport: Metered) -> Context:
        """The context in which a path of this key runs over this transport."""
        piece = piece_for(transport.chunk)
        return Context(key, transport.rank, transport.world_size, self.statistics.account, piece, self._rhythm.value)

    def unchecked(self, buffer: torch.Tensor) -> list[Unchecked] | None:
        """For CUDA, the list of headers to be checked later, see :func:`terncomm.path.reduce.agree`; else None."""
        return self._unchecked if buffer.is_cuda else None

    def path(
        self, buffer: torch.Tensor, parameters: Sequence[torch.Tensor], index: int, *, final: bool
    ) -> Path[torch.Tensor]:
        """The path of one bucket. Called in bucket order.

        Args:
            buffer: (n,) contiguous: the gradients of `parameters`, one after another. Or one gradient, sparse_coo.
            parameters: in the order of the buffer.
            index: of the bucket in its step.
            final: whether this is the last bucket of the step.

        Returns:
            A path that returns the mean over ranks: `buffer`, changed in place, or a new sparse_coo tensor.

        Raises:
            TypeError: the layout of the buffer is neither strided nor sparse_coo.
            RanksDiffer: ranks were not in step in an earlier bucket.
            RuntimeError: the parameters do not belong to this state, or do not fit the buffer.
        """
        path = self._path(buffer, parameters, index)
        return self._staging.recording_finite(path, self._step, final) if self._staging.stages else path

    def _path(self, buffer: torch.Tensor, parameters: Sequence[torch.Tensor], index: int) -> Path[torch.Tensor]:
        self.check_arrived()
        key = Key(self.seed, self._step, index)
        if buffer.layout == torch.sparse_coo:
            self._warn_of_sparse(parameters[0])
            return self._sparse(buffer, key)
        if buffer.layout != torch.strided:
            raise TypeError(f"gradients must be dense or sparse_coo, got a bucket of layout {buffer.layout}")
        bucket = self._bucket(buffer, parameters)
        coding = self.transports["all" if self._nodes is None else "between"]
        if not self._enabled or self._step < self.options.warmup_steps or coding.world_size == 1:
            bucket = _nothing_coded(buffer.numel())
        return self.dense_path(buffer, bucket, key)

    def run(self, path: Path[T], index: int) -> T:
        """Run the path of bucket `index` to its end on this thread."""
        return blocking(path, self.transports, self.clock, index)

    def run_reporting(self, path: Path[T], index: int, where: str) -> T:
        """As :meth:`run`, with :meth:`reporting_failure`. where: such as "bucket 0 of step 3"."""
        with self.reporting_failure(lambda: where):
            return self.run(path, index)

    def dense_path(self, flat: torch.Tensor, bucket: Bucket, key: Key) -> Path[torch.Tensor]:
        """The path of a dense bucket `flat`, (n,), averaged in place; also updates the statistics."""
        with self.clock("encode", key.bucket, "watch clipping"):
            complaint = self.clip_watch.complaint(key.step)
            self.clip_watch.measure_bucket(flat, bucket, key.step)
        options: Any = {"exchange": self.options.exchange, "unchecked": self.unchecked(flat)}
        if self._nodes is None:
            context = self.context(key, self.transports["all"])
            outside = yield from all_reduce_mean(flat, bucket, context, staging=self._staging, **options)
        else:
            nodes = (self.context(key, each) for each in self._nodes)
            outside = yield from all_reduce_mean_between_nodes(flat, bucket, *nodes, **options)
        coded_numel = bucket.coded_numel - self._own_part(bucket).numel_of(outside)
        world_size = self.transports["all"].world_size
        self.statistics.add(
            raw_bytes=flat.nbytes,
            ring_bytes=2 * (world_size - 1) * flat.nbytes // world_size,
            coded_numel=coded_numel,
            exact_numel=bucket.numel - coded_numel,
        )
        self.warn(complaint)
        kind = "rank" if self._nodes is None else "node"
        self._warn_of_row(self._rhythm.complaint(self.statistics.account.rhythms, kind))
        self.tell_outside(outside, flat.dtype)
        return flat

    def _own_part(self, bucket: Bucket) -> Bucket:
        """The part of a bucket that this rank's codecs see: with nodes, its row."""
        if self._nodes is None:
            return bucket
        edges, rank = row_edges(bucket.numel, self._nodes.inside.world_size), self._nodes.inside.rank
        return bucket.clipped(rank * edges[1], (rank + 1) * edges[1])

    def tell_outside(self, numbers: frozenset[int], dtype: torch.dtype) -> None:
        """Warn of layers that codes cannot represent, once for each layer."""
        if new := sorted(numbers - self._told_outside):
            self._told_outside.update(new)
            names = [self.layers.name(number) for number in new[:_NAMED]]
            more = [f"{len(new) - _NAMED} more"] if len(new) > _NAMED else []
            self._warn_of_row(in_words(dtype, names + more))

    def warn(self, complaint: str | None) -> None:
        """Warn on rank 0, unless `complaint` is None."""
        if complaint is not None:
            warn_on_rank_0(complaint, self.transports["all"].rank)

    def _warn_of_row(self, complaint: str | None) -> None:
        """Warn of what only the ranks know that averaged the same row between nodes: then on every rank of node 0."""
        if self._nodes is None:
            self.warn(complaint)
        elif complaint is not None:
            warn_on_rank_0(complaint, self._nodes.between.rank)

    def _sparse(self, gradient: torch.Tensor, key: Key) -> Path[torch.Tensor]:
        """The path of a sparse_coo gradient; also updates the statistics."""
        context = self.context(key, self.transports["all"])
        mean = yield from all_reduce_mean_sparse(gradient, context, unchecked=self.unchecked(gradient))
        indices, values = sparse_parts(gradient)
        nbytes = values.nbytes + indices.nbytes
        gathered = (context.world_size - 1) * nbytes  # as PyTorch averages sparse gradients, too
        self.statistics.add(raw_bytes=nbytes, ring_bytes=gathered, coded_numel=0, exact_numel=values.numel())
        return mean

    @contextmanager
    def reporting_failure(self, where: Callable[[], str]) -> Iterator[None]:
        """A context for a reduction on the caller's thread. On an error it calls :meth:`fail`.

        Args:
            where: returns the bucket and the step, in words, for the message to the other ranks.

        Raises:
            RuntimeError: an earlier reduction failed.
        """
        if self._failed is not None:
            raise RuntimeError(f"an earlier gradient reduction failed: {self._failed}") from self._failed
        try:
            yield
        except Exception as error:
            failure = self.fail(error, where(), self.clock.phase)
            raise failure from failure.__cause__

    def fail(self, error: Exception, where: str, phase: str) -> Exception:
        """Post an error for the other ranks, and refuse reductions from now on. Returns the exception to raise.

        A transport of the user's own has no place to post it. The other ranks then see only that this rank is missing.
        """
        self._failed = error
        if self.connection is None:
            return error
        failure = self.connection.fail(error, f"{where}, {phase}" if phase else where)
        if failure is not error:
            failure.__cause__ = error
        return failure

    def give_up(self, error: Exception) -> None:
        """Refuse reductions from now on, without posting the error: the other ranks have an error of their own."""
        self._failed = error

    def check_arrived(self) -> None:
        """Check the headers of earlier CUDA buckets that have reached the host by now.

        Raises:
            RanksDiffer: ranks were not in step.
        """
        while self._unchecked and self._unchecked[0].arrived():
            # If it raises, the header stays in the list, and the next call raises too.
            self.warn(self._rhythm.complaint(self._unchecked[0].check()))
            self._unchecked.pop(0)

    def _warn_of_sparse(self, parameter: torch.Tensor) -> None:
        global _sparse_warned
        if not _sparse_warned:
            _sparse_warned = True
            name = self.layers.name_of(parameter)
            self.warn(
                f"the gradient of {name} is sparse. Sparse gradients are sent uncompressed: an all-gather of their rows"
            )

    def _bucket(self, buffer: torch.Tensor, parameters: Sequence[torch.Tensor]) -> Bucket:
        """The layers of a bucket, cached by its parameters: DDP rebuilds buckets, so an index is not enough."""
        identity = tuple(map(id, parameters))
        if identity not in self._buckets_known:
            for parameter in parameters:
                self._check_known(parameter)
                self._check_dtype(parameter)
            bucket = Bucket(self.layers.groups_of(parameters))
            if bucket.numel != buffer.numel():
                raise RuntimeError(f"a bucket has {buffer.numel()} elements, its parameters have {bucket.numel}")
            self._buckets_known[identity] = bucket
        return self._buckets_known[identity]

    def _check_known(self, parameter: torch.Tensor) -> None:
        if self._copied and self.layers.names and parameter not in self.layers.numbers:
            raise RuntimeError(
                "this CommState was copied or pickled without its model, so it does not know these parameters. Make a "
                "new one with named_parameters=model.named_parameters(), then load_state_dict(old.state_dict())."
            )


@lru_cache(maxsize=1024)
def _nothing_coded(numel: int) -> Bucket:
    """A bucket of `numel` elements, all uncompressed."""
    return Bucket([(Segments([numel]), None)])
