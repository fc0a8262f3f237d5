"""FSDP2 (`fully_shard`): the reduce-scatter of gradients, or the all-reduce between replicas, through a codec."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ReduceOp

from terncomm.codecs import Codec
from terncomm.hooks.averaging import Averaging
from terncomm.hooks.connection import Connection, connect
from terncomm.keys import Key
from terncomm.scatter import Shards, reduce_scatter


class ShardState(Averaging):
    """What :func:`terncomm.register` returns for a model of `fully_shard`: statistics, switches, checkpoint.

    Options are those of :class:`terncomm.CommState`. A step is a reduction of each FSDP module's parameters.
    """

    _OWN = (*Averaging._OWN, "_connection", "_failed", "_groups")

    def _detach(self) -> None:
        super()._detach()
        self._connection: Connection | None = None
        self._failed: Exception | None = None
        self._groups: list[_Group] = []

    def load_state_dict(self, saved: dict[str, int]) -> None:
        """See :class:`terncomm.CommState`."""
        super().load_state_dict(saved)
        for group in self._groups:
            group.step = self._step

    def _connect(self, connection: Connection) -> None:
        self._connection, self._transport = connection, connection.transport
        self._sent_before = 0

    def _codes_now(self, step: int) -> bool:
        return self._enabled_next and step >= self.warmup_steps

    def _guarded(self, where: str, work: Any) -> None:
        """Run `work` and tell the other ranks if it fails."""
        if self._failed is not None:
            raise RuntimeError(f"an earlier gradient reduction failed: {self._failed}") from self._failed
        assert self._connection is not None
        try:
            work()
        except Exception as error:
            self._failed = error
            failure = self._connection.fail(error, f"{where}, {self._clock.phase}")
            raise failure from (None if failure is error else error)


class _Group:
    """The parameters that FSDP reduces together."""

    def __init__(self, state: ShardState, index: int, name: str, params: Sequence[Any]) -> None:
        self.state = state
        self.index = index
        self.name = name
        self.params = [p for p in params if p.sharded_param.requires_grad]
        self.step = state._step
        self._made: tuple[Shards, Shards] | None = None

    def shards(self, world_size: int) -> tuple[Shards, Shards]:
        """The layout, and the same with nothing coded."""
        if self._made is None:
            layers = self.state._layers
            shapes = [p._orig_size for p in self.params]
            sizes = [shape.numel() for shape in shapes]
            whole = [shape[0] if len(shape) else 1 for shape in shapes]
            chunks = [-(-d // world_size) * (n // d if d else 0) for d, n in zip(whole, sizes, strict=True)]
            numbers = [layers.number(p.sharded_param) for p in self.params]
            # Parameters that are sharded along another dimension lie in the buffer in another order than they have.
            usual = [p.fsdp_placement.dim == 0 for p in self.params]
            coded = [u and layers.codes(p.sharded_param) for u, p in zip(usual, self.params, strict=True)]
            made = [Shards(sizes, chunks, numbers, which, world_size) for which in (coded, [False] * len(sizes))]
            self._made = made[0], made[1]
        return self._made

    def begin(self) -> tuple[Key, str]:
        """A reduction of these parameters begins."""
        state, self.step = self.state, self.step + 1
        if self.step > state._step:
            state._step = self.step
            state._counts["steps"] += 1
        return Key(state.seed, self.step, self.index), f"{self.name} of step {self.step}"


def _divisor(op: Any, world_size: int) -> float:
    """What the sum is divided by."""
    if op == ReduceOp.AVG:
        return world_size
    if op == ReduceOp.SUM:
        return 1.0
    factor = op.__getstate__()[1] if op == ReduceOp.PREMUL_SUM else None
    if not isinstance(factor, (int, float)):
        raise ValueError(f"FSDP asked for {op}; terncomm knows AVG, SUM and PREMUL_SUM by a number")
    return 1.0 / factor


class ReduceScatter:
    """For `FSDPModule.set_custom_reduce_scatter`: what its :class:`ReduceScatter` protocol asks for."""

    def __init__(self, group: _Group) -> None:
        self._group = group

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for input and output."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Leave the reduced shard in `output_tensor`; done when it returns."""
        held, state = self._group, self._group.state
        key, where = held.begin()
        transport = state._transport
        assert transport is not None

        def work() -> None:
            coded, plain = held.shards(transport.world_size)
            shards = coded if state._codes_now(key.step) else plain
            if input_tensor.numel() != transport.world_size * shards.row:
                raise RuntimeError(
                    f"FSDP reduces {input_tensor.numel()} elements of {held.name}, whose parameters make "
                    f"{transport.world_size * shards.row}: one of them got no gradient, and which cannot be told. "
                    "Every parameter of a fully_shard module must take part in each backward pass"
                )
            reduce_scatter(
                input_tensor,
                shards,
                state.codec if shards.layers.numel else None,
                transport,
                key=key,
                divisor=_divisor(op, transport.world_size),
                out=output_tensor,
                clock=state._clock,
                later=state._later if input_tensor.is_cuda else None,
            )
            counts, itemsize = state._counts, input_tensor.element_size()
            counts["raw_bytes"] += input_tensor.nbytes
            counts["exact_bytes"] += (transport.world_size - 1) * shards.exact_numel * itemsize
            counts["coded_numel"] += shards.layers.numel
            counts["exact_numel"] += shards.exact_numel * transport.world_size

        state._guarded(where, work)


