"""FSDP2 (`fully_shard`): the reduce-scatter of gradients, or the all-reduce between replicas, through a codec."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ReduceOp

from terncomm.codecs import Codec
from terncomm.hooks.averaging import Averaging, advise
from terncomm.hooks.connection import connect
from terncomm.keys import Key
from terncomm.scatter import Shards, reduce_scatter

_MISSING = (
    "FSDP reduces {} elements of {}, whose parameters make {}: one of them got no gradient, and which cannot be told. "
    "Every parameter of a fully_shard module that requires a gradient must take part in each backward pass"
)


class ShardState(Averaging):
    """What :func:`terncomm.register` returns for a model of `fully_shard`: statistics, switches, checkpoint.

    Options are those of :class:`terncomm.CommState`. A step is a reduction of each FSDP module's parameters.
    """

    _OWN = (*Averaging._OWN, "_failed", "_groups")

    def _detach(self) -> None:
        super()._detach()
        self._failed: Exception | None = None
        self._groups: list[_Group] = []

    def state_dict(self) -> dict[str, Any]:
        """See :class:`terncomm.CommState`; `steps` are of each FSDP module, which may be used unequally often."""
        return {**super().state_dict(), "steps": [group.step for group in self._groups]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """See :class:`terncomm.CommState`."""
        super().load_state_dict(saved)
        steps = saved.get("steps", [])
        for place, group in enumerate(self._groups):
            group.step = int(steps[place]) if len(steps) == len(self._groups) else self._step

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
    """The parameters that FSDP reduces together. They are known by FSDP's own objects: the tensors may be replaced."""

    def __init__(self, state: ShardState, index: int, name: str, params: Sequence[Any]) -> None:
        self.state = state
        self.index = index
        self.name = name
        self.params = list(params)
        self.step = state._step
        layers = state._layers
        # Parameters that are sharded along another dimension lie in the buffer in another order than they have.
        self._known = {
            place: (layers.numbers[p.sharded_param], p.fsdp_placement.dim == 0 and layers.codes(p.sharded_param))
            for place, p in enumerate(self.params)
            if p.sharded_param in layers.numbers
        }
        self._made: dict[tuple[int, ...], tuple[Shards, Shards]] = {}

    def shards(self, world_size: int) -> tuple[Shards, Shards]:
        """The layout of the parameters that require a gradient now, and the same with nothing coded."""
        places = tuple(place for place, p in enumerate(self.params) if p.sharded_param.requires_grad)
        if places not in self._made:
            if not self._known.keys() >= set(places):
                raise RuntimeError(
                    f"a parameter of {self.name} required no gradient when terncomm.register was called, and does now: "
                    "register first, freeze after that"
                )
            shapes = [(self.params[place]._orig_size, self.params[place].fsdp_placement.dim) for place in places]
            sizes = [shape.numel() for shape, _ in shapes]
            chunks = [
                -(-shape[0] // world_size) * shape[1:].numel()
                if shape and dim == 0
                else -(-shape.numel() // world_size)
                for shape, dim in shapes
            ]
            numbers, coded = zip(*(self._known[place] for place in places), strict=True) if places else ((), ())
            self._made[places] = tuple(  # type: ignore[assignment]
                Shards(sizes, chunks, numbers, which, world_size) for which in (coded, [False] * len(sizes))
            )
        return self._made[places]

    def begin(self) -> tuple[Key, str]:
        """A reduction of these parameters begins."""
        state, self.step = self.state, self.step + 1
        if self.step > state._step:
            state._begin_step(self.step)
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
            state._check_arrived()
            coded, plain = held.shards(transport.world_size)
            shards = coded if state._codes_now(key.step) else plain
            if input_tensor.numel() != transport.world_size * shards.row:
                wanted = transport.world_size * shards.row
                raise RuntimeError(_MISSING.format(input_tensor.numel(), held.name, wanted))
            complaint = None
            if shards.layers.numel and state._looks_at_clipping(key.step):
                rows = input_tensor.view(transport.world_size, shards.row)
                complaint = state._watch_clipping(torch.cat(shards.whole(rows)), shards.layers, key.step)
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
            if complaint is not None:
                advise(complaint, transport)

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
            state._check_arrived()
            if reduced.is_cuda:  # made on FSDP's stream for reduce-scatter, used on that for all-reduce
                reduced.record_stream(torch.cuda.current_stream(reduced.device))
            coded_shards, plain = held.shards(self._ranks)
            shards = coded_shards if state._codes_now(key.step) and transport.world_size > 1 else plain
            if reduced.numel() != shards.row:
                raise RuntimeError(_MISSING.format(reduced.numel(), held.name, shards.row))
            coded, exact = shards.own(self._rank)
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
    found: list[tuple[str, Any, Any]] = []
    for name, module in model.named_modules():
        if not hasattr(module, "set_custom_reduce_scatter"):
            continue
        inner = module._get_fsdp_state()
        groups = getattr(inner, "_fsdp_param_groups", None)
        groups = [inner._fsdp_param_group] if groups is None else groups
        if len(groups) > 1:
            raise TypeError(f"{name or 'the root'} has parameters on several meshes, which terncomm does not serve")
        module.reshard()  # after a forward pass the root's parameters are other objects
        found += [(name or "the root", module, group) for group in groups if group is not None]
    if not found:
        raise TypeError("no part of this model holds parameters that fully_shard has sharded")
    for name, _, group in found:
        if isinstance(group._reduce_scatter_comm, ReduceScatter) or isinstance(
            group._all_reduce_hook, _BetweenReplicas
        ):
            raise RuntimeError(f"{name} is registered already: its state has disable() and enable()")
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
    inside = set(dist.get_process_group_ranks(info.shard_process_group))
    if replicas is not None and inside & set(dist.get_process_group_ranks(replicas)) != {dist.get_rank()}:
        raise ValueError(
            "replicas: wanted the group of the ranks that hold the same shard, got one with others of its mesh"
        )
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
    if not state._layers.numbers:
        raise ValueError("no parameter requires a gradient: there is nothing to reduce")
    configuration = state._configuration() | {
        "fully_shard modules": len(found),
        "replicas": replicas is not None,
        "shard": f"{info.shard_mesh_rank} of {info.shard_mesh_size}" if replicas is not None else "",
    }
    state._connect(connect(replicas or info.shard_process_group, found[0][2].device, configuration))
    for index, (name, module, group) in enumerate(found):
        held = _Group(state, index, name, group.fsdp_params)
        state._groups.append(held)
        if replicas is None:
            module.set_custom_reduce_scatter(ReduceScatter(held))
        else:
            module.set_all_reduce_hook(_BetweenReplicas(held, info.shard_mesh_rank, info.shard_mesh_size))
    return state
