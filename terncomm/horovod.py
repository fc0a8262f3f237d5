"""Horovod's `DistributedOptimizer`, with gradients compressed by TernGrad or 8-bit quantization.

    import horovod.torch as hvd
    import terncomm.horovod

    hvd.init()
    optimizer = terncomm.horovod.DistributedOptimizer(optimizer, named_parameters=model, codec="terngrad")
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

Horovod is imported on first use. `launch/build_horovod.sh` builds it for the torch that is installed.
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
from terncomm.hooks.connection import telling_refusal
from terncomm.hooks.loop import GradientAverager
from terncomm.hooks.overlap import Overlap
from terncomm.transports.horovod import HorovodTransport, horovod_torch

# Keys in the first parameter group, which checkpoints and Horovod's broadcasts contain.
_STEP, _ENABLED = "terncomm_step", "terncomm_enabled"


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
    """Wrap an optimizer: `step()` then uses gradients averaged over Horovod's ranks, sent in compressed form.

    Buckets of gradients are compressed and exchanged, with Horovod's asynchronous alltoall and allgather, while the
    backward pass still runs. With the same seed the means equal those of the DDP hook, bit for bit. These work as in
    Horovod: `backward_passes_per_step` (gradients of several passes are accumulated), process sets,
    `hvd.broadcast_parameters`, `hvd.broadcast_optimizer_state`, and gradient clipping before the step::

        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with optimizer.skip_synchronize():
            optimizer.step()

    Collective: every rank of the process set calls it with the same arguments. On other ranks `step()` uses the local
    gradients, as in Horovod.

    Args:
        optimizer: any but `torch.optim.LBFGS`, whose steps depend on a loss that differs between ranks.
        named_parameters: the module; its embeddings and output head are found, and averaged uncompressed. Or its
            `named_parameters()`; then name these layers in `skip`. By default parameters are named by their places in
            the optimizer.
        codec: "terngrad", "int8", or a codec such as `Ternary(clip=2.5)`.
        backward_passes_per_step: backward passes before each `step()`.
        op: `hvd.Average` (the default) or `hvd.Sum`.
        process_set: a process set of Horovod; by default all ranks.
        timeout_s: seconds that an exchange waits for the other ranks.
        sparse_as_dense: whether sparse gradients are made dense; otherwise they are an error.
        compression: only `Compression.none` is accepted, because `codec` replaces it.
        gradient_predivide_factor, num_groups, groups: accepted for compatibility, and without effect. Sums of codes do
            not overflow, and buckets replace groups.
        options: `skip`, `min_numel`, `warmup_steps`, `exchange`, `seed`, `exempt`, `bucket_cap_mb` of
            :class:`terncomm.GradientAverager`.

    Returns:
        An optimizer of a subclass of the given one's class, which shares its parameters and state; use it instead. Its
        `averager` is a :class:`terncomm.GradientAverager` with `stats()`, `disable()` and `codes()`, or None outside
        the process set. Its `state_dict()` includes the step of the rounding noise.

    Raises:
        ModuleNotFoundError: Horovod is not installed.
        TypeError: an unknown option.
        ValueError: `hvd.init()` has not been called, a parameter has no name, two parameters have the same name, or an
            option or the optimizer is invalid.
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
        raise ValueError(
            "torch.optim.LBFGS is not supported: its steps depend on a loss that differs between ranks, so the ranks' "
            "weights would diverge"
        )
    if hasattr(optimizer, "skip_synchronize"):
        raise ValueError("this optimizer is distributed already: wrap the original one, once")
    if compression not in (None, Compression.none, hvd.Compression.none):
        raise ValueError(f"compression={compression!r}: here codec= says how gradients travel; leave compression out")
    passes = _positive("backward_passes_per_step", backward_passes_per_step)
    averager = reducer = steps = None
    if process_set is None or process_set.included():
        transport = HorovodTransport(process_set, timeout_s=timeout_s)
        with telling_refusal(transport):
            named = _named(optimizer, named_parameters)
        averager = GradientAverager(named, codec, transport, **options)
        steps = _Steps(averager)
        factor = averager.transports["all"].world_size if op == hvd.Sum else 1
        reducer = Overlap(
            averager, passes=passes, factor=factor, sparse_as_dense=sparse_as_dense, begin_step=steps.begin
        )
    # By Horovod's module name, hvd.broadcast_optimizer_state recognizes a step() that would wait for other ranks.
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
    """The module, or the names and parameters that this optimizer holds, for a `GradientAverager`.

    Raises:
        ValueError: names are missing, or the module has trainable parameters that the optimizer does not hold.
    """
    every = [each for group in optimizer.param_groups for each in group["params"]]
    held = set(every)
    if given is None:
        named = [(f"parameter {place}", each) for place, each in enumerate(every)]
    elif isinstance(given, nn.Module):
        named = list(given.named_parameters())
    else:
        named = list(given)
        if not all(isinstance(each, tuple) for each in cast(list[Any], named)):
            raise ValueError("named_parameters must be a module, or pairs of a name and a parameter")
    if unnamed := {each for each in held if each.requires_grad} - {parameter for _, parameter in named}:
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
    """Keeps the averager's step in the optimizer's first parameter group, for checkpoints and Horovod's broadcasts."""

    def __init__(self, averager: GradientAverager) -> None:
        self._averager = averager
        self._step = averager.step
        self.optimizer: Callable[[], Any] = lambda: None

    def begin(self) -> None:
        """Begin the step after the optimizer's; after the averager's, if a state was loaded into the averager."""
        group, averager = self.optimizer().param_groups[0], self._averager
        averager.begin_step(group[_STEP] + 1 if averager.step == self._step else None)
        group[_STEP] = self._step = averager.step