class _BetweenReplicas:
    """For `FSDPModule.set_all_reduce_hook`: the mean of a shard over the ranks that hold it too."""

    def __init__(self, group: _Group, shard_rank: int, shard_ranks: int) -> None:
        self._group = group
        self._rank, self._ranks = shard_rank, shard_ranks

    def __call__(self, reduced: torch.Tensor) -> None:
        held, state = self._group, self._group.state
        key, where = held.begin()
        transport = state._transport
        assert transport is not None

        def work() -> None:
            coded_shards, plain = held.shards(self._ranks)
            coded, exact = (coded_shards if state._codes_now(key.step) else plain).own(self._rank)
            state._run(reduced, coded, exact, key, transport)

        state._guarded(where, work)


def register_fsdp(
    model: nn.Module,
    codec: str | Codec,
    *,
    replicas: dist.ProcessGroup | None = None,
    skip: Collection[str],
    min_numel: int,
    warmup_steps: int,
    exchange: str,
    seed: int,
    exempt: Collection[str],
) -> ShardState:
    """What :func:`terncomm.register` does with a model of `fully_shard`; see there.

    Raises:
        TypeError: the model, or a part of it, is sharded in a way that cannot be served; the message says why.
    """
    state = ShardState(
        codec,
        skip=skip,
        min_numel=min_numel,
        warmup_steps=warmup_steps,
        exchange=exchange,
        seed=seed,
        exempt=exempt,
        named_parameters=model.named_parameters(),
    )
    state._layers.adopt(model)
    found: list[tuple[str, Any, Any]] = []
    for name, module in model.named_modules():
        if not hasattr(module, "set_custom_reduce_scatter"):
            continue
        inner = module._get_fsdp_state()
        groups = getattr(inner, "_fsdp_param_groups", None)
        groups = [inner._fsdp_param_group] if groups is None else groups
        if len(groups) > 1:
            raise TypeError(f"{name or 'the root'} has parameters on several meshes, which terncomm does not serve")
        found += [(name or "the root", module, group) for group in groups if group is not None]
    if not found:
        raise TypeError("no part of this model holds parameters that fully_shard has sharded")
    for name, _, group in found:
        if not hasattr(group.mesh_info, "shard_process_group"):
            raise TypeError(f"{name} is replicated, not sharded: use DistributedDataParallel")
        if hasattr(group.mesh_info, "replicate_process_group"):
            raise TypeError(
                "this model is sharded over a two-dimensional mesh (HSDP), where FSDP all-reduces floats between "
                "replicas before any hook runs. Shard over the inner mesh alone, fully_shard(module, "
                "mesh=mesh['shard']), and give the replicas' group: terncomm.register(model, codec, "
                "replicas=mesh.get_group('replicate'))"
            )
    info = found[0][2].mesh_info
    if any(group.mesh_info.shard_process_group is not info.shard_process_group for _, _, group in found):
        raise TypeError("parts of this model are sharded over different groups, which terncomm does not serve")
    parameter = next(iter(state._layers.numbers))
    device = parameter.to_local().device if hasattr(parameter, "to_local") else parameter.device
    configuration = state._configuration() | {"fully_shard modules": len(found), "replicas": replicas is not None}
    state._connect(connect(replicas or info.shard_process_group, device, configuration))
    for index, (name, module, group) in enumerate(found):
        held = _Group(state, index, name, group.fsdp_params)
        state._groups.append(held)
        if replicas is None:
            module.set_custom_reduce_scatter(ReduceScatter(held))
        else:
            module.set_all_reduce_hook(_BetweenReplicas(held, info.shard_mesh_rank, info.shard_mesh_size))
    return state
