"""The base of FSDP1 and FSDP2: the state of a model, and a unit, which is the parameters reduced together."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from terncomm.codecs import Codec
from terncomm.hooks.reducer import GradientReducer
from terncomm.keys import Key
from terncomm.path.reduce import reduce_scatter
from terncomm.path.shards import Shards


class ShardState(GradientReducer):
    """The state of an FSDP model, as returned by :func:`terncomm.register`: statistics, switches and checkpoints.

    Options are those of :class:`terncomm.CommState`. Each unit counts its own steps, one per reduction; the step of the
    state is the highest of them.
    """

    PROCESS_LOCAL = (*GradientReducer.PROCESS_LOCAL, "_units")

    def _detach(self) -> None:
        super()._detach()
        self._units: list[Unit] = []

    def state_dict(self) -> dict[str, Any]:
        """As of :class:`terncomm.CommState`, and "steps": one for each unit, which may be used unequally often."""
        return {**super().state_dict(), "steps": [unit.step for unit in self._units]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """See :class:`terncomm.CommState`."""
        super().load_state_dict(saved)
        steps = saved.get("steps", [])
        for place, unit in enumerate(self._units):
            unit.step = int(steps[place]) if len(steps) == len(self._units) else self._step

    @property
    def units(self) -> "list[Unit]":
        """The units, in the order of the model's modules."""
        return self._units

    @property
    def world_size(self) -> int:
        """Number of ranks, W: of the mesh; with `replicas`, of the replicas."""
        return self.transports["all"].world_size


class Unit(ABC):
    """The parameters that FSDP reduces together.

    Args:
        state: of the model.
        index: of this unit in the model; ranks compare it as they compare a bucket's index.
        name: of the module, for messages.
        known: place in the unit -> (number of the parameter, codec or None for uncompressed), of the parameters that
            the model had at registration, also of frozen ones.
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
        """The layout of some parameters in FSDP's buffer.

        Args:
            places: of the parameters in this unit.
            numbers, codecs: of these parameters; None: uncompressed.
            world_size: number of rows of the buffer, W.
            numel: elements of the buffer. The layout may need another number, see :meth:`shards`.
        """

    def shards(self, world_size: int, numel: int) -> tuple[Shards, Shards]:
        """The layout of a buffer of `numel` elements, and the same layout with all parameters uncompressed.

        If the parameters' sizes do not add up to `numel`, some had no gradient, and FSDP does not say which. Then both
        layouts are uncompressed.

        Raises:
            RuntimeError: a parameter requires a gradient, and was not in the model at registration.
        """
        key = places, _, _ = self.needed(), world_size, numel
        if key not in self._made:
            if not self._known.keys() >= set(places):
                raise RuntimeError(
                    f"{self.name} has a parameter that was not in it when terncomm.register was called: call register "
                    "when the model is complete"
                )
            numbers, codecs = zip(*(self._known[place] for place in places), strict=True) if places else ((), ())
            made, plain = (
                self.lay(places, numbers, which, world_size, numel) for which in (codecs, [None] * len(places))
            )
            if made.row * world_size != numel:
                text = (
                    f"FSDP reduces {numel} elements of {self.name}, but its parameters need {made.row * world_size}: "
                    "some had no gradient, and FSDP does not say which. So this module's gradients are not compressed"
                )
                self.state.warn(text)
                made = plain = Shards(
                    [], [(None, [[(0, numel // world_size)]] * world_size)], numel // world_size, world_size
                )
            self._made[key] = made, plain
        return self._made[key]

    def begin(self) -> tuple[Key, str]:
        """Begin a reduction. Returns its key, and its module and step in words, for messages."""
        state, self.step = self.state, self.step + 1
        if self.step > state.step:
            state.begin_step(self.step)
        return Key(state.seed, self.step, self.index), f"{self.name} of step {self.step}"

    def reduce_scatter(self, flat: torch.Tensor, out: torch.Tensor, divisor: float | None = None) -> None:
        """Sum `flat`, (W k,), over ranks, divide by `divisor` (None: by W), write this rank's row to `out`, (k,)."""
        state = self.state
        key, where = self.begin()
        with state.reporting_failure(lambda: where):
            state.check_arrived()
            coded, plain = self.shards(state.world_size, flat.numel())
            shards = coded if state.compresses_at(key.step) else plain
            complaint = state.clip_watch.complaint(key.step)
            if state.clip_watch.measures_at(key.step):
                for group in shards.coded:
                    state.clip_watch.measure(torch.cat(group.whole(flat)), [(group.codec, group.layers)], key.step)
            context = state.context(key, state.transports["all"])
            over = state.world_size if divisor is None else divisor
            path = reduce_scatter(flat, shards, context, divisor=over, out=out, unchecked=state.unchecked(flat))
            outside = state.run(path, key.bucket)
            moved = shards.numel_of(outside)
            state.statistics.add(
                raw_bytes=flat.nbytes,
                ring_bytes=(state.world_size - 1) * flat.nbytes // state.world_size,
                coded_numel=shards.coded_numel - moved,
                exact_numel=shards.exact_numel + moved,
            )
            state.warn(complaint)
            state.tell_outside(outside, flat.dtype)

    def all_reduce(self, row: torch.Tensor, rank: int, ranks: int) -> None:
        """Replace `row`, (k,), by its mean over ranks. It is row `rank` of a buffer of `ranks` rows."""
        state = self.state
        key, where = self.begin()
        with state.reporting_failure(lambda: where):
            state.check_arrived()
            if row.is_cuda:  # allocated on FSDP's reduce-scatter stream, used on its all-reduce stream
                row.record_stream(torch.cuda.current_stream(row.device))
            coded, plain = self.shards(ranks, row.numel() * ranks)
            shards = coded if state.compresses_at(key.step) and state.world_size > 1 else plain
            state.run(state.dense_path(row, shards.bucket(rank), key), key.bucket)
