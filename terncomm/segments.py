"""Which slice of a flat buffer is which layer, block or row.

A buffer of gradients is flat; quantization is not. `Segments` says where each layer lies in the buffer, and carries
two facts along every cut: the `layer` a piece belongs to and its `base`, the place of its first element inside that
layer. Rounding noise is keyed by those two, so it does not change with how a buffer is cut.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

MAX_LAYER_NUMEL = 2**32


class Columns(NamedTuple):
    """The numbers of segments as tensors on one device, all int64; see the properties of :class:`Segments`."""

    offsets: torch.Tensor  # (L,)
    starts: torch.Tensor  # (L + 1,): where each piece begins in dense order, and where the last one ends
    bases: torch.Tensor  # (L,)
    lengths: torch.Tensor  # (L,)
    layers: torch.Tensor  # (L,)


class Segments:
    """Consecutive pieces of a flat buffer, each with one scale.

    The pieces need not touch (`offsets`): elements between them are left alone. Codes are kept *dense*, in the order
    of the pieces without the gaps.

    Args:
        sizes: number of elements of each of the L pieces; zero is allowed.
        offsets: where each begins in the flat buffer; by default they follow one another from 0.
        layers: the layer each belongs to, a number that names the same parameter in every step; by default 0..L-1.
        bases: the index, inside its layer, of each piece's first element; by default 0.

    Raises:
        TypeError: a size is not an int.
        ValueError: lengths differ, a number is negative, pieces overlap, or a layer is longer than 2**32 elements.

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
                raise ValueError(f"{name} has {column.numel()} entries, sizes has {size.numel()}; wanted as many")
            if (column < 0).any():
                raise ValueError(f"{name} must not be negative, got {column.tolist()}")
        if (columns[0][:-1] + size[:-1] > columns[0][1:]).any():
            raise ValueError(f"pieces overlap or are out of order: offsets {columns[0].tolist()}, sizes {list(sizes)}")
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
        """From offsets, sizes, layers and bases, (4, L) int64, that are known to be right."""
        made = cls.__new__(cls)
        made._set(table)
        return made

    @property
    def offsets(self) -> torch.Tensor:
        """(L,) int64: where each piece begins in the flat buffer."""
        return self.table[0]

    @property
    def lengths(self) -> torch.Tensor:
        """(L,) int64: `sizes` as a tensor."""
        return self.table[1]

    @property
    def layers(self) -> torch.Tensor:
        """(L,) int64: the layer each piece belongs to."""
        return self.table[2]

    @property
    def bases(self) -> torch.Tensor:
        """(L,) int64: the index inside its layer of each piece's first element."""
        return self.table[3]

    def on(self, device: torch.device) -> Columns:
        """The columns on `device`: copied there once, and kept."""
        if device not in self._on:
            columns = self.offsets, self.starts, self.bases, self.lengths, self.layers
            self._on[device] = Columns(*(column.to(device) for column in columns))
        return self._on[device]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each piece."""
        return tuple(self.table[1].tolist())

    @cached_property
    def extent(self) -> int:
        """Where the last piece ends: the least length of a flat buffer that these segments describe."""
        return int((self.table[0] + self.table[1]).max()) if len(self) else 0

    @property
    def contiguous(self) -> bool:
        """Whether the pieces follow one another with no gap from the first on."""
        return len(self) == 0 or self.extent - int(self.table[0, 0]) == self.numel

    def blocks(self, block: int | None) -> "Segments":
        """Every piece cut into blocks of `block` elements, the last one of each ragged; `None` leaves them whole."""
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
        """The pieces of dense elements [begin, end), with offsets counted from `begin` in dense order."""
        if (begin, end) not in self._windows:
            low = self.starts[:-1].clamp(begin, end)
            high = self.starts[1:].clamp(begin, end)
            keep = high > low
            low, high = low[keep], high[keep]
            base = self.bases[keep] + low - self.starts[:-1][keep]
            table = torch.stack([low - begin, high - low, self.layers[keep], base])
            self._windows[begin, end] = Segments.of_table(table)
        return self._windows[begin, end]

    def clipped(self, begin: int, end: int) -> "Segments":
        """What lies in elements [begin, end) of the flat buffer, with offsets counted from `begin`."""
        low = self.offsets.clamp(begin, end)
        high = (self.offsets + self.lengths).clamp(begin, end)
        keep = high > low
        low, high = low[keep], high[keep]
        base = self.bases[keep] + low - self.offsets[keep]
        return Segments.of_table(torch.stack([low - begin, high - low, self.layers[keep], base]))

    def elements(
        self, begin: int, end: int, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each dense element of [begin, end): its piece, its place in the buffer, its index inside the layer.

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
        """The described elements of `flat`, dense (numel,): a view where they are contiguous, else a copy."""
        if self.contiguous:
            first = int(self.table[0, 0]) if len(self) else 0
            return flat[first : first + self.numel]
        return torch.cat([flat[o : o + n] for o, n in zip(self.offsets.tolist(), self.sizes, strict=True)])

    def spans(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """Dense elements [begin, end) as runs without a gap: (place after `begin`, place in the buffer, length)."""
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
        """Write dense (numel,) back to its places in `flat`."""
        if self.contiguous and dense.data_ptr() == flat[int(self.table[0, 0]) if len(self) else 0 :].data_ptr():
            return  # what `take` gave is a view
        for offset, piece in zip(self.offsets.tolist(), torch.split(dense, list(self.sizes)), strict=True):
            flat[offset : offset + piece.numel()] = piece

    def check(self, flat: torch.Tensor) -> None:
        """Raise a ValueError unless `flat` is a one-dimensional contiguous buffer that holds every piece."""
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
            return f"<Segments: {len(self)} pieces, {self.numel} elements>"
        return f"Segments({list(self.sizes)}, offsets={self.offsets.tolist()}, layers={self.layers.tolist()})"
