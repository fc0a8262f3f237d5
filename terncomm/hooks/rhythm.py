"""Notices a rank that runs more or fewer backward passes between two changes of its weights than the other ranks do.

Such a rank is paired with the others all the same: pass n of every rank is averaged, whatever batch it is of. Without
this it would be seen only at the end, when a rank waits for a pass that the others do not run.
"""

from collections.abc import Iterable, Sequence

import torch

from terncomm.torch_internals import version_of

_MOST = 0xFFFF


class Rhythm:
    """Counts the passes of this rank between changes of its weights.

    `value` is sent with each header: the passes before the last change in the upper 16 bits, and those since then in
    the lower 16, this one included. The upper bits are 0 until the weights have changed once.
    """

    def __init__(self) -> None:
        self.value = 0
        self._version: int | None = None
        self._before = self._since = 0
        self._told = False

    def begin(self, parameters: Iterable[torch.Tensor]) -> None:
        """Begin a pass. parameters: whose values an optimizer changes."""
        version = sum(map(version_of, parameters))
        if self._version not in (None, version):
            self._before, self._since = self._since, 0
        self._version = version
        self._since += 1
        self.value = min(self._before, _MOST) << 16 | min(self._since, _MOST)

    def complaint(self, values: Sequence[int], kind: str = "rank") -> str | None:
        """The text of a warning, once, if ranks differ; else None.

        Args:
            values: of all ranks in one step. Ranks whose weights have not changed yet are not compared.
            kind: what the places in `values` are: "rank" or "node".
        """
        known = {rank: value for rank, value in enumerate(values) if value >> 16}
        if self._told or len(set(known.values())) < 2:
            return None
        self._told = True
        sides: dict[int, list[int]] = {}
        for rank, value in known.items():
            sides.setdefault(value, []).append(rank)
        told = [
            f"{kind} {', '.join(map(str, ranks))}: {value & _MOST} since its weights last changed, {value >> 16} before"
            for value, ranks in sides.items()
        ]
        return (
            f"ranks run different numbers of backward passes between optimizer steps ({'; '.join(told)}). Gradients of "
            "different batches are averaged from here on, and at the end a rank will wait for a pass that the others "
            "do not run"
        )
