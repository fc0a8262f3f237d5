"""The path of one bucket. Read this module first.

1. `codec.measure`: this rank's statistics of each layer. For most codecs this is a clip limit, which is also the scale.
2. :func:`agree`: ranks compare headers, to be sure that they are in step, and agree on shared statistics.
3. Encode and pack: gradients become small integers, packed row by row.
4. Exchange: the integers are added up over ranks.
5. Unpack and decode: one multiplication; the result is written to the buffer.

Layers without a codec are averaged in the same messages, added in rank order. Each function here is a generator of
messages; the drivers in :mod:`terncomm.path.drivers` and :mod:`terncomm.path.pipeline` send them.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from terncomm.codecs.base import Agreed, IntegerCodec, Local, UniformCodec
from terncomm.path import exchanges
from terncomm.path.account import Context
from terncomm.path.bucket import SMALL, Bucket, PieceLayout
from terncomm.path.compressed import codes_of
from terncomm.path.exchanges import Piece
from terncomm.path.header import INLINE_NBYTES, PROLOGUE_NBYTES, Header, Unchecked, carried_numbers, check
from terncomm.path.message import Message, Path, within
from terncomm.path.parts import Coding, Floats, Part, Statistics, Target
from terncomm.path.ranges import LEAST, layers_outside, mark_tiny, of_others
from terncomm.path.shards import CodedShards, Shards
from terncomm.path.stages import Staging
from terncomm.path.sums import row_edges
from terncomm.segments import Segments

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def all_reduce_mean(
    flat: torch.Tensor,
    bucket: Bucket,
    ctx: Context,
    *,
    exchange: str = "auto",
    unchecked: list[Unchecked] | None = None,
    last: bool = True,
    staging: Staging | None = None,
) -> Path[frozenset[int]]:
    """Replace the elements of `flat` that `bucket` describes by an estimate of their mean over ranks.

    The result has the same bits on every rank, for every exchange and every size of pieces. Layers whose gradients
    leave the range of codes are averaged without a codec, see :mod:`terncomm.path.ranges`.

    Args:
        flat: (n,), contiguous, of a dtype in DTYPES; changed in place. An integer codec reads it as float32.
        bucket: the layers and their codecs; must be equal on all ranks.
        ctx: of this reduction.
        exchange: "auto", "gather" or "two_phase".
        unchecked: for CUDA: a list of headers to be checked later, so that the host does not wait; see :func:`agree`.
        last: mark the final message as the last one of the path.
        staging: stages that change the gradients of layers under integer codecs, and their means.

    Returns:
        The numbers of the layers that an integer codec could not represent.

    Raises:
        TypeError: `flat` has a dtype that is not in DTYPES.
        ValueError: the layers do not fit the buffer, or the exchange is unknown.
        RanksDiffer: ranks called with different arguments.
    """
    check_dtype(flat)
    bucket.check(flat)
    unchecked = None if flat.dtype in LEAST else unchecked
    cuts = bucket.cuts(exchange, ctx.world_size, flat.dtype, ctx.piece)
    configuration = f"{bucket.configuration} {flat.dtype} {exchange}"
    if staging is not None and not staging.stages:
        staging = None
    staged = [group.layers for group in bucket.coded]
    given: dict[tuple[int, int], torch.Tensor] = {}
    if staging is not None:
        configuration += f" {staging.stages}"
        with ctx.phase("encode", "stages"):
            for layers in staged:
                given |= staging.before(flat, layers, ctx)
    with ctx.phase("encode", "measure"):
        local = [measured(group.codec, flat, group.segments) for group in bucket.coded]
    header = _header(ctx, flat.numel(), bucket.coded_numel, configuration, bucket.checksum)
    ways = [group.codec.agree for group in bucket.coded]
    shared = yield from agree(header, local, ways, ctx, flat.device, unchecked=unchecked, last=last and not cuts)
    outside = layers_outside(flat.dtype, [(group.codec, group.segments) for group in bucket.coded], shared)
    if outside:
        local, shared = of_others(outside, [group.segments for group in bucket.coded], local, shared)
        bucket = bucket.without_codec(outside)
        cuts = bucket.cuts(exchange, ctx.world_size, flat.dtype, ctx.piece)
    with ctx.phase("encode", "prepare"):
        codings = [
            Coding(flat, group.segments, group.codec, mine, ours, key=ctx.key, rank=ctx.rank, world_size=ctx.world_size)
            for group, mine, ours in zip(bucket.coded, local, shared, strict=True)
        ]
    if staging is not None and staging.keeps_state:
        with ctx.phase("encode", "stages"):
            for group, coding in zip(bucket.coded, codings, strict=True):
                staging.compute_next_states(coding.own(), group.layers, ctx, given)
            staging.drop_states(outside, ctx)

    def part(index: int, edges: tuple[int, ...]) -> Part:
        if index < len(codings):
            return codes_of(codings[index], edges)
        group = bucket.floats[index - len(codings)]
        return Floats(flat, group.segments, edges, divisor=ctx.world_size, label=group.label, dtype=group.dtype)

    def piece(cut: PieceLayout) -> Piece:
        return Piece([part(*each) for each in cut.whole], [part(*each) for each in cut.rows])

    yield from exchanges.all_reduce(map(piece, cuts), ctx, flat.device, last=last)
    if staging is not None:
        with ctx.phase("decode", "stages"):
            for layers in staged:
                staging.after(flat, layers, ctx)
    return outside


def agree(
    header: Header,
    local: Sequence[Local],
    ways: Sequence[Callable[[torch.Tensor], Agreed]],
    ctx: Context,
    device: torch.device,
    *,
    unchecked: list[Unchecked] | None = None,
    last: bool = False,
) -> Path[list[Agreed]]:
    """Check that all ranks are in step, and agree on the statistics of each group.

    The first message has a fixed size: the header, and the statistics if they fit behind it. If not, the statistics
    follow in messages of their own: whole if they take at most SMALL bytes over all ranks, else in rows.

    Args:
        header: of this bucket.
        local: for each group, this rank's statistics, (..., L) float32.
        ways: for each group, the `agree` of its codec: (W, ..., m) float32 -> (..., m).
        ctx, device: of the reduction.
        unchecked: None: compare the headers now. A list: do not wait for the device. The headers are appended to it,
            to be checked when they have arrived on the host. If they differ, all statistics become +inf, so that all
            coded layers become non-finite on every rank.
        last: mark the final message as the last one of the path, if the statistics fit behind the header.

    Returns:
        For each group, the agreed statistics, (..., L) float32.

    Raises:
        RanksDiffer: a rank sent a different header. Raised on every rank; the message says what differs.
    """
    nbytes = sum(4 * each.numel() for each in local)
    inline = nbytes <= INLINE_NBYTES
    rows = 1 if inline or ctx.world_size * nbytes <= SMALL else ctx.world_size
    parts = [Statistics(one, way, row_edges(one.shape[-1], rows)) for one, way in zip(local, ways, strict=True)]
    widths = [PROLOGUE_NBYTES - INLINE_NBYTES, *(part.up_nbytes if inline else 0 for part in parts)]
    with ctx.phase("exchange", "header"):
        message = header.prologue(device)
        for part, place in zip(parts, _columns(message[None], widths), strict=True):
            if inline:
                part.pack(place)
    ctx.count("checks", PROLOGUE_NBYTES)
    received = yield Message("all_gather", message, last=last and inline, ahead=True)
    with ctx.phase("exchange", "share"):
        differ = check(received, message, ctx, unchecked)
        for part, place in zip(parts, _columns(received, widths), strict=True):
            if inline:
                part.store_sum(place)
    if not inline:
        piece = Piece([], parts) if rows > 1 else Piece(parts, [])
        yield from exchanges.all_reduce([piece], ctx, device, last=False)
    shared = [part.shared for part in parts]
    return shared if differ is None else [Agreed(torch.where(differ, torch.inf, each)) for each in shared]


def _columns(rows: torch.Tensor, widths: Sequence[int]) -> list[torch.Tensor]:
    """Split rows, (W, k), into columns of these widths, and drop the first one (the header)."""
    return list(torch.split(rows[:, : sum(widths)], list(widths), dim=1))[1:]


def reduce_scatter(
    flat: torch.Tensor,
    shards: Shards,
    ctx: Context,
    *,
    divisor: float,
    out: torch.Tensor,
    unchecked: list[Unchecked] | None = None,
) -> Path[frozenset[int]]:
    """Reduce-scatter: write the sum of this rank's row over ranks, divided by `divisor`, to `out`.

    The same bits as in the shard of :func:`all_reduce_mean`, except if the codec's `narrowing` rounds the sums there.

    Args:
        flat: (W k,), contiguous, of a dtype in DTYPES, laid out as `shards` says; not modified. k is `shards.row`.
        shards: the layout.
        ctx, unchecked: see :func:`all_reduce_mean`.
        divisor: W for the mean, 1 for the sum.
        out: (k,), of the same dtype; elements that belong to no parameter become 0.

    Returns:
        The numbers of the layers that an integer codec could not represent.

    Raises:
        ValueError: the size of `flat` or `out` does not fit `shards`.
        TypeError: `flat` has a dtype that is not in DTYPES.
        RanksDiffer: ranks called with different arguments.
    """
    check_dtype(flat)
    if flat.numel() != ctx.world_size * shards.row or out.numel() != shards.row:
        raise ValueError(
            f"wanted a buffer of {ctx.world_size} x {shards.row} elements and an output of {shards.row}, "
            f"got {flat.numel()} and {out.numel()}"
        )
    with ctx.phase("encode", "measure"):
        local = [_measure_whole(flat, group) for group in shards.coded]
    configuration = f"{shards.configuration} {flat.dtype} scatter, over {divisor}"
    header = _header(ctx, flat.numel(), shards.coded_numel, configuration, shards.checksum)
    ways = [group.codec.agree for group in shards.coded]
    unchecked = None if flat.dtype in LEAST else unchecked
    shared = yield from agree(header, local, ways, ctx, flat.device, unchecked=unchecked)
    scales = [(group.codec, group.scales) for group in shards.coded]
    if outside := layers_outside(flat.dtype, scales, shared):
        local, shared = of_others(outside, [each for _, each in scales], local, shared)
        shards = shards.without_codec(outside)
    parts: list[Part] = []
    with ctx.phase("encode", "prepare"):
        for group, mine, ours in zip(shards.coded, local, shared, strict=True):
            own, which = group.cut.own(ctx.rank)
            scale = group.cut.scale.to(flat.device)
            coding = Coding(
                flat,
                group.cut.pieces,
                group.codec,
                Local(mine[..., scale]),
                Agreed(ours[..., scale]),
                key=ctx.key,
                rank=ctx.rank,
                world_size=ctx.world_size,
                divisor=divisor,
                target=Target(out, own, Agreed(ours[..., which.to(flat.device)])),
            )
            parts.append(codes_of(coding, group.cut.edges, target_range=(0, own.numel)))
        for each in shards.floats:
            target = out, each.own(ctx.rank)
            kind: Any = {"label": each.label, "dtype": each.dtype}
            parts.append(Floats(flat, each.segments, each.edges, divisor=divisor, target=target, **kind))
    yield from exchanges.reduce_scatter(parts, ctx, flat.device, clear=out)
    return outside


def _measure_whole(flat: torch.Tensor, group: CodedShards) -> Local:
    """Measure each parameter in its own element order, so that scales have the same bits as without sharding."""
    scaled = group.codec.scaled
    found: list[torch.Tensor] = [
        measured(group.codec, each, scaled(Segments([len(each)]))) for each in group.whole(flat)
    ]
    return Local(torch.cat(found, dim=-1))


def all_reduce_mean_between_nodes(
    flat: torch.Tensor,
    bucket: Bucket,
    node: Context,
    between: Context,
    *,
    exchange: str = "auto",
    unchecked: list[Unchecked] | None = None,
) -> Path[frozenset[int]]:
    """Two-level :func:`all_reduce_mean`: floats inside a node, over its fast links, and codes between nodes.

    1. Reduce-scatter inside the node: its rank r gets the node's mean of row r.
    2. Average the row with the ranks at the same place on the other nodes, through the codecs.
    3. All-gather the rows inside the node.

    A node sends to other nodes as much as a single rank would. A layer in several rows has a clip limit and a scale in
    each row. So a non-finite element spoils at most the part of the layer that is in its row.

    Args:
        flat, bucket, exchange, unchecked: see :func:`all_reduce_mean`; `bucket` must describe all elements of `flat`.
        node: of the ranks of this node; all nodes must have the same number of ranks.
        between: of the ranks at the same place on every node, as many as there are nodes.

    Returns:
        The numbers of the layers in this rank's row that an integer codec could not represent.
    """
    check_dtype(flat)
    bucket.check(flat)
    configuration = f"{bucket.configuration} {flat.dtype} {exchange} between {between.world_size}"
    header = _header(node, flat.numel(), bucket.coded_numel, configuration, bucket.checksum)
    yield from within("node", agree(header, [], [], node, flat.device, unchecked=unchecked))
    edges = row_edges(flat.numel(), node.world_size)
    width = edges[1]
    row, whole = flat.new_zeros(width), Segments([flat.numel()])
    own = Segments([edges[node.rank + 1] - edges[node.rank]])
    floats = Floats(flat, whole, edges, divisor=node.world_size, label="intra", target=(row, own))
    yield from within("node", exchanges.reduce_scatter([floats], node, flat.device))
    part = bucket.clipped(node.rank * width, (node.rank + 1) * width)
    outside = yield from within("between", all_reduce_mean(row, part, between, exchange=exchange, unchecked=unchecked))
    back = Floats(row, Segments([width]), (0, width), divisor=1.0)
    message = row.new_empty(back.back_nbytes, dtype=torch.uint8)
    with node.phase("exchange", "gather inside"):
        back.pack(message[None])
        node.count("intra", back.back_nbytes)
    received = yield Message("all_gather", message, group="node", last=True)
    with node.phase("decode"):
        floats.unpack(received)
    return outside


def all_reduce_mean_sparse(
    gradient: torch.Tensor, ctx: Context, *, unchecked: list[Unchecked] | None = None
) -> Path[torch.Tensor]:
    """Average a sparse gradient over ranks without a codec; the same bits on every rank.

    Args:
        gradient: sparse_coo of floats, with one or more sparse dimensions; not modified. Ranks may hold different rows.
        ctx, unchecked: see :func:`all_reduce_mean`.

    Returns:
        A coalesced sparse_coo tensor with every row that at least one rank has. Rows are added in rank order.

    Raises:
        RanksDiffer: shapes or types differ, or ranks are not in step.
    """
    with ctx.phase("encode"):
        mine = gradient.coalesce()
        indices, values = mine.indices(), mine.values()
        count = torch.tensor([indices.shape[1]], dtype=torch.int64, device=gradient.device)
    configuration = f"{gradient.dtype} {tuple(gradient.shape)} {gradient.sparse_dim()}"
    header = _header(ctx, gradient.numel(), 0, configuration, 0)
    yield from agree(header, [], [], ctx, gradient.device, unchecked=unchecked)
    ctx.count("exact", 8)
    counts = (yield Message("all_gather", count.view(torch.uint8))).view(torch.int64).flatten().tolist()
    gather = partial(_gather_padded, length=max(counts), ctx=ctx)
    everyones_indices = yield from gather(indices.T)
    everyones_values = yield from gather(values, last=True)
    with ctx.phase("decode"):
        everywhere = torch.cat([everyones_indices[rank, :count] for rank, count in enumerate(counts)])
        together, place = torch.unique(everywhere, dim=0, return_inverse=True)
        wide = torch.promote_types(values.dtype, torch.float32)
        total = torch.zeros(len(together), *values.shape[1:], dtype=wide, device=gradient.device)
        for rank, where in enumerate(place.split(counts)):
            total.index_add_(0, where, everyones_values[rank, : counts[rank]].to(wide))
        mean = (total / ctx.world_size).to(values.dtype)
    return torch.sparse_coo_tensor(together.T, mean, gradient.shape, is_coalesced=True, check_invariants=False)


def _gather_padded(rows: torch.Tensor, length: int, ctx: Context, last: bool = False) -> Path[torch.Tensor]:
    """All-gather rows, (k, ...) with k <= length, padded with zeros: (W, length, ...)."""
    padded = rows.new_zeros(length, *rows.shape[1:])
    padded[: len(rows)] = rows
    message = padded.view(-1).view(torch.uint8)
    ctx.count("exact", message.numel())
    received = yield Message("all_gather", message, last=last)
    return received.view(rows.dtype).view(ctx.world_size, *padded.shape)  # type: ignore[no-any-return]


def all_gather_number(number: int, rank: int, device: torch.device) -> Path[list[int]]:
    """All-gather one integer in the format of a bucket's header.

    A rank that is already reducing sees a foreign header, and both sides raise instead of hanging.

    Raises:
        RanksDiffer: some ranks are already reducing gradients. They raise it too.
    """
    received = yield Message("all_gather", Header.carrying(number).prologue(device), last=True, ahead=True)
    return carried_numbers(received.cpu(), rank)


def measured(codec: IntegerCodec, flat: torch.Tensor, segments: Segments) -> Local:
    """`codec.measure`, checked.

    Raises:
        ValueError: it did not return (..., L) float32.
    """
    local = codec.measure(flat, segments)
    if local.dtype != torch.float32 or local.ndim not in (1, 2) or local.shape[-1] != len(segments):
        raise ValueError(
            f"{codec!r}.measure: wanted (L,) or (K, L) torch.float32 with L = {len(segments)}, got shape "
            f"{tuple(local.shape)}, {local.dtype}"
        )
    if isinstance(codec, UniformCodec):
        mark_tiny(local, flat, segments)
    return local


def check_dtype(flat: torch.Tensor) -> None:
    """Raise a TypeError unless the dtype of `flat` is in DTYPES."""
    if flat.dtype not in DTYPES:
        raise TypeError(f"gradients must be {', '.join(map(str, DTYPES))}, got {flat.dtype}")


def _header(ctx: Context, numel: int, coded_numel: int, configuration: str, layers: int) -> Header:
    key = ctx.key
    checksum = zlib.crc32(configuration.encode())
    return Header(key.seed, key.step, key.bucket, numel, coded_numel, checksum, layers, ctx.rhythm)
