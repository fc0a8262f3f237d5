"""The hook for `torch.nn.parallel.DistributedDataParallel`."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from terncomm.codecs import CodecLike
from terncomm.hooks.connection import telling_refusal
from terncomm.hooks.fsdp import register_fsdp
from terncomm.hooks.fsdp1 import fsdp1_units, register_fsdp1
from terncomm.hooks.nodes import connect_nodes, node_of
from terncomm.hooks.sharded import ShardState
from terncomm.hooks.state import CommState
from terncomm.path.stages import Stage
from terncomm.structure import GROUPS
from terncomm.torch_internals import comm_hook_of, optimizer_in_backward, uses_python_reducer, wrapped_module
from terncomm.transports import Transport

_NAMED = 5  # models that an error names at most

_PYTHON_REDUCER = (
    "torch.compile with optimize_ddp='python_reducer' does not use DDP's buckets, which communication hooks need. Set "
    "torch._dynamo.config.optimize_ddp = 'ddp_optimizer' (the default) before you construct DistributedDataParallel."
)


def comm_hook(state: CommState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP communication hook: average a bucket's gradients over ranks through the codec of `state`.

    Use it as `model.register_comm_hook(terncomm.CommState(codec="int8"), terncomm.comm_hook)`. :func:`register` does
    the same, and also reads the names and the structure of the model. Collectives run in bucket order on a private
    process group. On CPU they run on other threads than autograd, so they overlap with backward.

    Returns:
        A future of the bucket's buffer, (n,), which then holds the mean.
    """
    if not isinstance(bucket, GradBucket):  # python_reducer passes a pair of gradient and parameter
        raise RuntimeError(_PYTHON_REDUCER)
    return state.reduce(bucket)


def register(
    model: torch.nn.Module,
    codec: CodecLike,
    *,
    skip: Collection[str] = (),
    min_numel: int = 1024,
    warmup_steps: int = 0,
    exchange: str = "auto",
    seed: int = 0,
    exempt: Collection[str] = GROUPS,
    intra_group: dist.ProcessGroup | None = None,
    replicas: dist.ProcessGroup | None = None,
    transport: Transport | None = None,
    stages: Sequence[Stage] = (),
) -> CommState | ShardState:
    """Compress the gradient communication of a model. Collective: every rank calls it, with the same arguments.

    Args:
        model: a `DistributedDataParallel`, or a wrapper that holds one (torch.compile); or a model of `fully_shard`
            (FSDP2) or `FullyShardedDataParallel` (FSDP1), whose reduce-scatter is then compressed.
        codec, skip, min_numel, warmup_steps, exchange, seed, exempt: see :class:`terncomm.hooks.options.Options`.
        intra_group: for DDP: the process group of this node's ranks; every node has the same number of ranks. Gradients
            are averaged uncompressed inside nodes, and compressed only between nodes. There each rank sends one slice,
            so a node sends as much as a single rank would. Each slice of a layer has its own scale, and a non-finite
            element spoils only its slice of the layer.
        replicas: for `fully_shard` over a one-dimensional mesh: the process group of the ranks that hold the same
            shard. It replaces FSDP2's own hybrid sharding (HSDP). Gradients are reduced uncompressed inside the mesh,
            and compressed between replicas.
        transport: for DDP: sends the bytes, in place of a private process group. An object with the members of
            :class:`terncomm.transports.Transport`, over the ranks of the model's process group; blocking calls suffice.
            With `begin`, messages overlap, see :class:`terncomm.transports.base.Overlapping`. With `beside`, headers
            need not wait for them, see :func:`terncomm.transports.base.beside`. One thread at a time calls it: the
            caller's in `register`, then one of the hook's, and another for `beside`. Nothing else may use it. A rank
            that fails raises its own error; the other ranks raise what their transport raises when a rank does not
            answer.
        stages: for DDP without `intra_group`: what changes the gradients of compressed layers before encoding, and
            their means afterwards, such as error feedback; see :class:`terncomm.path.stages.Stage`.

    Returns:
        The state, for `stats()`, `disable()` and `enable()`.

    Raises:
        TypeError: the model is none of these, its kind of sharding is not supported, or an option does not fit it; the
            message says what to use instead.
        ValueError: an option is invalid.
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
        "stages": stages,
    }
    sharded, units = _is_fully_sharded(model), fsdp1_units(model)
    if stages and (sharded or units or intra_group is not None):
        raise TypeError(
            "stages= is for DistributedDataParallel without intra_group=: otherwise ranks encode only slices of layers"
        )
    if intra_group is not None and (sharded or units):
        raise TypeError("intra_group= is for DistributedDataParallel; models of fully_shard have replicas=")
    if transport is not None:
        _check_transport(transport, "fully_shard and FSDP" if sharded or units else "intra_group=" * bool(intra_group))
    if sharded:
        return register_fsdp(model, codec, options, replicas)
    if replicas is not None:
        raise TypeError("replicas= is for models of fully_shard (FSDP2); DistributedDataParallel has intra_group=")
    if units:
        return register_fsdp1(model, units, codec, options)
    ddp = _unwrap(model)
    _refuse_other_hooks(ddp)
    skips_buckets = getattr(ddp, "skip_all_reduce_unused_params", False)
    if stages and skips_buckets:
        raise TypeError(
            "stages= does not go with DistributedDataParallel(skip_all_reduce_unused_params=True), which may skip the "
            "last bucket of a step: their state is kept only when a step has ended"
        )
    if uses_python_reducer(ddp):
        raise RuntimeError(_PYTHON_REDUCER)
    held = _held(ddp)
    device = next((each for _, each in held if each.requires_grad), next(ddp.parameters())).device
    with telling_refusal(transport or ddp.process_group, device):
        node = [] if intra_group is None else node_of(ddp.process_group, intra_group)
        state = CommState(
            codec,
            **options,
            named_parameters=held,
            process_group=ddp.process_group,
            transport=transport,
        )
        state.check_dtypes()
        state.get_ready(device)
        state.layers.adopt(ddp.module)
        configuration: dict[str, Any] = {
            **state.configuration(),
            "bucket_cap_mb": round(ddp.bucket_bytes_cap / 2**20, 3),
            "ranks in intra_group": len(node),
        }
    connection = state.meet(device, configuration)
    if node:
        assert connection is not None
        state.connect(connection.transport, connection, connect_nodes(connection, node, device))
    state.skips_buckets = skips_buckets
    ddp.register_comm_hook(state, comm_hook)
    state.announce()
    return state


def _held(ddp: DistributedDataParallel) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters that DDP does not ignore. DDP knows a parameter of the model itself as ".NAME"."""
    named = [(name if "." in name else f".{name}", each) for name, each in ddp.module.named_parameters()]
    return [(name.removeprefix("."), each) for name, each in named if name not in ddp.parameters_to_ignore]


