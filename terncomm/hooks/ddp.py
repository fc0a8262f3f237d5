"""The hook for `torch.nn.parallel.DistributedDataParallel`."""

import logging
import warnings
from collections.abc import Collection, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from terncomm import ops
from terncomm.codecs import Codec, codec_for
from terncomm.exchange import ALGORITHMS, float_traffic
from terncomm.hooks import exempt as exemptions
from terncomm.hooks.agreement import ConfigurationsDiffer, agree_on
from terncomm.hooks.runner import OrderedWorker, SideStream
from terncomm.keys import Key
from terncomm.reduce import Clock, Unchecked, all_reduce_mean
from terncomm.segments import Segments
from terncomm.transports import Metered, ProcessGroupTransport
from terncomm.transports.process_group import home_of
from terncomm.version import __version__

_log = logging.getLogger("terncomm")

_CLIP_WARNING = 0.3  # share of a layer's gradient norm
_CLIP_STEPS, _CLIP_EVERY = 3, 100  # the first coded steps, and every so many after, are looked at


class CommState:
    """The state that goes with :func:`comm_hook`: which codec, what travels exactly, how far training is.

    Args:
        codec: "terngrad", "int8", or a codec such as `Ternary(clip=2.5)`.
        skip: parameters that travel exactly, beside those exempt by rule: names, names of modules, shell patterns.
        min_numel: parameters with fewer elements, or with one dimension, travel exactly (TernGrad's
            `size_to_binarize`).
        warmup_steps: first steps in which everything travels exactly (TernGrad's `floating_grad_epoch`, in steps).
        exchange: "auto", "gather" or "two_phase"; the result is the same bits.
        seed: of the rounding noise; equal on all ranks.
        exempt: groups found by the model's structure that travel exactly, of "embedding" and "head"; `()` codes them
            too, as published. Without a model (the plain pair of state and hook) there is no structure to look at.
        named_parameters: of the model, for `skip` and for names in statistics; `register` gives them by itself.
        process_group: the group that the DDP model was made with, which a bucket does not tell; by default the
            default group. `register` gives it by itself.

    Raises:
        ValueError, TypeError: an option that cannot be.

    Note:
        Parameters that are not in `named_parameters` are numbered as they are first seen. In a world of one rank
        nothing is coded: the gradients stay as they are.
    """

    def __init__(
        self,
        codec: str | Codec = "terngrad",
        *,
        skip: Collection[str] = (),
        min_numel: int = 1024,
        warmup_steps: int = 0,
        exchange: str = "auto",
        seed: int = 0,
        exempt: Collection[str] = exemptions.GROUPS,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.codec = codec_for(codec)
        self.skip = (skip,) if isinstance(skip, str) else tuple(skip)
        self.min_numel = _count("min_numel", min_numel)
        self.warmup_steps = _count("warmup_steps", warmup_steps)
        if exchange not in ALGORITHMS:
            raise ValueError(f"exchange must be one of {', '.join(ALGORITHMS)}, got {exchange!r}")
        self.exchange = exchange
        self.seed = Key(seed).seed
        self.exempt = (exempt,) if isinstance(exempt, str) else tuple(exempt)
        if unknown := set(self.exempt) - set(exemptions.GROUPS):
            raise ValueError(f"exempt may name {', '.join(exemptions.GROUPS)}; got {', '.join(sorted(unknown))}")

        named: dict[torch.Tensor, str] = {}
        for name, parameter in named_parameters or ():
            if parameter.requires_grad:
                named.setdefault(parameter, exemptions.clean(name))  # a tied parameter goes by its first name
        if self.skip and not named:
            raise ValueError("skip= needs names: give named_parameters=model.named_parameters(), or use register")
        skipped = exemptions.matching(self.skip, named.values())
        self._names = list(named.values())
        self._numbers = {parameter: number for number, parameter in enumerate(named)}
        self._exact = {parameter for parameter, name in named.items() if name in skipped}

        self._step = -1
        self._enabled = self._enabled_next = True
        self._clip_lost: dict[int, float] = {}
        self._clip_warned = False
        self._group = process_group
        self._detach()
        self.reset_stats()
        ops.compile_kernels()

    def _detach(self) -> None:
        """Hold nothing that belongs to this process alone."""
        self._transport: Metered | None = None
        self._worker = OrderedWorker()
        self._side_stream = SideStream()
        self._later: list[Unchecked] = []  # headers on their way from the device
        self._layouts: dict[tuple[int, ...], tuple[Segments, Segments]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy` of a model: everything but group, thread and stream. A copy is of the default group."""
        own = ("_group", "_transport", "_worker", "_side_stream", "_later", "_layouts")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        vars(self).update(saved)
        self._group = None
        self._detach()
        self.reset_stats()

    # ---- what a user calls --------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int | float]:
        """Plain numbers of this rank since the start or the last :meth:`reset_stats`.

        steps: backward passes that were reduced. raw_bytes: size of the gradients handed to the hook. wire_bytes: sent
        by this rank, everything counted (codes, scales, checks, padding, exact parts). exact_bytes: of these, what the
        exact parts took. coded_numel, exact_numel: elements that went either way. encode_s, exchange_s, decode_s:
        seconds in the phases of the path, on its own thread. clip_norm_lost/NAME: share of the layer's gradient norm
        that clipping took, when last looked at (the first three coded steps and every hundredth).
        """
        sent = self._transport.sent_bytes if self._transport else 0
        clock = self._clock
        return {
            **self._counts,
            "wire_bytes": sent - self._sent_before,
            "encode_s": clock.encode_s,
            "exchange_s": clock.exchange_s,
            "decode_s": clock.decode_s,
            **{f"clip_norm_lost/{self._name(number)}": lost for number, lost in sorted(self._clip_lost.items())},
        }

    def reset_stats(self) -> None:
        """Start counting from zero."""
        self._counts = dict.fromkeys(("steps", "raw_bytes", "exact_bytes", "coded_numel", "exact_numel"), 0)
        self._clock = Clock()
        self._sent_before = self._transport.sent_bytes if self._transport else 0

    def disable(self) -> None:
        """From the next step on, average everything exactly. DDP cannot unregister a hook; call on every rank."""
        self._enabled_next = False

    def enable(self) -> None:
        """From the next step on, code again. Call on every rank."""
        self._enabled_next = True

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs: plain numbers. The noise is a function of seed and step, so nothing else is kept."""
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
        return parameter.dim() > 1 and parameter.numel() >= self.min_numel and parameter not in self._exact

    # ---- what the hook calls ------------------------------------------------------------------------------------

    def _adopt(self, model: torch.nn.Module) -> None:
        """Exempt what the structure of `model` says."""
        self._exact.update(exemptions.structural(model, self.exempt))

    def _configuration(self) -> dict[str, Any]:
        """What must be equal on all ranks."""
        return {
            "terncomm version": __version__,
            "codec": repr(self.codec),
            "seed": self.seed,
            "skip": list(self.skip),
            "min_numel": self.min_numel,
            "warmup_steps": self.warmup_steps,
            "exchange": self.exchange,
            "exempt": sorted(self.exempt),
            "coded parameters": [n for n, p in zip(self._names, self._numbers, strict=True) if self.codes(p)],
        }

    def _connect(self, transport: Metered) -> Metered:
        """Use this transport from now on."""
        self._transport = transport
        self._sent_before = 0
        return transport

    def _reduce(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        flat = bucket.buffer()
        if flat.layout != torch.strided:
            raise TypeError(f"sparse gradients are not supported yet, got a bucket of layout {flat.layout}")
        transport = self._transport
        if transport is None:
            group = self._group or dist.distributed_c10d._get_default_group()
            transport = self._connect(_agreed(group, self._configuration()))
        if bucket.index() == 0:  # the first of a backward pass; one that is aborted later shifts nothing
            self._step += 1
            self._counts["steps"] += 1
            self._enabled = self._enabled_next
        coded, exact = self._layout(bucket)
        if not self._enabled or self._step < self.warmup_steps or transport.world_size == 1:
            coded, exact = Segments(()), Segments([flat.numel()])
        key = Key(self.seed, self._step, bucket.index())
        threads = torch.get_num_threads()

        def job() -> torch.Tensor:
            if torch.get_num_threads() != threads:  # torch keeps the number per thread
                torch.set_num_threads(threads)
            return self._run(flat, coded, exact, key, transport)

        if flat.is_cuda:
            self._check_arrived()
            return self._side_stream.submit(job, flat.device)
        return self._worker.submit(job)

    def _check_arrived(self) -> None:
        """Raise if ranks turned out to differ in an earlier bucket whose headers have reached the host by now."""
        while self._later and self._later[0].arrived():
            self._later.pop(0).check()

    def _run(self, flat: torch.Tensor, coded: Segments, exact: Segments, key: Key, transport: Metered) -> torch.Tensor:
        with self._clock("encode"):
            complaint = self._watch_clipping(flat, coded, key.step)
        codec = self.codec if len(coded) else None
        all_reduce_mean(
            flat,
            coded,
            codec,
            transport,
            key=key,
            exchange=self.exchange,
            exact=exact,
            clock=self._clock,
            later=self._later if flat.is_cuda else None,
        )
        counts = self._counts
        counts["raw_bytes"] += flat.numel() * flat.element_size()
        counts["exact_bytes"] += float_traffic(exact.numel, flat.element_size(), transport.world_size)
        counts["coded_numel"] += coded.numel
        counts["exact_numel"] += exact.numel
        if complaint is not None and transport.rank == 0:
            try:
                warnings.warn(complaint, stacklevel=2)
            except UserWarning:  # a filter made it an error: one rank alone must not stop for advice
                _log.warning(complaint)
        return flat

    def _layout(self, bucket: GradBucket) -> tuple[Segments, Segments]:
        """The coded and the exact layers of a bucket; DDP rebuilds buckets, so they are known by their parameters."""
        parameters = bucket.parameters()
        identity = tuple(map(id, parameters))
        if identity not in self._layouts:
            coded: list[tuple[int, int, int]] = []
            exact: list[tuple[int, int, int]] = []
            offset = 0
            for parameter in parameters:
                number = self._numbers.setdefault(parameter, len(self._numbers))
                row = (parameter.numel(), offset, number)
                (coded if self.codes(parameter) else exact).append(row)
                offset += parameter.numel()
            if offset != bucket.buffer().numel():
                raise RuntimeError(f"a bucket of {bucket.buffer().numel()} elements holds parameters of {offset}")
            self._layouts[identity] = _segments(coded), _segments(exact)
        return self._layouts[identity]

    def _name(self, number: int) -> str:
        return self._names[number] if number < len(self._names) else f"parameter {number}"

    def _watch_clipping(self, flat: torch.Tensor, coded: Segments, step: int) -> str | None:
        """Note what clipping takes from each layer, now and then; complain once if it is much."""
        since = step - self.warmup_steps
        if len(coded) == 0 or (since >= _CLIP_STEPS and since % _CLIP_EVERY):
            return None
        lost = self.codec.norm_lost(flat, coded)
        if lost is None:
            return None
        self._clip_lost.update(zip(coded.layers.tolist(), lost.tolist(), strict=True))
        share, worst = lost.max(dim=0)
        if share <= _CLIP_WARNING or self._clip_warned:
            return None
        self._clip_warned = True
        return (
            f"clipping takes {share:.0%} of the gradient norm of {self._name(int(coded.layers[worst]))}: its gradient "
            "is far from Gaussian. Consider skip=[...] for such layers, a larger clip, or the int8 codec; "
            "state.stats() has the share of every layer (clip_norm_lost/...)."
        )


def comm_hook(state: CommState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP communication hook: average a bucket's gradients over ranks through the codec of `state`.

    For `model.register_comm_hook(terncomm.CommState(codec="int8"), terncomm.comm_hook)`; :func:`register` does the
    same and also knows the model. Collectives run in bucket order on a process group of their own, off the autograd
    thread on CPU, so that they overlap with backward.
    """
    return state._reduce(bucket)


def register(
    model: torch.nn.Module,
    codec: str | Codec,
    *,
    skip: Collection[str] = (),
    min_numel: int = 1024,
    warmup_steps: int = 0,
    exchange: str = "auto",
    seed: int = 0,
    exempt: Collection[str] = exemptions.GROUPS,
) -> CommState:
    """Compress the gradient communication of a DDP model. Collective: every rank calls it, with the same arguments.

    Args:
        model: a `DistributedDataParallel`, or a wrapper that holds one (torch.compile).
        codec, skip, min_numel, warmup_steps, exchange, seed, exempt: see :class:`CommState`.

    Returns:
        The state, for `stats()`, `disable()` and `enable()`.

    Raises:
        TypeError: the model is not a DDP model; the message says what to use instead.
        RuntimeError: it already has a communication hook, or ranks called with different arguments.
    """
    ddp = _unwrap(model)
    if ddp._comm_hooks:
        hook = getattr(ddp._comm_hooks[0][0], "__qualname__", repr(ddp._comm_hooks[0][0]))
        raise RuntimeError(
            f"this DDP model already has a communication hook, {hook}, and DDP takes one for life. Make a new "
            "DistributedDataParallel for another; a terncomm hook is switched with state.disable() and state.enable()."
        )
    state: CommState | None = None
    refusal: Exception | None = None
    try:
        state = CommState(
            codec,
            skip=skip,
            min_numel=min_numel,
            warmup_steps=warmup_steps,
            exchange=exchange,
            seed=seed,
            exempt=exempt,
            named_parameters=ddp.module.named_parameters(),
            process_group=ddp.process_group,
        )
        state._adopt(ddp.module)
    except (TypeError, ValueError) as error:
        refusal = error
    try:
        transport = _agreed(ddp.process_group, state._configuration() if state else {"refused": str(refusal)})
    except ConfigurationsDiffer:
        if refusal is None:
            raise
    if state is None:
        assert refusal is not None
        raise refusal
    state._connect(transport)
    ddp.register_comm_hook(state, comm_hook)
    if dist.get_rank(ddp.process_group) == 0:
        parameters = list(state._numbers)
        coded = [p.numel() for p in parameters if state.codes(p)]
        total = sum(p.numel() for p in parameters)
        _log.info(
            "%r: %d of %d parameter tensors coded, %.1f%% of %d elements; seed %d, %d ranks",
            state.codec, len(coded), len(parameters), 100 * sum(coded) / max(total, 1), total, seed,
            dist.get_world_size(ddp.process_group),
        )  # fmt: skip
    return state


def _agreed(group: dist.ProcessGroup, configuration: dict[str, Any]) -> Metered:
    """A transport over a process group of our own, of `group`'s ranks, once all of them agree. Collective."""
    # Synchronized among these ranks only: a sub-group must not need the rest of the world.
    ranks = dist.get_process_group_ranks(group)
    own = dist.new_group(ranks, timeout=_timeout(group), use_local_synchronization=True)
    transport = Metered(ProcessGroupTransport(own))
    agree_on(configuration, transport, device=home_of(own))
    return transport


def _unwrap(model: torch.nn.Module) -> DistributedDataParallel:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"wanted a DistributedDataParallel model, got {model!r}")
    inner: Any = model
    while not isinstance(inner, DistributedDataParallel):
        for attribute in ("_orig_mod", "_forward_module"):
            if isinstance(vars(inner).get(attribute) or getattr(inner, "_modules", {}).get(attribute), torch.nn.Module):
                inner = getattr(inner, attribute)
                break
        else:
            kind = type(model).__name__
            if "FSDP" in kind or "FullyShardedDataParallel" in kind:
                raise TypeError(
                    f"{kind} shards gradients with its own reduce-scatter; terncomm.register takes DDP models"
                )
            raise TypeError(f"wanted a DistributedDataParallel model, got {kind}; wrap it first: DDP(model)")
    return inner


def _segments(rows: list[tuple[int, int, int]]) -> Segments:
    sizes, offsets, layers = zip(*rows, strict=True) if rows else ((), (), ())
    return Segments(sizes, offsets=offsets, layers=layers)


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """The timeout of the user's group, so that ours fails no later."""
    options = getattr(group._get_backend(home_of(group)), "options", None)
    return getattr(options, "_timeout", None)
