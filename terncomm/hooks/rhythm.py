"""Notices a rank that runs more or fewer backward passes between two changes of its weights than the other ranks do.

Such a rank is paired with the others all the same: pass n of every rank is averaged, whatever batch it is of. Without
this it would be seen only at the end, when a rank waits for a pass that the others do not run. With this it is seen
after the next optimizer step of that rank.
"""

from collections.abc import Iterable, Sequence

import torch

from terncomm.torch_internals import version_of

_MOST = 2**32 - 1  # that a header has room for


class Rhythm:
    """Counts the passes of this rank between changes of its weights.

    `value` is sent with each header: the passes between the last two changes; 0 until the weights have changed once.
    """

    def __init__(self) -> None:
        self.value = self._since = 0
        self._version: int | None = None
        self._told = False

    def begin(self, parameters: Iterable[torch.Tensor]) -> None:
        """Begin a pass. parameters: whose values an optimizer changes."""
        version = sum(map(version_of, parameters))
        if self._version not in (None, version):
            self.value, self._since = min(self._since, _MOST), 0
        self._version = version
        self._since += 1

    def complaint(self, values: Sequence[int], kind: str = "rank") -> str | None:
        """The text of a warning, once, if ranks differ; else None.

        Args:
            values: of all ranks in one step. Ranks whose weights have not changed yet are not compared.
            kind: what the places in `values` are: "rank" or "node".
        """
        ranks: dict[int, list[int]] = {}
        for rank, value in enumerate(values):
            if value:
                ranks.setdefault(value, []).append(rank)
        if self._told or len(ranks) < 2:
            return None
        self._told = True
        told = [f"{value} on {kind} {', '.join(map(str, those))}" for value, those in ranks.items()]
        return (
            f"ranks have run different numbers of backward passes before their last optimizer step: {'; '.join(told)}. "
            "Gradients of different batches are averaged from here on, and at the end a rank will wait for a pass that "
            "the others do not run"
        )