def _kind(base: Any, module: str) -> Any:
    """A subclass of the optimizer class `base` that averages gradients over ranks. module: its `__module__`."""

    class Distributed(base):  # type: ignore[misc]
        """See :func:`DistributedOptimizer`."""

        averager: GradientAverager | None  # with stats(), disable() and enable(); None outside the process set
        _reducer: Overlap | None
        _synchronized: bool
        _skips: bool

        def synchronize(self) -> None:
            """Average the gradients over ranks. When this returns, `grad` of every parameter holds the mean."""
            reducer = self._reducer
            if reducer is None:
                return
            if self._synchronized and reducer.idle:
                warnings.warn(
                    "optimizer.step() or synchronize() was called after synchronize(). These gradients are averaged "
                    "already, and were not averaged again: call step() in `with optimizer.skip_synchronize():`",
                    stacklevel=2,
                )
                return
            reducer.finish()
            self._synchronized = True

        @contextmanager
        def skip_synchronize(self) -> Iterator[None]:
            """A context in which `step()` uses the gradients as they are. Call `synchronize()` before."""
            self._skips = True
            try:
                yield
            finally:
                self._skips = False

        def set_backward_passes_per_step(self, passes: int) -> None:
            """Set the number of backward passes before each `step()`, from the next step on."""
            passes = _positive("backward_passes_per_step", passes)
            if self._reducer is not None:
                self._refuse_under_way("set_backward_passes_per_step()")
                self._reducer.passes = passes
                self._reducer.next_step()

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            """Average the gradients, unless in `skip_synchronize()`, and update the parameters."""
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
            """Clear gradients.

            Raises:
                RuntimeError: a backward pass has begun reductions, and `step()` or `synchronize()` has not ended them.
            """
            self._refuse_under_way("zero_grad()")
            super().zero_grad(*args, **kwargs)

        def _refuse_under_way(self, what: str) -> None:
            if self._reducer is not None and self._reducer.has_pending:
                raise RuntimeError(
                    f"optimizer.{what} was called after loss.backward() and before optimizer.step() or synchronize(), "
                    "while gradients are on their way to other ranks: call step() or synchronize() first"
                )

        def add_param_group(self, param_group: Any) -> None:
            """Not supported: gradients of a group that is added later would not be averaged.

            Raises:
                RuntimeError: always.
            """
            raise RuntimeError("add parameter groups before DistributedOptimizer: these would not be averaged")

        def state_dict(self) -> Any:
            """The state of the optimizer. Its first parameter group tells the step, and whether codecs are enabled."""
            if self.averager is not None:
                self.param_groups[0][_ENABLED] = self.averager.enabled
            return super().state_dict()

        def load_state_dict(self, state_dict: Any) -> None:
            """Load the state of the optimizer; the rounding noise continues after the saved step."""
            self._refuse_under_way("load_state_dict()")
            super().load_state_dict(state_dict)
            self.param_groups[0].setdefault(_STEP, -1)  # if it was saved without terncomm
            if self.averager is not None and (enabled := self.param_groups[0].get(_ENABLED)) is not None:
                (self.averager.enable if enabled else self.averager.disable)()
            self._synchronized = False

    Distributed.__name__ = Distributed.__qualname__ = base.__name__
    Distributed.__module__ = module
    return Distributed


class Compression:
    """Compressions for Horovod's own reduction: `hvd.DistributedOptimizer(..., compression=Compression.fp16)`.

    Horovod adds the compressed tensors of all ranks. That does not work for TernGrad and 8-bit quantization: their
    codes belong to a scale, and sums of codes overflow a byte. So `Compression.terngrad` and `Compression.int8` raise a
    TypeError. Use :func:`DistributedOptimizer` of this module instead.
    """

    class none:
        """Gradients as they are."""

        @staticmethod
        def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
            """Any tensor -> itself, None."""
            return tensor, None

        @staticmethod
        def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
            """Return the tensor as it is."""
            return tensor

    class fp16:
        """Float16, divided before the sum by a power of two >= W, so that the sum of W tensors does not overflow.

        Magnitudes above 65504 may become infinite; magnitudes below about 6e-8 W may become 0.
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
            """The sum or mean, in the dtype of the original tensor."""
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
