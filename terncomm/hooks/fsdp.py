"""FSDP2 (`fully_shard`): compresses the reduce-scatter of gradients, or the all-reduce between replicas."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ReduceOp

from terncomm.codecs import Codec, CodecLike
from terncomm.hooks.connection import connect, telling_refusal
from terncomm.hooks.options import Options
from terncomm.hooks.sharded import ShardState, Unit
from terncomm.path.shards import Shards
from terncomm.torch_internals import FSDP2Group, fsdp2_dimension, fsdp2_groups, fsdp2_parameter, fsdp2_shape


class _Group(Unit):
    """The parameters of one `fully_shard` module, as FSDP's own objects: torch may replace the tensors in them."""

    def __init__(self, state: ShardState, index: int, name: str, params: Sequence[Any]) -> None:
        self.params = list(params)
        layers = state.layers
        # Sharded along another dimension than 0, a parameter's elements are reordered in the buffer: uncompressed.
        known = {
            place: (
                layers.numbers[sharded],
                layers.codec_of(sharded) if fsdp2_dimension(p) == 0 else None,
            )
            for place, p in enumerate(self.params)
            if (sharded := fsdp2_parameter(p)) in layers.numbers
        }
        super().__init__(state, index, name, known)

    def needed(self) -> tuple[int, ...]:
        """See :class:`Unit`."""
        return tuple(place for place, p in enumerate(self.params) if fsdp2_parameter(p).requires_grad)

    def lay(
        self, places: Sequence[int], numbers: Sequence[int], codecs: Sequence[Codec | None], world_size: int, numel: int
    ) -> Shards:
        """See :class:`Unit`."""
        shapes = [(fsdp2_shape(self.params[place]), fsdp2_dimension(self.params[place])) for place in places]
        sizes = [shape.numel() for shape, _ in shapes]
        chunks = [
            -(-shape[0] // world_size) * shape[1:].numel() if shape and dim == 0 else -(-shape.numel() // world_size)
            for shape, dim in shapes
        ]
        return Shards.by_chunks(sizes, chunks, numbers, codecs, world_size)


def _divisor(op: Any, world_size: int) -> float:
    """The number by which FSDP's reduce operation divides the sum over ranks.

    Raises:
        ValueError: an operation that terncomm does not support.
    """
    if op == ReduceOp.AVG:
        return world_size
    if op == ReduceOp.SUM:
        return 1.0
    factor = op.__getstate__()[1] if op == ReduceOp.PREMUL_SUM else None
    if not isinstance(factor, (int, float)):
        raise ValueError(f"FSDP asked for the operation {op}; terncomm supports AVG, SUM and PREMUL_SUM with a number")
    return 1.0 / factor


class ReduceScatter:
    """The reduce-scatter of one module, for `FSDPModule.set_custom_reduce_scatter`; FSDP defines its methods."""

    def __init__(self, group: _Group) -> None:
        self._group = group

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialized tensor, for the input or the output."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Reduce `input_tensor`, (W k,), and write this rank's row into `output_tensor`, (k,), before it returns.

        `group` and `async_op` are not used.
        """
        self._group.reduce_scatter(input_tensor, output_tensor, _divisor(op, self._group.state.world_size))


class _BetweenReplicas:
    """The hook of one module, for `FSDPModule.set_all_reduce_hook`: averages a shard over the replicas, in place."""

    def __init__(self, group: _Group, shard_rank: int, shard_ranks: int) -> None:
        self._group = group
        self._rank, self._ranks = shard_rank, shard_ranks

    def __call__(self, reduced: torch.Tensor) -> None:
        self._group.all_reduce(reduced, self._rank, self._ranks)


def register_fsdp(
    model: nn.Module, codec: CodecLike, options: Mapping[str, Any], replicas: dist.ProcessGroup | None = None
) -> ShardState:
    """Register a model of `fully_shard`; see :func:`terncomm.register`.

    Raises:
        TypeError: the kind of sharding is not supported; the message says why.
        ValueError: an option is invalid, or no parameter requires a gradient.
        RuntimeError: the model is registered already.
    """
    found: list[tuple[str, Any, FSDP2Group]] = []
    for name, module in model.named_modules():
        if not hasattr(module, "set_custom_reduce_scatter"):
            continue
        groups = fsdp2_groups(module)
        if len(groups) > 1:
            raise TypeError(f"{name or 'the root'} has parameters on several meshes; terncomm supports one per module")
        module.reshard()  # after a forward pass the root still holds its unsharded parameters, which are other objects
        found += [(name or "the root", module, group) for group in groups]
    if not found:
        raise TypeError("no part of this model holds parameters that fully_shard has sharded")
    for name, _, group in found:
        if isinstance(group.reduce_scatter, ReduceScatter) or isinstance(group.all_reduce_hook, _BetweenReplicas):
            raise RuntimeError(f"{name} is registered already: use disable() and enable() of the state from then")
        if group.shards is None:
            raise TypeError(f"{name} is replicated, not sharded: use DistributedDataParallel")
        if group.replicas is not None:
            raise TypeError(
                "this model is sharded over a two-dimensional mesh (HSDP), where FSDP all-reduces floats between "
                "replicas before any hook runs. Shard over the inner mesh only: fully_shard(module, "
                "mesh=mesh['shard']). Then pass the group of the replicas: terncomm.register(model, codec, "
                "replicas=mesh.get_group('replicate'))"
            )
    shards, device = found[0][2].shards, found[0][2].device
    assert shards is not None
    rank, ranks = shards.rank(), shards.size()
    if any(group.shards is not shards for _, _, group in found):
        raise TypeError("modules of this model are sharded over different process groups; terncomm supports only one")
    inside = set(dist.get_process_group_ranks(shards))
    if replicas is not None and inside & set(dist.get_process_group_ranks(replicas)) != {dist.get_rank()}:
        raise ValueError(
            "replicas: wanted the group of the ranks that hold the same shard, got one with other ranks of this "
            "mesh, or without this rank"
        )
    with telling_refusal(replicas or shards, device):
        state = ShardState(Options(codec=codec, **options), model.named_parameters())
        state.layers.adopt(model)
        state.check_dtypes()
        if not state.layers.trainable:
            raise ValueError("no parameter requires a gradient: there is nothing to reduce")
        configuration = state.configuration() | {
            "fully_shard modules": len(found),
            "replicas": replicas is not None,
            "shard": f"{rank} of {ranks}" if replicas is not None else "",
        }
        state.get_ready(device)
    connection = connect(replicas or shards, device, configuration)
    state.connect(connection.transport, connection)
    for index, (name, module, group) in enumerate(found):
        held = _Group(state, index, name, group.params)
        state.units.append(held)
        if replicas is None:
            module.set_custom_reduce_scatter(ReduceScatter(held))
        else:
            module.set_all_reduce_hook(_BetweenReplicas(held, rank, ranks))
    state.announce()
    return state
