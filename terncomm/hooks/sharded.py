"""What both generations of FSDP share: the state, and a unit, the parameters that are reduced together."""

from abc import ABC, abstractmethod
from typing import Any

import torch

from terncomm.hooks.averaging import Averaging, advise
from terncomm.keys import Key
from terncomm.scatter import Shards, reduce_scatter
from terncomm.transports import Metered


class ShardState(Averaging):
    """What :func:`terncomm.register` returns for a sharded model: statistics, switches, checkpoint.

    Options are those of :class:`terncomm.CommState`. A step is a reduction of each FSDP module's parameters.
    """

    _OWN = (*Averaging._OWN, "_units")

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

    def _codes_now(self, step: int) -> bool:
        return self._enabled_next and step >= self.warmup_steps


class Unit(ABC):
    """Parameters that FSDP reduces together, as number `index` of the model."""

    def __init__(self, state: ShardState, index: int, name: str) -> None:
        self.state = state
        self.index = index
        self.name = name
        self.step = state._step

    @abstractmethod
    def shards(self, world_size: int, numel: int) -> tuple[Shards, Shards]:
        """The layout of a buffer of `numel` elements, and the same with nothing coded.

        Raises:
            RuntimeError: the parameters do not make as many.
        """

    def begin(self) -> tuple[Key, str, Metered]:
        """A reduction of these parameters begins."""
        state, self.step = self.state, self.step + 1
        if self.step > state._step:
            state._begin_step(self.step)
        assert state._transport is not None
        return Key(state.seed, self.step, self.index), f"{self.name} of step {self.step}", state._transport

    def reduce_scatter(self, flat: torch.Tensor, out: torch.Tensor, divisor: float | None = None) -> None:
        """Leave the sum of this rank's row of `flat`, divided by `divisor` (by W if there is none), in `out`."""
        state = self.state
        key, where, transport = self.begin()
        with state._failing_together(lambda: where):
            state._check_arrived()
            coded, plain = self.shards(transport.world_size, flat.numel())
            shards = coded if state._codes_now(key.step) else plain
            complaint = None
            if shards.layers.numel and state._looks_at_clipping(key.step):
                complaint = state._watch_clipping(torch.cat(shards.whole(flat)), shards.layers, key.step)
            reduce_scatter(
                flat,
                shards,
                state.codec if shards.layers.numel else None,
                transport,
                key=key,
                divisor=transport.world_size if divisor is None else divisor,
                out=out,
                clock=state._clock,
                later=state._later if flat.is_cuda else None,
            )
            counts, itemsize = state._counts, flat.element_size()
            counts["raw_bytes"] += flat.nbytes
            counts["exact_bytes"] += (transport.world_size - 1) * shards.exact_width * itemsize
            counts["coded_numel"] += shards.layers.numel
            counts["exact_numel"] += shards.exact_numel
            if complaint is not None:
                advise(complaint, transport)

    def all_reduce(self, row: torch.Tensor, rank: int, ranks: int) -> None:
        """Leave the mean over ranks of a row, that of shard `rank` of `ranks`, in its place."""
        state = self.state
        key, where, transport = self.begin()
        with state._failing_together(lambda: where):
            state._check_arrived()
            if row.is_cuda:  # made on FSDP's stream for reduce-scatter, used on that for all-reduce
                row.record_stream(torch.cuda.current_stream(row.device))
            coded, plain = self.shards(ranks, row.numel() * ranks)
            shards = coded if state._codes_now(key.step) and transport.world_size > 1 else plain
            state._run(row, *shards.own(rank), key, transport)
