"""Parts of varying length: packed rows and totals go through a lossless byte coder, such as an entropy coder."""

from abc import ABC, abstractmethod

import torch

from terncomm.path.parts import Codes, Coding, Part
from terncomm.wire import ByteCoder


class Varying(Part, ABC):
    """A part whose sizes depend on its content; ranks agree on the largest before they send it.

    The exchange calls `prepare`, sets `up_nbytes` to the maximum of its results over ranks, and then calls `pack`. On
    the way back it uses `prepare_total`, `back_nbytes` and `combine` in the same way. Each way needs one more small
    all-gather.
    """

    @abstractmethod
    def prepare(self) -> int:
        """Make this rank's rows and keep them for `pack`; returns the bytes of the longest row."""

    @abstractmethod
    def prepare_total(self, received: torch.Tensor) -> int:
        """Make the total of this rank's row and keep it for `combine`; returns its bytes.

        received: (W, up_nbytes) uint8, this rank's row as each rank sent it.
        """


class Compressed(Varying):
    """A part whose rows and totals go through a byte coder.

    Args:
        inner: the part without byte coder.
        rows: number of rows of `inner`.
        coder: the byte coder. It is not called for meta tensors: sizes are then those without it.
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

    def store_sum(self, received: torch.Tensor) -> None:
        """See :class:`Varying`."""
        self._inner.store_sum(self._restored(received, self._shape[1]))

    def _make(self, rows: torch.Tensor) -> int:
        self._made = [row if row.is_meta else self._coder.shorten(row) for row in rows]
        return max(map(len, self._made))

    def _restored(self, rows: torch.Tensor, nbytes: int) -> torch.Tensor:
        return torch.stack([row if row.is_meta else self._coder.restore(row, nbytes) for row in rows])


def codes_of(coding: Coding, edges: tuple[int, ...], *, target_range: tuple[int, int] | None = None) -> Part:
    """The codes of a coding as a part, with the codec's byte coder if it has one.

    coding, edges, target_range: see :class:`terncomm.path.parts.Codes`.
    """
    codes, coder = Codes(coding, edges, target_range=target_range), coding.codec.byte_coder
    return codes if coder is None else Compressed(codes, len(edges) - 1, coder, coding.flat.device)
