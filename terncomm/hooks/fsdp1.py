"""FSDP1 (`FullyShardedDataParallel`): compresses the reduction of flat gradients, by a communication hook.

A unit's flat parameter holds its parameters one after another. It is cut into W equal rows, and rank r keeps row r.
With `NO_SHARD` every rank keeps the whole. FSDP1 expects the hook to divide the sum by W.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from terncomm.codecs import Codec, CodecLike
from terncomm.hooks.connection import connect, telling_refusal
from terncomm.hooks.options import Options
from terncomm.hooks.sharded import ShardState, Unit
from terncomm.layers import clean
from terncomm.path.shards import Shards
from terncomm.torch_internals import (
    FlatParameter,
    flat_parameter,
    fsdp1_comm_hook,
    fsdp1_requires_grad,
    is_hybrid,
    set_fsdp1_hook_state,
)


def fsdp1_units(model: Any) -> list[tuple[str, Any]]:
    """The FSDP1 modules inside a model that hold a flat parameter, with their names."""
    if not isinstance(model, nn.Module) or "torch.distributed.fsdp" not in sys.modules:  # then no FSDP1 module exists
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel

    units = [(clean(name), m) for name, m in model.named_modules() if isinstance(m, FullyShardedDataParallel)]
    return [(name or "the root", m) for name, m in units if flat_parameter(m) is not None]


class _FlatUnit(Unit):
    """The parameters of one flat parameter. held: a meta tensor for each of them, in the order of the flat one."""

    def __init__(
        self, state: ShardState, index: int, name: str, flat: FlatParameter, held: Sequence[nn.Parameter]
    ) -> None:
        layers = state.layers
        known = {
            place: (layers.numbers[each], layers.codec_of(each))
            for place, each in enumerate(held)
            if each in layers.numbers
        }
        super().__init__(state, index, name, known)
        self._flat = flat

    def needed(self) -> tuple[int, ...]:
        """See :class:`Unit`."""
        return tuple(place for place, needed in enumerate(fsdp1_requires_grad(self._flat)) if needed)

    def lay(
        self, places: Sequence[int], numbers: Sequence[int], codecs: Sequence[Codec | None], world_size: int, numel: int
    ) -> Shards:
        """See :class:`Unit`."""
        members = [self._flat.members[place] for place in places]
        sizes, offsets = [each.numel for each in members], [each.offset for each in members]
        return Shards.in_a_row(sizes, offsets, numbers, codecs, numel // world_size, world_size)


def comm_hook(unit: _FlatUnit, gradient: torch.Tensor, shard: torch.Tensor | None = None) -> None:
    """FSDP1's communication hook: average `gradient`, (W k,) floats, over ranks.

    Writes the mean of this rank's row into `shard`, (k,). With `NO_SHARD` there is no `shard`, and `gradient`, (n,), is
    replaced by its mean.
    """
    if shard is not None:
        unit.reduce_scatter(gradient, shard)
    else:
        unit.all_reduce(gradient, 0, 1)


def register_fsdp1(
    model: nn.Module, units: list[tuple[str, Any]], codec: CodecLike, options: Mapping[str, Any]
) -> ShardState:
    """Register a model of `FullyShardedDataParallel`; see :func:`terncomm.register`. units: of :func:`fsdp1_units`.

    Raises:
        TypeError: FSDP1 has no hook for this sharding strategy, or units use different process groups.
        ValueError: an option is invalid, or no parameter requires a gradient.
        RuntimeError: the model already has a communication hook.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    group = units[0][1].process_group
    for name, unit in units:
        if is_hybrid(unit.sharding_strategy):
            raise TypeError(
                f"{name} is sharded by {unit.sharding_strategy.name}, for which FSDP1 has no communication hook: use "
                "fully_shard (FSDP2) over the inner mesh, and terncomm.register(model, codec, replicas=...)"
            )
        if fsdp1_comm_hook(unit) is not None:
            raise RuntimeError(
                f"{name} already has a communication hook, and FSDP1 accepts only one; to switch a terncomm hook off "
                "and on, use state.disable() and state.enable()"
            )
        if unit.process_group is not group:
            raise TypeError("units of this model are sharded over different process groups; terncomm supports only one")
    flats = [_flat(unit) for _, unit in units]
    stand_ins = _stand_ins(model, flats)
    named = [(f"{name}.{each}" if name else each, p) for name, own in stand_ins.values() for each, p in own.items()]
    device = units[0][1].compute_device
    with telling_refusal(group, device):
        state = ShardState(Options(codec=codec, **options), named)
        state.layers.adopt(model, lambda module: stand_ins[module][1])
        state.check_dtypes()
        if not state.layers.trainable:
            raise ValueError("no parameter requires a gradient: there is nothing to reduce")
        strategies = sorted({unit.sharding_strategy.name for _, unit in units})
        configuration = state.configuration() | {"FSDP units": len(units), "sharding": ", ".join(strategies)}
        state.get_ready(device)
    connection = connect(group, device, configuration)
    state.connect(connection.transport, connection)
    for root in FullyShardedDataParallel.fsdp_modules(model, root_only=True):
        root.register_comm_hook(None, comm_hook)
    for index, ((name, unit), flat) in enumerate(zip(units, flats, strict=True)):
        held = [stand_ins[member.module][1][member.name] for member in flat.members]
        state.units.append(_FlatUnit(state, index, name, flat, held))
        set_fsdp1_hook_state(unit, state.units[-1])
    state.announce()
    return state


def _flat(unit: Any) -> FlatParameter:
    flat = flat_parameter(unit)
    assert flat is not None  # see fsdp1_units
    return flat


def _stand_ins(model: nn.Module, flats: list[FlatParameter]) -> dict[nn.Module, tuple[str, dict[str, nn.Parameter]]]:
    """Each module's name and own parameters, as before FSDP1 flattened them: meta tensors for the flattened ones."""
    taken = {each.flat for each in flats}
    own = {
        module: (clean(name), {n: p for n, p in module.named_parameters(recurse=False) if p not in taken})
        for name, module in model.named_modules()
    }
    for each in flats:
        for member, needed in zip(each.members, fsdp1_requires_grad(each), strict=True):
            meta = torch.empty(member.shape, dtype=each.flat.dtype, device="meta")
            own[member.module][1][member.name] = nn.Parameter(meta, requires_grad=needed)
        for alias in each.aliases:
            own[alias.module][1][alias.name] = own[alias.of_module][1][alias.of_name]
    return own
