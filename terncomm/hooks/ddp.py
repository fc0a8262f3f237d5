"""The hook for `torch.nn.parallel.DistributedDataParallel`."""

import logging
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from terncomm.codecs import Codec
from terncomm.hooks.agreement import ConfigurationsDiffer
from terncomm.hooks.connection import connect
from terncomm.hooks.fsdp import register_fsdp
from terncomm.hooks.fsdp1 import fsdp1_units, register_fsdp1
from terncomm.hooks.nodes import levels_between, node_of
from terncomm.hooks.sharded import ShardState
from terncomm.hooks.state import CommState
from terncomm.layers import GROUPS

_log = logging.getLogger("terncomm")

_PYTHON_REDUCER = (
    "torch.compile's optimize_ddp='python_reducer' does without DDP's buckets, which communication hooks work on. Set "
    "torch._dynamo.config.optimize_ddp = 'ddp_optimizer' (the default) before DistributedDataParallel is made."
)


def comm_hook(state: CommState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP communication hook: average a bucket's gradients over ranks through the codec of `state`.

    For `model.register_comm_hook(terncomm.CommState(codec="int8"), terncomm.comm_hook)`; :func:`register` does the
    same and also knows the model. Collectives run in bucket order on a process group of their own, off the autograd
    thread on CPU, so that they overlap with backward.
    """
    if not isinstance(bucket, GradBucket):  # a pair of gradient and parameter
        raise RuntimeError(_PYTHON_REDUCER)
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
    exempt: Collection[str] = GROUPS,
    intra_group: dist.ProcessGroup | None = None,
    replicas: dist.ProcessGroup | None = None,
) -> CommState | ShardState:
    """Compress the gradient communication of a model. Collective: every rank calls it, with the same arguments.

    Args:
        model: a `DistributedDataParallel`, or a wrapper that holds one (torch.compile); or a model of `fully_shard`
            (FSDP2) or `FullyShardedDataParallel` (FSDP1), whose reduce-scatter then sends codes.
        codec, skip, min_numel, warmup_steps, exchange, seed, exempt: see :class:`CommState`.
        intra_group: for DDP: the ranks of this node, equally many on all nodes. Gradients are then averaged as floats
            inside nodes and coded between nodes alone, where each rank sends its part of what one rank would send.
            Scales, and what a non-finite element spoils, are then of each rank's part of a layer.
        replicas: for `fully_shard` over a one-dimensional mesh: the group of the ranks that hold the same shard, in
            place of FSDP2's own hybrid sharding. Gradients are then reduced plainly inside the mesh, and coded between
            replicas.

    Returns:
        The state, for `stats()`, `disable()` and `enable()`.

    Raises:
        TypeError: the model is none of these, or sharded in a way that cannot be served; the message says what to use
            instead.
        RuntimeError: it already has a communication hook, ranks called with different arguments, or a rank did not
            call within the timeout of the model's process group.
    """
    options: dict[str, Any] = {
        "skip": skip,
        "min_numel": min_numel,
        "warmup_steps": warmup_steps,
        "exchange": exchange,
        "seed": seed,
        "exempt": exempt,
    }
    sharded, units = _is_fully_sharded(model), fsdp1_units(model)
    if intra_group is not None and (sharded or units):
        raise TypeError("intra_group= is for DistributedDataParallel; models of fully_shard have replicas=")
    if sharded:
        return register_fsdp(model, codec, options, replicas)
    if replicas is not None:
        raise TypeError("replicas= is for models of fully_shard (FSDP2); DistributedDataParallel has intra_group=")
    if units:
        return register_fsdp1(model, units, codec, options)
    ddp = _unwrap(model)
    if ddp._comm_hooks:
        hook = getattr(ddp._comm_hooks[0][0], "__qualname__", repr(ddp._comm_hooks[0][0]))
        raise RuntimeError(
            f"this DDP model already has a communication hook, {hook}, and DDP takes one for life. Make a new "
            "DistributedDataParallel for another; a terncomm hook is switched with state.disable() and state.enable()."
        )
    if getattr(ddp, "_use_python_reducer", False):
        raise RuntimeError(_PYTHON_REDUCER)
    state: CommState | None = None
    refusal: Exception | None = None
    configuration: dict[str, Any]
    node: list[int] = []
    try:
        node = [] if intra_group is None else node_of(ddp.process_group, intra_group)
        state = CommState(
            codec,
            **options,
            named_parameters=ddp.module.named_parameters(),
            process_group=ddp.process_group,
        )
        state._layers.adopt(ddp.module)
        configuration = {**state._configuration(), "bucket_cap_mb": round(ddp.bucket_bytes_cap / 2**20, 3)}
        configuration["ranks in intra_group"] = len(node)
    except (TypeError, ValueError) as error:
        refusal = error
        configuration = {"refused": str(refusal)}
    device = next(ddp.parameters()).device
    try:
        connection = connect(ddp.process_group, device, configuration)
    except ConfigurationsDiffer:
        if refusal is None:
            raise
    if state is None:
        assert refusal is not None
        raise refusal
    state._connect(connection)
    if node:
        state._levels, state._in_levels = levels_between(connection, node, device), True
    ddp.register_comm_hook(state, comm_hook)
    if connection.transport.rank == 0:
        _log.info("%s", state._summary())
    return state


def _is_fully_sharded(model: Any) -> bool:
    """Whether fully_shard (FSDP2) holds parameters of the model."""
    return isinstance(model, torch.nn.Module) and any(hasattr(m, "set_custom_reduce_scatter") for m in model.modules())


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
            if kind.startswith("FSDP"):
                raise TypeError(
                    f"{kind} is of fully_shard, whose reduce-scatter torch {torch.__version__} lets nobody replace: a "
                    "newer one, with FSDPModule.set_custom_reduce_scatter, is needed"
                )
            alone = "" if dist.is_initialized() and dist.get_world_size() > 1 else ". One process needs no hook"
            raise TypeError(f"wanted a DistributedDataParallel model, got {kind}; wrap it first: DDP(model){alone}")
    return inner
