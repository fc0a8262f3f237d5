"""FSDP1 (`FullyShardedDataParallel`): the reduction of flat gradients through a codec, by its communication hook.

A unit's flat parameter holds its parameters one after another; rank r keeps row r of W. With `NO_SHARD` every rank
keeps the whole. FSDP1 leaves the division to the hook.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from terncomm.codecs import Codec
from terncomm.hooks.connection import connect
from terncomm.hooks.sharded import ShardState, Unit
from terncomm.layers import clean
from terncomm.scatter import Shards


def fsdp1_units(model: Any) -> list[tuple[str, Any]]:
    """The FSDP1 modules inside a model that hold a flat parameter, with their names."""
    if not isinstance(model, nn.Module) or "torch.distributed.fsdp" not in sys.modules:  # then nobody has made one
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel

    units = [(clean(name), m) for name, m in model.named_modules() if isinstance(m, FullyShardedDataParallel)]
    return [(name or "the root", m) for name, m in units if m._handle is not None]


class _FlatUnit(Unit):
    """A flat parameter; `held` are stand-ins for the parameters in it, in its order."""

    def __init__(self, state: ShardState, index: int, name: str, flat: Any, held: Sequence[nn.Parameter]) -> None:
        layers = state._layers
        known = {
            place: (layers.numbers[each], layers.codes(each))
            for place, each in enumerate(held)
            if each in layers.numbers
        }
        super().__init__(state, index, name, known)
        self._flat = flat
        ends = torch.tensor(flat._numels_with_padding).cumsum(0).tolist()
        spans = zip(ends, flat._numels_with_padding, flat._is_padding_mask, strict=True)
        self._spans = [(int(size), end - int(size)) for end, size, padding in spans if not padding]

    def needed(self) -> tuple[int, ...]:
        """See :class:`Unit`."""
        needing = self._flat._params or [self._flat] * len(self._spans)
        return tuple(place for place, each in enumerate(needing) if each.requires_grad)

    def lay(
        self, places: Sequence[int], numbers: Sequence[int], coded: Sequence[bool], world_size: int, numel: int
    ) -> Shards:
        """See :class:`Unit`."""
        sizes, offsets = zip(*(self._spans[place] for place in places), strict=True) if places else ((), ())
        return Shards.in_a_row(sizes, offsets, numbers, coded, numel // world_size, world_size)


def comm_hook(unit: _FlatUnit, gradient: torch.Tensor, shard: torch.Tensor | None = None) -> None:
    """What FSDP1 calls: leave the mean of this rank's row in `shard`, or without one the mean in `gradient`."""
    if shard is not None:
        unit.reduce_scatter(gradient, shard)
    else:
        unit.all_reduce(gradient, 0, 1)


def register_fsdp1(
    model: nn.Module, units: list[tuple[str, Any]], codec: str | Codec, options: Mapping[str, Any]
) -> ShardState:
    """What :func:`terncomm.register` does with a model of `FullyShardedDataParallel`; see there.

    Raises:
        TypeError: the model is sharded in a way that FSDP1 gives no hook for; the message says which.
        RuntimeError: it has a communication hook already.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    group = units[0][1].process_group
    for name, unit in units:
        if unit.sharding_strategy in (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2):
            raise TypeError(
                f"{name} is sharded by {unit.sharding_strategy.name}, for which FSDP1 has no communication hook: use "
                "fully_shard (FSDP2) over the inner mesh, and terncomm.register(model, codec, replicas=...)"
            )
        if unit._comm_hook is not None:
            raise RuntimeError(
                f"{name} already has a communication hook, and FSDP1 takes one for life; a terncomm hook is switched "
                "with state.disable() and state.enable()"
            )
        if unit.process_group is not group:
            raise TypeError("parts of this model are sharded over different groups, which terncomm does not serve")
    stand_ins = _stand_ins(model, units)
    named = [(f"{name}.{each}" if name else each, p) for name, own in stand_ins.values() for each, p in own.items()]
    state = ShardState(codec, **options, named_parameters=named)
    state._layers.adopt(model, lambda module: stand_ins[module][1])
    if not state._layers.numbers:
        raise ValueError("no parameter requires a gradient: there is nothing to reduce")
    strategies = sorted({unit.sharding_strategy.name for _, unit in units})
    configuration = state._configuration() | {"FSDP units": len(units), "sharding": ", ".join(strategies)}
    state._connect(connect(group, units[0][1].compute_device, configuration))
    for root in FullyShardedDataParallel.fsdp_modules(model, root_only=True):
        root.register_comm_hook(None, comm_hook)
    for index, (name, unit) in enumerate(units):
        flat = unit._handle.flat_param
        held = [stand_ins[info.module][1][info.param_name] for info in flat._param_infos]
        unit._comm_hook_state = _FlatUnit(state, index, name, flat, held)
        state._units.append(unit._comm_hook_state)
    return state


def _stand_ins(model: nn.Module, units: list[tuple[str, Any]]) -> dict[nn.Module, tuple[str, dict[str, nn.Parameter]]]:
    """Each module's name, and its parameters as they were before FSDP1 took them: shapes without memory."""
    flats = {unit._handle.flat_param for _, unit in units}
    own = {
        module: (clean(name), {n: p for n, p in module.named_parameters(recurse=False) if p not in flats})
        for name, module in model.named_modules()
    }
    for _, unit in units:
        flat = unit._handle.flat_param
        params = flat._params or [flat] * len(flat._shapes)
        for info, shape, param in zip(flat._param_infos, flat._shapes, params, strict=True):
            meta = torch.empty(shape, dtype=flat.dtype, device="meta")
            own[info.module][1][info.param_name] = nn.Parameter(meta, requires_grad=param.requires_grad)
        for info in flat._shared_param_infos:
            own[info.module][1][info.param_name] = own[info.prim_module][1][info.prim_param_name]
    return own
