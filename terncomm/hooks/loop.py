"""Averages the gradients of any training loop, without DDP, over any transport: MPI, a process group, threads."""

import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from terncomm.codecs import CodecLike
from terncomm.hooks.agreement import agree_on
from terncomm.hooks.connection import connect, telling_refusal
from terncomm.hooks.options import Options
from terncomm.hooks.overlap import Overlap
from terncomm.hooks.reducer import GradientReducer
from terncomm.hooks.use_watch import LOOP_ALONE
from terncomm.layers import in_memory_order
from terncomm.path.message import Path
from terncomm.torch_internals import copy_all, default_group
from terncomm.transports import Metered, Transport

Gradient = torch.Tensor | np.ndarray
Parameters = nn.Module | Mapping[str, Gradient] | Iterable[Gradient] | Iterable[tuple[str, Gradient]]

_CACHE = "_terncomm_averagers"
_KEPT = 8  # averagers that reduce_gradients keeps: each holds its model's parameters


class GradientAverager(GradientReducer):
    """Replaces gradients by their compressed mean over ranks, after each backward pass, or while it runs.

    With the same seed the result equals that of the DDP hook, bit for bit, on every transport. Collective: every rank
    constructs one with the same arguments, and calls :meth:`reduce` equally often.

    Args:
        params: a module; or its parameters, with names or without. Embeddings and the output head are found only in a
            module; with a list of parameters, name them in `skip`.
        codec: a codec, its name, or rules.
        transport: a :class:`terncomm.transports.Transport`, or a process group; by default the default process group.
        bucket_cap_mb: size of a bucket in MiB; a larger gradient has its own bucket. The result does not depend on it.
        overlap: reduce a bucket, on other threads, as soon as the backward pass has computed its gradients;
            :meth:`reduce` waits for all buckets. Gradients must be dense, and each `reduce` needs exactly one backward
            pass before it. CUDA gradients, and all gradients if False, are reduced in `reduce`, on the calling thread.
        options: see :class:`terncomm.hooks.options.Options`.

    Raises:
        TypeError, ValueError: `params` or an option is invalid.
        ConfigurationsDiffer: ranks were given different arguments.
        RankFailed: another rank failed, or did not connect within the timeout.

    >>> from terncomm.transports import LocalTransport
    >>> def work(transport):
    ...     weight = nn.Parameter(torch.zeros(2, 2))
    ...     averager = GradientAverager([weight], "int8", transport)
    ...     weight.grad = torch.full((2, 2), float(transport.rank))
    ...     averager.reduce()
    ...     return weight.grad.tolist()
    >>> LocalTransport.run(2, work)
    [[[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]]
    """

    PROCESS_LOCAL = (*GradientReducer.PROCESS_LOCAL, "_scratch", "_overlap")
    UNUSED = LOOP_ALONE
    _overlap: Overlap | None

    def __init__(
        self,
        params: Parameters,
        codec: CodecLike = "terngrad",
        transport: Transport | dist.ProcessGroup | None = None,
        *,
        bucket_cap_mb: float = 25.0,
        overlap: bool = False,
        **options: Any,
    ) -> None:
        with telling_refusal(transport):
            if not bucket_cap_mb > 0:
                raise ValueError(f"bucket_cap_mb must be positive, got {bucket_cap_mb}")
            parameters = _parameters(params)
            super().__init__(Options(codec=codec, **options), parameters.items())
            if isinstance(params, nn.Module):
                self.layers.adopt(params)
            self._given = list(parameters.items())
            self._needed = [parameter.requires_grad for _, parameter in self._given]
            self.check_dtypes()
            self.parameters = self.layers.trainable
            if not self.parameters:
                raise ValueError("no parameter requires a gradient: there is nothing to reduce")
            self._cap_bytes = bucket_cap_mb * 2**20
            self.get_ready(self.parameters[0].device)
        self._join(transport)
        self.announce()
        self._overlap = Overlap(self) if overlap else None

    def _detach(self) -> None:
        super()._detach()
        self._scratch: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        self._overlap = None

    def _join(self, transport: Transport | dist.ProcessGroup | None) -> None:
        """Connect to the other ranks, and compare configurations."""
        names = [self.layers.name_of(each) for each in self.parameters]
        listed = [
            f"{name} {tuple(p.shape)} {p.stride()} {p.dtype}" for name, p in zip(names, self.parameters, strict=True)
        ]
        total = sum(parameter.numel() for parameter in self.parameters)
        order = zlib.crc32("\n".join(listed).encode())
        held = f"{len(listed)} tensors of {total} elements, {names[0]} first (checksum of all: {order:08x})"
        configuration = {**self.configuration(), "bucket_cap_mb": self._cap_bytes / 2**20, "parameters": held}
        home = self.parameters[0].device
        if transport is None or isinstance(transport, dist.ProcessGroup):
            connection = connect(transport or default_group(), home, configuration)
            self.connect(connection.transport, connection)
        else:
            device = torch.device("cpu") if home.type == "meta" else home
            metered = Metered(transport)
            agree_on(configuration, metered, device=device)
            self.connect(metered)

    def reduce(self) -> None:
        """Replace the gradient of every parameter by its mean over ranks; one that is None counts as zeros.

        Raises:
            RankFailed: another rank failed, or did not answer within the timeout.
            RanksDiffer: ranks are not in step.
            RuntimeError: an earlier reduction failed: restart from a checkpoint. Or `requires_grad` of a parameter has
                changed since this object was constructed.
        """
        for (name, parameter), needed in zip(self._given, self._needed, strict=True):
            if parameter.requires_grad != needed:
                now = "requires a gradient now" if parameter.requires_grad else "requires no gradient any more"
                raise RuntimeError(f"{name} {now}: make a new GradientAverager, and load this one's state_dict() in it")
        if self._overlap is not None:
            self._overlap.finish()
            return
        gradients = []
        for each in self.parameters:
            if each.grad is None:
                each.grad = torch.zeros_like(each, requires_grad=False)
            gradients.append(each.grad)
        for each, mean in zip(self.parameters, self.reduce_all(gradients), strict=True):
            each.grad = mean

    @torch.no_grad()
    def reduce_all(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Average gradients over ranks. Raises as :meth:`reduce` does.

        Args:
            gradients: in the order of `parameters`.

        Returns:
            The means, in the same order: dense gradients changed in place, and new tensors for sparse ones.
        """
        index = 0
        with self.reporting_failure(lambda: f"bucket {index} of step {self._step}"):
            self.begin_step()
            buckets = self.buckets(gradients)
            for index, places in enumerate(buckets):
                final = index == len(buckets) - 1
                parameters = [self.parameters[place] for place in places]
                mine = [gradients[place] for place in places]
                if mine[0].layout == torch.strided:
                    self.run(self.bucket_path(index, parameters, mine, final=final), index)
                else:
                    path = self.path(mine[0], parameters, index, final=final)
                    gradients[places[0]] = self.run(path, index)
        return gradients

    def bucket_path(
        self, index: int, parameters: list[torch.Tensor], gradients: list[torch.Tensor], *, final: bool
    ) -> Path[torch.Tensor]:
        """The path of bucket `index`: its dense gradients are replaced by their means, in place."""
        kind = gradients[0].dtype.to_real(), gradients[0].device
        reals = [_real(gradient) for gradient in gradients]
        numel = sum(real.numel() for real in reals)
        scratch = self._take_scratch(kind, numel)
        flat, place, views = scratch[:numel], 0, []
        for real, parameter in zip(reals, parameters, strict=True):
            piece = flat[place : place + real.numel()]
            views.append(piece.view(real.shape) if parameter.is_complex() else in_memory_order(piece, parameter))
            place += real.numel()
        copy_all(views, reals)
        yield from self.path(flat, parameters, index, final=final)
        copy_all(reals, views)
        self._scratch.setdefault(kind, []).append(scratch)
        return flat

    def _take_scratch(self, kind: tuple[torch.dtype, torch.device], numel: int) -> torch.Tensor:
        """A flat buffer of at least `numel` elements: one that an earlier bucket has returned, or a new one."""
        held = self._scratch.get(kind, [])
        while held:
            if (scratch := held.pop()).numel() >= numel:
                return scratch
        return torch.empty(numel, dtype=kind[0], device=kind[1])

    def buckets(self, gradients: list[torch.Tensor]) -> list[list[int]]:
        """Divide gradients into buckets of one dtype and device, the last gradient first.

        Returns:
            For each bucket the places of its gradients in the list. A sparse gradient is a bucket of its own.
        """
        buckets: list[list[int]] = []
        room: dict[tuple[torch.dtype, torch.device], tuple[list[int], float]] = {}
        for place in reversed(range(len(gradients))):
            gradient = gradients[place]
            if gradient.layout != torch.strided:
                buckets.append([place])
                continue
            kind = gradient.dtype.to_real(), gradient.device
            bucket, left = room.get(kind, ([], 0.0))
            if gradient.nbytes > left:
                bucket, left = [], self._cap_bytes
                buckets.append(bucket)
            bucket.append(place)
            room[kind] = bucket, left - gradient.nbytes
        return buckets


def reduce_gradients(
    params: Parameters,
    codec: CodecLike,
    transport: Transport,
    *,
    step: int | None = None,
    **options: Any,
) -> None:
    """Replace gradients, in place, by their compressed mean over ranks. Every rank calls it, after backward.

        transport = terncomm.transports.MPITransport()
        ...
        loss.backward()
        terncomm.reduce_gradients(model, "terngrad", transport)
        optimizer.step()

    The state between calls is kept in the transport object, for the 8 models or sets of gradients that were used last.
    For statistics and checkpoints, use :class:`GradientAverager` directly.

    Args:
        params: a module, or parameters: their `grad` is replaced. Or gradients themselves, in an iterable or by name in
            a mapping: torch tensors that require no gradient, or numpy arrays of float16, float32 or float64.
        codec: "terngrad", "int8", or a codec such as `Ternary(clip=2.5)`.
        transport: this rank's transport.
        step: number of the training step, for the rounding noise; by default calls are counted. Pass it when a run is
            resumed.
        options: see :class:`GradientAverager`.

    Raises:
        TypeError, ValueError: an argument is invalid.
        ConfigurationsDiffer, RanksDiffer: ranks called with different arguments.
        RankFailed: another rank failed, or did not answer within the timeout.

    >>> from terncomm.transports import LocalTransport
    >>> def work(transport):
    ...     gradient = np.full((2, 2), transport.rank, np.float32)
    ...     reduce_gradients([gradient], "int8", transport)
    ...     return gradient.tolist()
    >>> LocalTransport.run(2, work)
    [[[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]]
    """
    if not hasattr(transport, "all_to_all"):
        raise TypeError(
            f"transport must be a terncomm transport, got {transport!r}: wrap it, as in "
            "terncomm.transports.MPITransport(comm) or terncomm.transports.ProcessGroupTransport(group)"
        )
    named = _named(params)
    given = [isinstance(each, nn.Parameter) for _, each in named]
    if any(given) and not all(given):
        raise TypeError(f"wanted parameters or gradients, got both: {named[given.index(False)][0]} is no parameter")
    tensors = [] if any(given) else [(name, _writable(name, each)) for name, each in named]
    what: list[Any] = [(name, tuple(each.shape), each.dtype) for name, each in tensors]
    known = vars(transport).setdefault(_CACHE, _Averagers())
    given_options = {n: sorted(o) if isinstance(o, (set, frozenset)) else o for n, o in options.items()}
    key = repr((what or [id(p) for _, p in named], codec, sorted(given_options.items())))
    needed = [isinstance(p, torch.Tensor) and p.requires_grad for _, p in named]
    before = known.get(key)
    if before is None or before[1] != needed:
        described: Any = params
        if tensors:
            described = [(n, nn.Parameter(torch.empty(t.shape, dtype=t.dtype, device="meta"))) for n, t in tensors]
        elif not isinstance(params, nn.Module):
            described = named
        try:
            known[key] = GradientAverager(described, codec, transport, **options), needed
        except Exception as error:
            if before is not None:  # other ranks may have failed in the old averager: it is out of step
                before[0].give_up(error)
            raise
        if before is not None:  # requires_grad of a parameter has changed; continue its steps
            known[key][0].load_state_dict(before[0].state_dict())
        known.forget_oldest(made=before is None, key=key)
    known.move_to_end(key)
    averager: GradientAverager = known[key][0]
    if step is not None:
        averager.load_state_dict({"step": step - 1, "seed": averager.seed})
    if not tensors:
        averager.reduce()
        return
    for (_, mine), mean in zip(tensors, averager.reduce_all([each for _, each in tensors]), strict=True):
        if mean is not mine:  # sparse
            mine.copy_(mean)


class _Averagers(OrderedDict[str, tuple[GradientAverager, list[bool]]]):
    """The averagers that :func:`reduce_gradients` has made, the last used one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._step = -1  # the highest step of an averager that was forgotten

    def forget_oldest(self, *, made: bool, key: str) -> None:
        """Keep the _KEPT last ones. made: that of `key` is new; its noise goes on after that of the forgotten ones."""
        if made and self._step >= 0:
            averager = self[key][0]
            averager.load_state_dict({"step": self._step, "seed": averager.seed})
        while len(self) > _KEPT:
            _, (oldest, _) = self.popitem(last=False)
            self._step = max(self._step, oldest.step)


def _parameters(params: Parameters) -> dict[str, nn.Parameter]:
    """Parameters by name.

    Raises:
        TypeError, ValueError: see :func:`_named`; or something is no parameter.
    """
    named = _named(params)
    if strange := [name for name, each in named if not isinstance(each, nn.Parameter)]:
        raise TypeError(f"wanted parameters, {strange[0]} is no nn.Parameter: give gradients to reduce_gradients")
    return dict(cast(list[tuple[str, nn.Parameter]], named))


def _named(params: Parameters) -> list[tuple[str, Gradient]]:
    """Pairs of a name and a parameter or gradient; without names, "parameter 0" and so on.

    Raises:
        TypeError, ValueError: `params` is not what :func:`reduce_gradients` takes, or a name occurs twice.
    """
    if isinstance(params, DistributedDataParallel):
        raise TypeError("DistributedDataParallel reduces gradients itself: use terncomm.register(model, codec)")
    if isinstance(params, (torch.Tensor, np.ndarray)):
        raise TypeError("wanted a module, or an iterable of parameters or gradients, got one tensor: put it in a list")
    if isinstance(params, nn.Module):
        pairs: list[Any] = list(params.named_parameters())
    else:
        pairs = list(params.items() if isinstance(params, Mapping) else params)
    named = [each if isinstance(each, tuple) else (f"parameter {place}", each) for place, each in enumerate(pairs)]
    if len({name for name, _ in named}) < len(named):
        names = [name for name, _ in named]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two parameters are named {twice}: names must be unique")
    for name, each in named:
        if not isinstance(each, (torch.Tensor, np.ndarray)):
            raise TypeError(f"wanted torch tensors or numpy arrays, {name} is {type(each).__name__}")
    return named


def _writable(name: str, gradient: Gradient) -> torch.Tensor:
    """A gradient as a tensor that shares its memory.

    Raises:
        TypeError, ValueError: it cannot be replaced in place, or is not of floats.
    """
    if isinstance(gradient, np.ndarray):
        if not gradient.flags.writeable:
            raise ValueError(f"{name} is read-only, but gradients are replaced in place: give a writable array")
        try:
            gradient = torch.from_numpy(gradient)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} cannot be reduced in place: {error}") from None
    if not (gradient.is_floating_point() or gradient.is_complex()):
        raise TypeError(f"gradients must be floats, {name} is {gradient.dtype}")
    if gradient.requires_grad:
        raise TypeError(f"{name} requires a gradient and is no nn.Parameter: give its .grad")
    strided = gradient.layout == torch.strided and gradient.numel() > 0
    if strided and any(s == 0 < n - 1 for s, n in zip(gradient.stride(), gradient.shape, strict=True)):
        raise ValueError(
            f"{name} is expanded: several of its elements share memory, so it cannot be replaced in place. Give a "
            "contiguous copy"
        )
    return gradient


def _real(gradient: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient
