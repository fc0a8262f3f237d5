"""Private attributes of torch that terncomm needs. No other module of terncomm reads private attributes of torch.

Torch may rename or remove such an attribute in any release. Then a function of this module raises
:class:`IncompatibleTorch`, which names the attribute. Each docstring says in which versions of torch the attributes
exist. The tests run with 2.13. For 2.6, 2.8, 2.9 and 2.12 the attributes were looked up in the source. For classes
written in C++ only their names were looked up, in the compiled library, which does not tell the class of a name.
"""

import gc
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import Store  # type: ignore[attr-defined]

# Attributes in which a wrapper module holds the wrapped one: torch.compile, FSDP1 and activation checkpointing. They
# appear in the names of parameters. Present in 2.6 to 2.13.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_SEEN = "2.6 to 2.13"
_TRUE = ("1", "y", "yes", "t", "true", "on")  # of environment variables, as torch reads them


class IncompatibleTorch(Exception):
    """This version of torch lacks a private attribute that terncomm needs.

    Not a `RuntimeError`: terncomm treats a `RuntimeError` of torch during communication as the failure of a rank.
    """


def _missing(attribute: str, purpose: str, seen: str) -> IncompatibleTorch:
    return IncompatibleTorch(
        f"torch {torch.__version__} has no {attribute}, which terncomm needs {purpose} (seen in {seen}): please report "
        "it, with this version of torch"
    )


def _read(owner: Any, kind: str, name: str, purpose: str, seen: str = _SEEN) -> Any:
    """The attribute `name` of `owner`, an object of class `kind`; `purpose` and `seen` are for the error message."""
    try:
        return getattr(owner, name)
    except AttributeError:
        raise _missing(f"{kind}.{name}", purpose, seen) from None


def _write(owner: Any, kind: str, name: str, value: Any, purpose: str, seen: str = _SEEN) -> None:
    """Set an attribute that exists. A missing one raises: torch would not read a new attribute."""
    _read(owner, kind, name, purpose, seen)
    setattr(owner, name, value)


# Process groups and their backends.


def default_group() -> dist.ProcessGroup:
    """The default process group, through the public API.

    Raises:
        ValueError: `init_process_group` has not been called.
    """
    group = dist.group.WORLD
    if group is None:
        raise ValueError("Default process group has not been initialized, please make sure to call init_process_group.")
    return group


def store_of(group: dist.ProcessGroup) -> Store:
    """The rendezvous store of a group: `distributed_c10d._get_process_group_store`, 2.6 to 2.13."""
    module = dist.distributed_c10d
    find = _read(module, "distributed_c10d", "_get_process_group_store", "to connect ranks")
    return cast(Store, find(group))


def backend_of(group: dist.ProcessGroup, device: torch.device) -> Any:
    """The backend of a group that serves tensors of `device`: `ProcessGroup._get_backend`, 2.6 to 2.13."""
    return _read(group, "ProcessGroup", "_get_backend", "to send messages")(device)


def all_gather_flat(backend: Any, received: torch.Tensor, mine: torch.Tensor) -> Any:
    """Start an all-gather of `mine`, (k,), into `received`, (W * k,): `Backend._allgather_base`, 2.6 to 2.13.

    Returns:
        The work object to wait for.
    """
    return _read(backend, "Backend", "_allgather_base", "to send messages")(received, mine)


def timeout_of(backend: Any) -> timedelta:
    """The timeout of a backend's calls: `Options._timeout`, 2.6 to 2.13; torch's default for a backend without it.

    Raises:
        IncompatibleTorch: the options of a gloo or NCCL backend have no `_timeout`.
    """
    options = getattr(backend, "options", None)
    if options is not None and backend.name() in ("gloo", "nccl"):
        _read(options, type(options).__qualname__, "_timeout", "to detect ranks that do not arrive")
    return getattr(options, "_timeout", None) or dist.default_pg_timeout


def set_timeout(backend: Any, timeout: timedelta) -> None:
    """Set the timeout of a gloo or NCCL backend, for calls to come: `Backend._set_default_timeout`, 2.6 to 2.13."""
    _read(backend, "Backend", "_set_default_timeout", "to follow a change of the timeout")(timeout)


def gloo_options_like(backend: Any, timeout: timedelta) -> Any:
    """Options for a new gloo backend: network interfaces and number of threads of `backend`, and another timeout.

    `ProcessGroupGloo._Options`, with `_devices`, `_threads` and `_timeout`: 2.6 to 2.13.
    """
    kind, purpose = "ProcessGroupGloo._Options", "to connect ranks over gloo"
    theirs = _read(backend, "ProcessGroupGloo", "options", purpose)
    options = _read(dist.ProcessGroupGloo, "ProcessGroupGloo", "_Options", purpose)()
    _write(options, kind, "_threads", _read(theirs, kind, "_threads", purpose), purpose)
    _write(options, kind, "_devices", _own_devices() or _read(theirs, kind, "_devices", purpose), purpose)
    _write(options, kind, "_timeout", timeout, purpose)
    return options


def _own_devices() -> list[Any]:
    """New gloo devices if those of the default group connect lazily, for such a device cannot serve two groups.

    `ProcessGroupGloo.create_device` and `create_default_device`, with `lazy_init`: seen in 2.13 only. A version that
    does not know `lazy_init` does not connect lazily.
    """
    if os.environ.get("TORCH_GLOO_LAZY_INIT", "0").lower() not in _TRUE:
        return []
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    gloo = dist.ProcessGroupGloo
    try:
        if not names:
            return [gloo.create_default_device(lazy_init=False)]
        return [gloo.create_device(interface=name, lazy_init=False) for name in names]
    except TypeError:
        return []


def gloo_device_count(backend: Any) -> int:
    """The number of network interfaces of a gloo backend: `ProcessGroupGloo._Options._devices`, 2.6 to 2.13."""
    purpose = "to close connections over gloo"
    options = _read(backend, "ProcessGroupGloo", "options", purpose)
    return len(_read(options, "ProcessGroupGloo._Options", "_devices", purpose))


def nccl_options(timeout: timedelta) -> Any:
    """Options for an NCCL backend: `ProcessGroupNCCL.Options._timeout`, in the type stubs of 2.6 to 2.13."""
    options = dist.ProcessGroupNCCL.Options()
    _write(options, "ProcessGroupNCCL.Options", "_timeout", timeout, "to connect ranks over NCCL")
    return options


# DistributedDataParallel.


def comm_hook_of(ddp: nn.parallel.DistributedDataParallel) -> Any:
    """The communication hook of a DDP model, or None: `DistributedDataParallel._comm_hooks`, 2.6 to 2.13."""
    hooks = _read(ddp, "DistributedDataParallel", "_comm_hooks", "to find an earlier communication hook")
    return hooks[0][0] if hooks else None


def optimizer_in_backward(ddp: nn.parallel.DistributedDataParallel) -> bool:
    """Whether `_apply_optimizer_in_backward` was called on its parameters: `Tensor._in_backward_optimizers`.

    2.6 to 2.13. DDP registers a communication hook for it in the first forward pass.
    """
    return any(hasattr(parameter, "_in_backward_optimizers") for parameter in ddp.module.parameters())


def models_with_hook_state(state: Any) -> list[nn.parallel.DistributedDataParallel]:
    """The DDP models in this process whose communication hook has this state: `_comm_hooks`, 2.6 to 2.13.

    A hook is not told its model, so this looks at all objects that Python's garbage collector tracks.
    """
    models = [each for each in gc.get_objects() if issubclass(type(each), nn.parallel.DistributedDataParallel)]
    return [model for model in models if any(held is state for _, held in getattr(model, "_comm_hooks", ()))]


def backward_pass() -> int:
    """Number of the backward pass that runs on this thread, -1 if none: `torch._C._current_graph_task_id`, 2.6 to 2.13.

    Inside a reentrant activation checkpoint it is that of the nested pass.
    """
    return int(_read(torch._C, "_C", "_current_graph_task_id", "to tell one backward pass from the next")())


def uses_python_reducer(ddp: nn.parallel.DistributedDataParallel) -> bool:
    """Whether torch.compile reduces the gradients instead of DDP's buckets: `_use_python_reducer`, 2.6 to 2.13.

    A torch without this attribute has no such reducer.
    """
    return bool(getattr(ddp, "_use_python_reducer", False))


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper of torch.compile (`_orig_mod`, 2.6 to 2.13) or Lightning Fabric (`_forward_module`).

    None if `module` is no such wrapper. `getattr` would not do: other wrappers forward it to the module inside them. So
    this reads `Module._modules`, 2.6 to 2.13.
    """
    children = _read(module, "Module", "_modules", "to find the model inside a wrapper")
    for name in ("_orig_mod", "_forward_module"):
        if isinstance(inner := vars(module).get(name) or children.get(name), nn.Module):
            return inner
    return None


def first_bucket_bytes() -> int:
    """Default size of DDP's first bucket in bytes: `torch.distributed._DEFAULT_FIRST_BUCKET_BYTES`, 2.6 to 2.13."""
    return int(_read(dist, "torch.distributed", "_DEFAULT_FIRST_BUCKET_BYTES", "to predict DDP's buckets"))


def bucket_assignment(tensors: Sequence[torch.Tensor], limits: Sequence[int]) -> list[list[int]]:
    """For each DDP bucket, the indices of its tensors in `tensors`.

    `torch.distributed._compute_bucket_assignment_by_size`, 2.6 to 2.13.

    Args:
        tensors: in the order in which DDP fills its buckets.
        limits: size limits in bytes, of the first bucket, the second, and so on; the last one holds for all others.
    """
    name = "_compute_bucket_assignment_by_size"
    assign = _read(dist, "torch.distributed", name, "to predict DDP's buckets")
    places, _ = assign(list(tensors), list(limits), [False] * len(tensors))
    return cast(list[list[int]], places)


# FSDP2 (fully_shard).


class FSDP2Group(NamedTuple):
    """The parameters of one `fully_shard` module that FSDP reduces together.

    params: FSDP's own objects. Give them to :func:`fsdp2_parameter`, :func:`fsdp2_dimension` and :func:`fsdp2_shape`.
    device: on which FSDP reduces.
    shards: the process group over which a parameter is sharded, or None if it is only replicated.
    replicas: the process group of the ranks that hold the same shard, or None if each shard exists once.
    reduce_scatter: FSDP's object for the reduce-scatter, which `set_custom_reduce_scatter` replaces.
    all_reduce_hook: the hook of `set_all_reduce_hook`, or None.
    """

    params: list[Any]
    device: torch.device
    shards: dist.ProcessGroup | None
    replicas: dist.ProcessGroup | None
    reduce_scatter: Any
    all_reduce_hook: Any


def fsdp2_groups(module: nn.Module) -> list[FSDP2Group]:
    """The groups of a `fully_shard` module; an empty list if it has no parameters of its own.

    `FSDPModule._get_fsdp_state` and the attributes of `FSDPParamGroup` and its mesh: 2.9 to 2.13. Earlier versions
    have no `set_custom_reduce_scatter`. A module has one group, `FSDPState._fsdp_param_group`, in 2.6 to 2.9, and
    several, `_fsdp_param_groups`, in 2.12 and 2.13.
    """
    state = _read(module, "FSDPModule", "_get_fsdp_state", _FSDP2)()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [_read(state, "FSDPState", "_fsdp_param_group", _FSDP2)]
    return [_fsdp2_group(group) for group in groups if group is not None]


_FSDP2 = "for FSDP2"


def _fsdp2_group(group: Any) -> FSDP2Group:
    params, device, mesh, reduce_scatter, all_reduce_hook = (
        _read(group, "FSDPParamGroup", name, _FSDP2, "2.9 to 2.13")
        for name in ("fsdp_params", "device", "mesh_info", "_reduce_scatter_comm", "_all_reduce_hook")
    )
    shards = getattr(mesh, "shard_process_group", None)
    replicas = getattr(mesh, "replicate_process_group", None)
    if shards is None and replicas is None:
        raise _missing(f"{type(mesh).__name__}.shard_process_group", _FSDP2, _SEEN)
    return FSDP2Group(list(params), device, shards, replicas, reduce_scatter, all_reduce_hook)


def fsdp2_parameter(param: Any) -> nn.Parameter:
    """The parameter that the optimizer holds: `FSDPParam.sharded_param`, 2.6 to 2.13. Torch may replace it later."""
    return cast(nn.Parameter, _read(param, "FSDPParam", "sharded_param", _FSDP2))


def fsdp2_dimension(param: Any) -> int:
    """The dimension along which the parameter is sharded: `FSDPParam.fsdp_placement`, 2.6 to 2.13."""
    return int(_read(param, "FSDPParam", "fsdp_placement", _FSDP2).dim)


def fsdp2_shape(param: Any) -> torch.Size:
    """The shape of the whole parameter: `FSDPParam._orig_size`, 2.6 to 2.13."""
    return cast(torch.Size, _read(param, "FSDPParam", "_orig_size", _FSDP2))


# FSDP1 (FullyShardedDataParallel).


class Member(NamedTuple):
    """A parameter inside a flat parameter: attribute `name` of `module`.

    It is the elements [offset, offset + numel) of the whole flat parameter.
    """

    module: nn.Module
    name: str
    shape: torch.Size
    numel: int
    offset: int


class Alias(NamedTuple):
    """Attribute `name` of `module` is the same parameter as attribute `of_name` of `of_module`."""

    module: nn.Module
    name: str
    of_module: nn.Module
    of_name: str


class FlatParameter(NamedTuple):
    """The flat parameter of an FSDP1 unit, and the parameters in it, in the order of their offsets."""

    flat: nn.Parameter
    members: list[Member]
    aliases: list[Alias]


_FSDP1 = "for FSDP1"


def flat_parameter(unit: Any) -> FlatParameter | None:
    """The flat parameter of a `FullyShardedDataParallel`, or None if it has no parameters of its own.

    `FullyShardedDataParallel._handle`; `FlatParameter._param_infos`, `_shapes`, `_numels_with_padding`,
    `_is_padding_mask` and `_shared_param_infos`: 2.6 to 2.13.
    """
    handle = _read(unit, "FullyShardedDataParallel", "_handle", _FSDP1)
    if handle is None:
        return None
    flat = _read(handle, "FlatParamHandle", "flat_param", _FSDP1)
    infos, shapes, numels, paddings, shared = (
        _read(flat, "FlatParameter", name, _FSDP1)
        for name in ("_param_infos", "_shapes", "_numels_with_padding", "_is_padding_mask", "_shared_param_infos")
    )
    spans, end = [], 0
    for numel, is_padding in zip(numels, paddings, strict=True):
        if not is_padding:
            spans.append((int(numel), end))
        end += int(numel)
    members = [
        Member(info.module, info.param_name, shape, *span)
        for info, shape, span in zip(infos, shapes, spans, strict=True)
    ]
    aliases = [Alias(i.module, i.param_name, i.prim_module, i.prim_param_name) for i in shared]
    return FlatParameter(flat, members, aliases)


def fsdp1_requires_grad(parameter: FlatParameter) -> list[bool]:
    """Whether each member requires a gradient now: `FlatParameter._params`, 2.6 to 2.13.

    With `use_orig_params=False` this attribute is None; then the flag of the flat parameter holds for all members.
    """
    params = _read(parameter.flat, "FlatParameter", "_params", _FSDP1)
    return [each.requires_grad for each in params or [parameter.flat] * len(parameter.members)]


def fsdp1_comm_hook(unit: Any) -> Any:
    """The communication hook of a unit, or None: `FullyShardedDataParallel._comm_hook`, 2.6 to 2.13."""
    return _read(unit, "FullyShardedDataParallel", "_comm_hook", _FSDP1)


def set_fsdp1_hook_state(unit: Any, state: Any) -> None:
    """Give the hook of one unit a state of its own: `_comm_hook_state`, 2.6 to 2.13.

    The public `register_comm_hook` gives all units of a model the same one.
    """
    _write(unit, "FullyShardedDataParallel", "_comm_hook_state", state, _FSDP1)


def is_hybrid(strategy: Any) -> bool:
    """Whether a strategy of FSDP1 shards inside nodes and replicates between them.

    `ShardingStrategy._HYBRID_SHARD_ZERO2`, 2.6 to 2.13.
    """
    name = "_HYBRID_SHARD_ZERO2"
    return strategy in (type(strategy).HYBRID_SHARD, _read(type(strategy), "ShardingStrategy", name, _FSDP1))


# Tensors.


def version_of(tensor: torch.Tensor) -> int:
    """How often the tensor was changed in place, by any optimizer.

    Private: `Tensor._version`, in 2.6 to 2.13.
    """
    return int(_read(tensor, "Tensor", "_version", "to see whether weights have changed"))


def sparse_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and values of a sparse tensor, not coalesced: `Tensor._indices` and `_values`, 2.6 to 2.13.

    The public `indices()` and `values()` raise if the tensor is not coalesced.
    """
    purpose = "for sparse gradients"
    return _read(tensor, "Tensor", "_indices", purpose)(), _read(tensor, "Tensor", "_values", purpose)()


def copy_all(into: list[torch.Tensor], source: list[torch.Tensor]) -> None:
    """Copy source[i] to into[i] for all i, with few kernels: `torch._foreach_copy_`, 2.6 to 2.13."""
    _read(torch, "torch", "_foreach_copy_", "to copy gradients")(into, source)


def multiply_all(tensors: list[torch.Tensor], factor: float) -> None:
    """Multiply each tensor in place, in few kernels: `torch._foreach_mul_`, 2.6 to 2.13."""
    _read(torch, "torch", "_foreach_mul_", "to scale gradients")(tensors, factor)
