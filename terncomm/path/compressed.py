"""Parts whose rows differ in length: packed rows through a lossless byte coder, such as an entropy coder."""

from abc import ABC, abstractmethod

import torch

from terncomm.path.parts import Codes, Coding, Part
from terncomm.wire import ByteCoder


class Varying(Part, ABC):
    """A part whose sizes are known when its bytes are made, and agreed on by all ranks.

    The exchange calls `prepare`, sets `up_nbytes` to the largest answer of all ranks, and then calls `pack`; and in
    the same way `prepare_total`, `back_nbytes` and `combine`. That takes a small message more each way.
    """

    @abstractmethod
    def prepare(self) -> int:
        """Make this rank's rows; the bytes of the longest."""

    @abstractmethod
    def prepare_total(self, received: torch.Tensor) -> int:
        """Make the total of this rank's row as all ranks sent it, (W, up_nbytes) uint8; its bytes."""


class Compressed(Varying):
    """Another part, each of its rows and totals through a byte coder.

    Args:
        inner: the part.
        rows: its number of rows.
        coder: lossless; on meta tensors it is not called, and sizes are those without it.
        device: of the buffer.
    """

    def __init__(self, inner: Part, rows: int, coder: ByteCoder, device: torch.device) -> None:
        self.label, self.up_nbytes, self.back_nbytes = inner.label, inner.up_nbytes, inner.back_nbytes
        self._inner, self._coder, self._device = inner, coder, device
        self._shape = rows, inner.up_nbytes
        self._total_nbytes = inner.back_nbytes
        self._made: list[torch.Tensor] = []

    def prepare(self) -> int:
        """See :class:`Varying`."""
        packed = torch.zeros(self._shape, dtype=torch.uint8, device=self._device)
        self._inner.pack(packed)
        return self._make(packed)

    def prepare_total(self, received: torch.Tensor) -> int:
        """See :class:`Varying`."""
        total = torch.zeros(1, self._total_nbytes, dtype=torch.uint8, device=self._device)
        self._inner.combine(self._restored(received, self._shape[1]), total[0])
        return self._make(total)

    def pack(self, out: torch.Tensor) -> None:
        """See :class:`Varying`."""
        for place, row in zip(out, self._made, strict=True):
            place[: len(row)] = row
            place[len(row) :] = 0
        self._made = []

    def combine(self, received: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Varying`."""
        self.pack(out[None])

    def unpack(self, totals: torch.Tensor) -> None:
        """See :class:`Varying`."""
        self._inner.unpack(self._restored(totals, self._total_nbytes))

    def keep(self, received: torch.Tensor) -> None:
        """See :class:`Varying`."""
        self._inner.keep(self._restored(received, self._shape[1]))

    def _make(self, rows: torch.Tensor) -> int:
        self._made = [row if row.is_meta else self._coder.shorten(row) for row in rows]
        return max(map(len, self._made))

    def _restored(self, rows: torch.Tensor, nbytes: int) -> torch.Tensor:
        return torch.stack([row if row.is_meta else self._coder.restore(row, nbytes) for row in rows])


def codes_of(coding: Coding, edges: tuple[int, ...], *, kept: tuple[int, int] | None = None) -> Part:
    """Integers of a coding, as its codec has them on the wire; see :class:`terncomm.path.parts.Codes`."""
    codes, coder = Codes(coding, edges, kept=kept), coding.codec.byte_coder
    return codes if coder is None else Compressed(codes, len(edges) - 1, coder, coding.flat.device)