def _refuse_other_hooks(ddp: DistributedDataParallel) -> None:
    """Raise a RuntimeError if DDP's only communication hook is taken, or will be; the message says by what."""
    if getattr(ddp, "mixed_precision", None) is not None:
        raise RuntimeError(
            "DistributedDataParallel(mixed_precision=) reduces gradients by a communication hook of its own, and DDP "
            "accepts only one. Construct it without mixed_precision=, and use torch.autocast or "
            "model.to(torch.bfloat16)."
        )
    hook = comm_hook_of(ddp)
    named = getattr(hook, "__qualname__", repr(hook))
    if optimizer_in_backward(ddp) or any(name in named for name in ("hook_then_optimizer", "apply_optim_in_backward")):
        raise RuntimeError(
            "an optimizer runs inside the backward pass of this model (_apply_optimizer_in_backward or "
            "_register_fused_optim), for which DDP uses its only communication hook. Let the optimizer step after "
            "backward."
        )
    if hook is not None:
        raise RuntimeError(
            f"this DDP model already has a communication hook, {named}, and DDP accepts only one. Construct a new "
            "DistributedDataParallel; or switch a terncomm hook off and on with state.disable() and state.enable()."
        )


def _check_transport(transport: Any, refused: str) -> None:
    """Check the option `transport`. refused: what it cannot be combined with, or "".

    Raises:
        TypeError: `refused` is not empty, or the object lacks a member of `Transport`.
    """
    if refused:
        raise TypeError(f"transport= is for DistributedDataParallel only; with {refused} terncomm makes its own groups")
    wanted = ["rank", "world_size", "all_gather", "all_to_all"]
    if hasattr(transport, "begin"):
        wanted.append("in_flight")
    if missing := [name for name in wanted if not hasattr(transport, name)]:
        raise TypeError(f"transport: wanted {', '.join(wanted)}; {transport!r} lacks {missing[0]}")
    for name in ("rank", "world_size"):
        if not isinstance(value := getattr(transport, name), int):
            raise TypeError(f"transport: {name} must be an int, {transport!r} has {value!r}")


def _is_fully_sharded(model: Any) -> bool:
    """Whether `fully_shard` (FSDP2) was called on the model or a module in it."""
    return isinstance(model, torch.nn.Module) and any(hasattr(m, "set_custom_reduce_scatter") for m in model.modules())


def _unwrap(model: torch.nn.Module) -> DistributedDataParallel:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"wanted a DistributedDataParallel model, got {model!r}")
    inner: Any = model
    while not isinstance(inner, DistributedDataParallel):
        inner = wrapped_module(inner)
        if inner is None:
            kind = type(model).__name__
            if kind.startswith("FSDP"):
                raise TypeError(
                    f"{kind} is sharded by fully_shard, but torch {torch.__version__} does not allow to replace its "
                    "reduce-scatter: install a newer torch, with FSDPModule.set_custom_reduce_scatter"
                )
            raise TypeError(f"wanted a DistributedDataParallel model, got {_kind(model)}; {_advice(model)}")
    return inner


def _kind(model: torch.nn.Module) -> str:
    """The class of a model; with its module, if another library has named it like torch's."""
    kind = type(model)
    return kind.__name__ if kind.__name__ != DistributedDataParallel.__name__ else f"{kind.__module__}.{kind.__name__}"


def _advice(model: torch.nn.Module) -> str:
    """What to do with a model that is no DistributedDataParallel."""
    held = [name for name, module in model.named_modules() if isinstance(module, DistributedDataParallel)]
    if held:
        some = ", ".join(f"terncomm.register(model.{name}, ...)" for name in held[:_NAMED])
        more = f" and {len(held) - _NAMED} more" if len(held) > _NAMED else ""
        return f"it holds such models: register each of them, {some}{more}"
    if hasattr(model, "register_comm_hook"):
        return (
            "it reduces its gradients already, with a hook of its own to register, as replicate() does. Use the plain "
            "pair: model.register_comm_hook(terncomm.CommState(named_parameters=model.named_parameters()), "
            "terncomm.comm_hook)"
        )
    alone = "" if dist.is_initialized() and dist.get_world_size() > 1 else ". One process needs no hook"
    return f"wrap it first: DDP(model){alone}"
