"""What both generations of FSDP share: the state, and a unit, the parameters that are reduced together."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from terncomm.codecs import Codec
from terncomm.hooks.averaging import Averaging
from terncomm.keys import Key
from terncomm.path.reduce import reduce_scatter
from terncomm.path.shards import Shards


class ShardState(Averaging):
    """What :func:`terncomm.register` returns for a sharded model: statistics, switches, checkpoint.

    Options are those of :class:`terncomm.CommState`. A step is a reduction of each FSDP module's parameters.
    """

    OWN = (*Averaging.OWN, "_units")

    def _detach(self) -> None:
        super()._detach()
        self._units: list[Unit] = []

    def state_dict(self) -> dict[str, Any]:
        """See :class:`terncomm.CommState`; `steps` are of each FSDP module, which may be used unequally often."""
        return {**super().state_dict(), "steps": [unit.step for unit in self._units]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """See :class:`terncomm.CommState`."""
        super().load_state_dict(saved)
        steps = saved.get("steps", [])
        for place, unit in enumerate(self._units):
            unit.step = int(steps[place]) if len(steps) == len(self._units) else self._step

    @property
    def units(self) -> "list[Unit]":
        """What FSDP reduces together, in the order of the model."""
        return self._units

    @property
    def world_size(self) -> int:
        """W."""
        return self.transports["all"].world_size


class Unit(ABC):
    """Parameters that FSDP reduces together, as number `index` of the model.

    known: of those that required a gradient when terncomm was registered, by place: number, and codec or None.
    """

    def __init__(self, state: ShardState, index: int, name: str, known: dict[int, tuple[int, Codec | None]]) -> None:
        self.state = state
        self.index = index
        self.name = name
        self.step = state.step
        self._known = known
        self._made: dict[tuple[tuple[int, ...], int, int], tuple[Shards, Shards]] = {}

    @abstractmethod
    def needed(self) -> tuple[int, ...]:
        """The places of the parameters that require a gradient now."""

    @abstractmethod
    def lay(
        self, places: Sequence[int], numbers: Sequence[int], codecs: Sequence[Codec | None], world_size: int, numel: int
    ) -> Shards:
        """The layout of these parameters in a buffer, which should have `numel` elements."""

    def shards(self, world_size: int, numel: int) -> tuple[Shards, Shards]:
        """The layout of a buffer of `numel` elements, and the same with nothing coded.

        Where the parameters do not make as many, some got no gradient, and which cannot be told: nothing is coded.

        Raises:
            RuntimeError: a parameter is new to terncomm.
        """
        key = places, _, _ = self.needed(), world_size, numel
        if key not in self._made:
            if not self._known.keys() >= set(places):
                raise RuntimeError(
                    f"a parameter of {self.name} required no gradient when terncomm.register was called, and does now: "
                    "register first, freeze after that"
                )
            numbers, codecs = zip(*(self._known[place] for place in places), strict=True) if places else ((), ())
            made, plain = (
                self.lay(places, numbers, which, world_size, numel) for which in (codecs, [None] * len(places))
            )
            if made.row * world_size != numel:
                text = (
                    f"FSDP reduces {numel} elements of {self.name}, whose parameters make {made.row * world_size}: "
                    "some of them got no gradient, and which cannot be told. All of this module's travel exactly then"
                )
                self.state.complain(text)
                made = plain = Shards(
                    [], [(None, [[(0, numel // world_size)]] * world_size)], numel // world_size, world_size
                )
            self._made[key] = made, plain
        return self._made[key]

    def begin(self) -> tuple[Key, str]:
        """A reduction of these parameters begins."""
        state, self.step = self.state, self.step + 1
        if self.step > state.step:
            state.begin_step(self.step)
        return Key(state.seed, self.step, self.index), f"{self.name} of step {self.step}"

    def reduce_scatter(self, flat: torch.Tensor, out: torch.Tensor, divisor: float | None = None) -> None:
        """Leave the sum of this rank's row of `flat`, divided by `divisor` (by W if there is none), in `out`."""
        state = self.state
        key, where = self.begin()
        with state.failing_together(lambda: where):
            state.check_arrived()
            coded, plain = self.shards(state.world_size, flat.numel())
            shards = coded if state.codes_in(key.step) else plain
            complaint = None
            if state.clip_watch.looks(key.step):
                for group in shards.coded:
                    whole = torch.cat(group.whole(flat))
                    found = state.clip_watch.look_at(whole, [(group.codec, group.layers)], key.step)
                    complaint = complaint or found
            context = state.context(key, state.transports["all"])
            over = state.world_size if divisor is None else divisor
            path = reduce_scatter(flat, shards, context, divisor=over, out=out, later=state.later(flat))
            state.run(path, key.bucket)
            numbers = {"coded_numel": shards.coded_numel, "exact_numel": shards.exact_numel}
            state.statistics.add(raw_bytes=flat.nbytes, **numbers)
            state.complain(complaint)

    def all_reduce(self, row: torch.Tensor, rank: int, ranks: int) -> None:
        """Leave the mean over ranks of a row, that of shard `rank` of `ranks`, in its place."""
        state = self.state
        key, where = self.begin()
        with state.failing_together(lambda: where):
            state.check_arrived()
            if row.is_cuda:  # made on FSDP's stream for reduce-scatter, used on that for all-reduce
                row.record_stream(torch.cuda.current_stream(row.device))
            coded, plain = self.shards(ranks, row.numel() * ranks)
            shards = coded if state.codes_in(key.step) and state.world_size > 1 else plain
            state.run(state.dense(row, shards.bucket(rank), key), key.bucket)
