"""Horovod's `DistributedOptimizer` with gradients that travel as TernGrad or 8-bit codes.

    import horovod.torch as hvd
    import terncomm.horovod

    hvd.init()
    optimizer = terncomm.horovod.DistributedOptimizer(optimizer, named_parameters=model, codec="terngrad")
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

Horovod is imported when it is needed; `launch/build_horovod.sh` builds it for today's torch.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from terncomm.codecs import Codec, codec_for
from terncomm.hooks.loop import GradientAverager
from terncomm.hooks.overlap import Overlap
from terncomm.transports.horovod import HorovodTransport, horovod_torch

_STEP = "terncomm_step"  # in the first parameter group: so it is in checkpoints, and in what Horovod broadcasts


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: nn.Module | Iterable[tuple[str, nn.Parameter]] | None = None,
    codec: str | Codec = "terngrad",
    *,
    backward_passes_per_step: int = 1,
    op: Any = None,
    process_set: Any = None,
    timeout_s: float = 600.0,
    sparse_as_dense: bool = False,
    compression: Any = None,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    **options: Any,
) -> Any:
    """The optimizer, with every `step()` taken on gradients averaged over Horovod's ranks, in compressed form.

    Gradients are coded and exchanged, through Horovod's asynchronous alltoall and allgather, in buckets, while the
    backward pass still runs. For one seed they are those of the DDP hook, bit for bit. What a program of Horovod's
    does works as it does there: `backward_passes_per_step` (gradients of several passes add up), process sets,
    `hvd.broadcast_parameters`, `hvd.broadcast_optimizer_state`, and clipping in between::

        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with optimizer.skip_synchronize():
            optimizer.step()

    Collective: every rank of the process set makes one with the same arguments; others step alone, as in Horovod.

    Args:
        optimizer: any but `torch.optim.LBFGS`, whose steps depend on a loss that differs between ranks.
        named_parameters: the module, so that embeddings and the output head are found and travel exactly; or its
            `named_parameters()`, then name those in `skip`. Without, parameters go by their places in the optimizer.
        codec: "terngrad", "int8", or a codec such as `Ternary(clip=2.5)`.
        backward_passes_per_step: backward passes before each `step()`.
        op: `hvd.Average` (the default) or `hvd.Sum`.
        process_set: of Horovod; by default all ranks.
        timeout_s: how long an exchange waits for the other ranks.
        sparse_as_dense: make sparse gradients dense, in place of an error.
        compression: of Horovod, may only be that of none: `codec` stands in its place.
        gradient_predivide_factor, num_groups, groups: taken, so that programs need not be changed, and without effect:
            sums of codes do not overflow, and buckets do what groups do.
        options: `skip`, `min_numel`, `warmup_steps`, `exchange`, `seed`, `exempt`, `bucket_cap_mb` of
            :class:`terncomm.GradientAverager`.

    Returns:
        An object of the optimizer's class, which shares its parameters and state; use it in the other's place. Its
        `averager` is a :class:`terncomm.GradientAverager` with `stats()`, `disable()` and `codes()`; `state_dict()`
        holds the step of the rounding noise.

    Raises:
        ModuleNotFoundError: Horovod is not installed.
        TypeError: an unknown option.
        ValueError: `hvd.init()` has not been called, a parameter has no name or two have one, an option or an
            optimizer that cannot be.
        ConfigurationsDiffer: ranks were given different arguments.

    References:
        A. Sergeev and M. Del Balso, "Horovod: fast and easy distributed deep learning in TensorFlow", 2018,
        arXiv:1802.05799.
    """
    hvd = horovod_torch()
    if not hvd.is_initialized():
        raise ValueError("Horovod is not initialized: call hvd.init() first")
    op = hvd.Average if op is None else op
    if op not in (hvd.Average, hvd.Sum):
        raise ValueError("op must be hvd.Average or hvd.Sum: codes cannot be combined by Adasum")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS decides by a loss that differs between ranks, so their weights would part ways")
    if hasattr(optimizer, "skip_synchronize"):
        raise ValueError("this optimizer is distributed already: wrap the original one, once")
    if compression not in (None, Compression.none, hvd.Compression.none):
        raise ValueError(f"compression={compression!r}: here codec= says how gradients travel; leave compression out")
    passes = _positive("backward_passes_per_step", backward_passes_per_step)
    averager = reducer = steps = None
    if process_set is None or process_set.included():
        named = _named(optimizer, named_parameters)
        averager = GradientAverager(named, codec, HorovodTransport(process_set, timeout_s=timeout_s), **options)
        steps = _Steps(averager)
        factor = averager.transports["all"].world_size if op == hvd.Sum else 1
        reducer = Overlap(averager, passes=passes, factor=factor, densifies=sparse_as_dense, begin_step=steps.begin)
    # Of Horovod's module, so that hvd.broadcast_optimizer_state knows that a plain step() would wait for other ranks.
    kind = _kind(type(optimizer), hvd.DistributedOptimizer.__module__)
    wrapped = kind.__new__(kind)
    vars(wrapped).update({name: value for name, value in vars(optimizer).items() if name != "step"})
    wrapped.__dict__.update(averager=averager, _reducer=reducer, _synchronized=False, _skips=False)
    wrapped.param_groups[0].setdefault(_STEP, -1)
    if steps is not None:
        steps.optimizer = weakref.ref(wrapped)
    return wrapped


def _positive(name: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return int(value)


def _named(
    optimizer: torch.optim.Optimizer, given: nn.Module | Iterable[tuple[str, nn.Parameter]] | None
) -> nn.Module | list[tuple[str, nn.Parameter]]:
    """What an averager takes: the module, or names and parameters, of this optimizer."""
    every = [each for group in optimizer.param_groups for each in group["params"]]
    held = {each for each in every if each.requires_grad}
    if given is None:
        named = [(f"parameter {place}", each) for place, each in enumerate(every)]
    elif isinstance(given, nn.Module):
        named = list(given.named_parameters())
    else:
        named = list(given)
        if not all(isinstance(each, tuple) for each in cast(list[Any], named)):
            raise ValueError("named_parameters must be a module, or pairs of a name and a parameter")
    if unnamed := held - {parameter for _, parameter in named}:
        shapes = ", ".join(str(tuple(each.shape)) for each in list(unnamed)[:5])
        raise ValueError(f"named_parameters lacks {len(unnamed)} of the optimizer's parameters, of shapes {shapes}")
    mine = [(name, parameter) for name, parameter in named if parameter in held]
    if isinstance(given, nn.Module):
        if others := [name for name, parameter in named if parameter.requires_grad and parameter not in held]:
            raise ValueError(
                f"the optimizer does not hold {others[0]} of the module: give the named parameters that it holds"
            )
        return given
    return mine


class _Steps:
    """Keeps the averager's step in the optimizer's first parameter group, by which checkpoints and Horovod carry it."""

    def __init__(self, averager: GradientAverager) -> None:
        self._averager = averager
        self._step = averager.step
        self.optimizer: Callable[[], Any] = lambda: None

    def begin(self) -> None:
        """Begin the step after the optimizer's, or after the averager's if that has loaded a state of its own."""
        group, averager = self.optimizer().param_groups[0], self._averager
        averager.begin_step(group[_STEP] + 1 if averager.step == self._step else None)
        group[_STEP] = self._step = averager.step


def _kind(base: Any, module: str) -> Any:
    """A class of optimizers that behaves as `base` does, on gradients averaged over ranks."""

    class Distributed(base):  # type: ignore[misc]
        """See :func:`DistributedOptimizer`."""

        averager: GradientAverager | None  # what averages: statistics and switches. None outside the process set
        _reducer: Overlap | None
        _synchronized: bool
        _skips: bool

        def synchronize(self) -> None:
            """Average the gradients of all ranks; they are in place when this returns."""
            reducer = self._reducer
            if reducer is None:
                return
            if self._synchronized and reducer.idle:
                warnings.warn(
                    "optimizer.step() or synchronize() after synchronize(), without skip_synchronize(): these "
                    "gradients are averaged already, so nothing was done",
                    stacklevel=2,
                )
                return
            reducer.finish()
            self._synchronized = True

        @contextmanager
        def skip_synchronize(self) -> Iterator[None]:
            """Within it `step()` takes the gradients as they are: `synchronize()` was called before."""
            self._skips = True
            try:
                yield
            finally:
                self._skips = False

        def set_backward_passes_per_step(self, passes: int) -> None:
            """Backward passes before each `step()`, from the next one on."""
            passes = _positive("backward_passes_per_step", passes)
            if self._reducer is not None:
                self._refuse_under_way("set_backward_passes_per_step()")
                self._reducer.passes = passes
                self._reducer.next_step()

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            """Average the gradients, if that has not been done, and step."""
            if closure is not None:
                return super().step(partial(self._evaluated, closure))
            if not self._skips:
                self.synchronize()
            elif self._reducer is not None and not self._synchronized:
                raise RuntimeError("step() within skip_synchronize() needs synchronize() before it")
            self._synchronized = False
            return super().step()

        step.hooked = True  # type: ignore[attr-defined]  # torch must not wrap it: the step it calls is wrapped already

        def _evaluated(self, closure: Callable[[], Any]) -> Any:
            self._synchronized = False
            loss = closure()
            with torch.no_grad():
                self.synchronize()
            self._synchronized = False
            return loss

        def zero_grad(self, *args: Any, **kwargs: Any) -> None:
            """Clear gradients; not between a backward pass and the wait for what it began."""
            self._refuse_under_way("zero_grad()")
            super().zero_grad(*args, **kwargs)

        def _refuse_under_way(self, what: str) -> None:
            if self._reducer is not None and self._reducer.under_way:
                raise RuntimeError(
                    f"optimizer.{what} after loss.backward(), before optimizer.step() or synchronize(): gradients are "
                    "on their way to other ranks"
                )

        def add_param_group(self, param_group: Any) -> None:
            """Refused: what is added later would not be averaged.

            Raises:
                RuntimeError: always.
            """
            raise RuntimeError("add parameter groups before the optimizer is made distributed: these would be left out")

        def load_state_dict(self, state_dict: Any) -> None:
            """Load the state of the optimizer; the rounding noise goes on after the saved step."""
            self._refuse_under_way("load_state_dict()")
            super().load_state_dict(state_dict)
            self.param_groups[0].setdefault(_STEP, -1)  # saved by another optimizer
            self._synchronized = False

    Distributed.__name__ = Distributed.__qualname__ = base.__name__
    Distributed.__module__ = module
    return Distributed


class Compression:
    """What can travel in Horovod's own reduction, for `hvd.DistributedOptimizer(..., compression=Compression.fp16)`.

    There a rank's tensor is added to those of others as it is, in a type that Horovod can add. Codes of TernGrad and of
    8-bit quantization carry scales of their own, and sums of them overflow a byte: no such class can be honest for
    them, and asking for one says so. `DistributedOptimizer` of this module sends them.
    """

    class none:
        """Gradients as they are."""

        @staticmethod
        def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
            """Any tensor -> itself, None."""
            return tensor, None

        @staticmethod
        def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
            """The inverse."""
            return tensor

    class fp16:
        """Float16, divided by a power of two of at least W before it is added up, so that sums of W do not overflow.

        Magnitudes above 65504 become infinite; below 6e-8 W they vanish.
        """

        @staticmethod
        def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
            """Floats -> float16, and what `decompress` needs; other types as they are."""
            if not tensor.is_floating_point():
                return tensor, None
            factor = float(1 << (horovod_torch().size() - 1).bit_length())
            return (tensor / factor).to(torch.float16), (tensor.dtype, factor)

        @staticmethod
        def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
            """The sum or mean, in the type that it came in."""
            if ctx is None:
                return tensor
            dtype, factor = ctx
            return tensor.to(dtype).mul_(factor)

    class _Refused:
        def __set_name__(self, owner: type, name: str) -> None:
            self._name = name

        def __get__(self, instance: Any, owner: type) -> Any:
            codec_for(self._name).compress()

    terngrad = _Refused()
    int8 = _Refused()
