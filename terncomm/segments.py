"""Segments: where the layers of a flat gradient buffer, or parts of them, lie.

A segment knows its offset in the buffer and two more numbers: its `layer`, and its `base`, which is the index of its
first element inside that layer. Rounding noise is keyed by layer and index inside the layer. So it does not depend on
how a buffer is cut.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

MAX_LAYER_NUMEL = 2**32


class Columns(NamedTuple):
    """The columns of :class:`Segments` as int64 tensors on one device; see its properties."""

    offsets: torch.Tensor  # (L,)
    starts: torch.Tensor  # (L + 1,): dense index where each segment begins, and where the last one ends
    bases: torch.Tensor  # (L,)
    lengths: torch.Tensor  # (L,)
    layers: torch.Tensor  # (L,)


class Segments:
    """L segments of a flat buffer, in ascending order; each has one scale.

    There may be gaps between segments; elements in the gaps are not changed. *Dense* order is the order of the
    elements without the gaps: a dense index counts only elements of segments. Codes are stored in dense order.

    Args:
        sizes: number of elements of each segment; zero is allowed.
        offsets: where each segment begins in the flat buffer; by default they follow one another from 0.
        layers: the layer number of each segment; it must mean the same parameter in every step. By default 0..L-1.
        bases: the index, inside its layer, of each segment's first element; by default 0.

    Raises:
        TypeError: a size is not an int.
        ValueError: the arguments differ in length, a number is negative, segments overlap or are out of order, or a
            layer has more than 2**32 elements.

    >>> layers = Segments([3, 5])
    >>> layers.numel, layers.blocks(2).sizes
    (8, (2, 1, 2, 2, 1))
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        offsets: Sequence[int] | None = None,
        layers: Sequence[int] | None = None,
        bases: Sequence[int] | None = None,
    ) -> None:
        if not all(isinstance(n, int) for n in sizes):
            raise TypeError(f"sizes must be ints, got {list(sizes)}")
        size = torch.as_tensor(list(sizes), dtype=torch.int64)
        end = size.cumsum(0)
        columns = [
            end - size if offsets is None else torch.as_tensor(list(offsets), dtype=torch.int64),
            size,
            torch.arange(len(size)) if layers is None else torch.as_tensor(list(layers), dtype=torch.int64),
            torch.zeros_like(size) if bases is None else torch.as_tensor(list(bases), dtype=torch.int64),
        ]
        for name, column in zip(("offsets", "sizes", "layers", "bases"), columns, strict=True):
            if column.shape != size.shape:
                raise ValueError(f"{name} has {column.numel()} entries, but sizes has {size.numel()}; give one each")
            if (column < 0).any():
                raise ValueError(f"{name} must not be negative, got {column.tolist()}")
        if (columns[0][:-1] + size[:-1] > columns[0][1:]).any():
            raise ValueError(
                f"segments overlap or are out of order: offsets {columns[0].tolist()}, sizes {list(sizes)}"
            )
        if (columns[3] + size > MAX_LAYER_NUMEL).any():
            raise ValueError(f"a layer may have at most 2**32 elements, got {int((columns[3] + size).max())}")
        self._set(torch.stack(columns))

    def _set(self, table: torch.Tensor) -> None:
        self.table = table
        self.starts = torch.zeros(table.shape[1] + 1, dtype=torch.int64)
        torch.cumsum(table[1], 0, out=self.starts[1:])
        self.numel = int(self.starts[-1])
        self._blocks: dict[int, Segments] = {}
        self._windows: dict[tuple[int, int], Segments] = {}
        self._spans: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        self._on: dict[torch.device, Columns] = {}

    @classmethod
    def of_table(cls, table: torch.Tensor) -> "Segments":
        """Segments from a table of offsets, sizes, layers and bases, (4, L) int64. The table is not checked."""
        made = cls.__new__(cls)
        made._set(table)
        return made

    @property
    def offsets(self) -> torch.Tensor:
        """(L,) int64: where each segment begins in the flat buffer."""
        return self.table[0]

    @property
    def lengths(self) -> torch.Tensor:
        """(L,) int64: `sizes` as a tensor."""
        return self.table[1]

    @property
    def layers(self) -> torch.Tensor:
        """(L,) int64: the layer number of each segment."""
        return self.table[2]

    @property
    def bases(self) -> torch.Tensor:
        """(L,) int64: the index, inside its layer, of each segment's first element."""
        return self.table[3]

    def on(self, device: torch.device) -> Columns:
        """The columns on `device`. They are copied once and cached."""
        if device not in self._on:
            columns = self.offsets, self.starts, self.bases, self.lengths, self.layers
            self._on[device] = Columns(*(column.to(device) for column in columns))
        return self._on[device]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each segment."""
        return tuple(self.table[1].tolist())

    @cached_property
    def extent(self) -> int:
        """Where the last segment ends: the smallest number of elements that a flat buffer must have."""
        return int((self.table[0] + self.table[1]).max()) if len(self) else 0

    @property
    def contiguous(self) -> bool:
        """Whether there is no gap between segments. The first one may begin anywhere."""
        return len(self) == 0 or self.extent - int(self.table[0, 0]) == self.numel

    def blocks(self, block: int | None) -> "Segments":
        """Cut every segment into blocks of `block` elements; its last block may be shorter. `None`: no cut."""
        if block is None:
            return self
        if block not in self._blocks:
            count = (self.lengths + block - 1) // block
            piece = torch.repeat_interleave(torch.arange(len(self)), count)
            inside = (torch.arange(len(piece)) - (count.cumsum(0) - count)[piece]) * block
            self._blocks[block] = Segments.of_table(
                torch.stack(
                    [
                        self.offsets[piece] + inside,
                        torch.clamp(self.lengths[piece] - inside, max=block),
                        self.layers[piece],
                        self.bases[piece] + inside,
                    ]
                )
            )
        return self._blocks[block]

    def window(self, begin: int, end: int) -> "Segments":
        """The segments of dense elements [begin, end), without gaps: offsets are dense indices minus `begin`."""
        if (begin, end) not in self._windows:
            low = self.starts[:-1].clamp(begin, end)
            high = self.starts[1:].clamp(begin, end)
            keep = high > low
            low, high = low[keep], high[keep]
            base = self.bases[keep] + low - self.starts[:-1][keep]
            table = torch.stack([low - begin, high - low, self.layers[keep], base])
            self._windows[begin, end] = Segments.of_table(table)
        return self._windows[begin, end]

    def belong_to(self, layers: Collection[int]) -> torch.Tensor:
        """(L,) bool: which segments belong to one of these layers."""
        return torch.isin(self.layers, torch.tensor(sorted(layers), dtype=torch.int64))

    def clipped(self, begin: int, end: int) -> "Segments":
        """The segments, or parts of them, in elements [begin, end) of the flat buffer; offsets count from `begin`."""
        low = self.offsets.clamp(begin, end)
        high = (self.offsets + self.lengths).clamp(begin, end)
        keep = high > low
        low, high = low[keep], high[keep]
        base = self.bases[keep] + low - self.offsets[keep]
        return Segments.of_table(torch.stack([low - begin, high - low, self.layers[keep], base]))

    def elements(
        self, begin: int, end: int, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Segment number, buffer index and index inside the layer of each dense element in [begin, end).

        Returns:
            Three tensors (end - begin,) int64 on `device`.

        >>> piece, place, inside = Segments([2, 3], offsets=[0, 10]).elements(1, 4)
        >>> piece.tolist(), place.tolist(), inside.tolist()
        ([0, 1, 1], [1, 10, 11], [1, 0, 1])
        """
        columns = self.on(torch.device(device))
        dense = torch.arange(begin, end, device=device)
        piece = torch.searchsorted(columns.starts, dense, right=True) - 1
        inside = dense - columns.starts[piece]
        return piece, columns.offsets[piece] + inside, columns.bases[piece] + inside

    def take(self, flat: torch.Tensor) -> torch.Tensor:
        """The elements of all segments of `flat`, (numel,) in dense order: a view if contiguous, else a copy."""
        if self.contiguous:
            first = int(self.table[0, 0]) if len(self) else 0
            return flat[first : first + self.numel]
        return torch.cat([flat[o : o + n] for o, n in zip(self.offsets.tolist(), self.sizes, strict=True)])

    def spans(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """Dense elements [begin, end) as runs without gaps: (dense index - begin, buffer index, length) of each."""
        if (begin, end) not in self._spans:
            self._spans[begin, end] = list(self._runs(begin, end))
        return self._spans[begin, end]

    def _runs(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        low, high = self.starts[:-1].clamp(begin, end), self.starts[1:].clamp(begin, end)
        keep = high > low
        firsts = (self.offsets + low - self.starts[:-1])[keep].tolist()
        at, offset, length = 0, 0, 0
        for first, count in zip(firsts, (high - low)[keep].tolist(), strict=True):
            if length and first == offset + length:
                length += count
                continue
            if length:
                yield at, offset, length
            at, offset, length = at + length, first, count
        if length:
            yield at, offset, length

    def put(self, dense: torch.Tensor, flat: torch.Tensor) -> None:
        """Inverse of `take`: write `dense`, (numel,), to the segments of `flat`."""
        if self.contiguous and dense.data_ptr() == flat[int(self.table[0, 0]) if len(self) else 0 :].data_ptr():
            return  # `dense` is the view that `take` returned
        for offset, piece in zip(self.offsets.tolist(), torch.split(dense, list(self.sizes)), strict=True):
            flat[offset : offset + piece.numel()] = piece

    def check(self, flat: torch.Tensor) -> None:
        """Raise a ValueError unless `flat` is contiguous, has one dimension and contains every segment."""
        if flat.dim() != 1 or not flat.is_contiguous():
            raise ValueError(f"wanted a contiguous one-dimensional buffer, got shape {tuple(flat.shape)}")
        if flat.numel() < self.extent:
            raise ValueError(f"the segments reach to element {self.extent}, the buffer has {flat.numel()}")

    def __len__(self) -> int:
        return self.table.shape[1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Segments) and torch.equal(self.table, other.table)

    def __hash__(self) -> int:
        return hash(self.table.numpy().tobytes())

    def __repr__(self) -> str:
        if len(self) > 8:
            return f"<Segments: {len(self)} segments, {self.numel} elements>"
        return f"Segments({list(self.sizes)}, offsets={self.offsets.tolist()}, layers={self.layers.tolist()})"
