"""Stages: what is done to gradients before they are coded and to their means afterwards, with state by parameter.

A stage is as pure as a codec. Its state lies in :class:`Staging`, which takes a step's new states over only when all
of the step's buckets have ended with finite means: a step that fails, is broken off or is not finite leaves them as
they were.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from terncomm.path.account import Context
from terncomm.path.message import Path
from terncomm.segments import Segments

_Place = tuple[int, int]  # stage, parameter


class Stage(ABC):
    """Gradient -> gradient, for each coded layer by itself; a frozen dataclass whose fields are its configuration.

    Layers that travel exactly, and steps in which nothing is coded, pass by the stages. Of several stages `before` is
    called in their order, and `after` in the reverse of it.
    """

    keeps_state = False
    """Whether :meth:`next_state` is called; that costs a copy of the gradients and one more encoding of them."""

    @abstractmethod
    def before(self, gradient: torch.Tensor, layer: int, ctx: Context, state: torch.Tensor | None) -> None:
        """Change this rank's gradient of a layer in place.

        Args:
            gradient: (n,) floats, of any type.
            layer: the number of the parameter.
            ctx: key of the noise, rank and world size.
            state: what :meth:`next_state` returned last, if it did.
        """

    @abstractmethod
    def after(self, mean: torch.Tensor, layer: int, ctx: Context) -> None:
        """Change a mean in place, (n,) floats: the same computation on all ranks.

        It is called with the values of this rank's own codes, too, for :meth:`next_state` of the stages before this.
        """

    def next_state(
        self, given: torch.Tensor, sent: torch.Tensor, layer: int, ctx: Context, state: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The state of the next step; None: there is none.

        Args:
            given: (n,) floats, what :meth:`before` has left. Not needed afterwards.
            sent: (n,) float32, what this rank's codes alone decode to. Not needed afterwards.
            layer, ctx, state: as there; `state` is not to be modified.
        """
        return None


class _Step:
    """What the buckets of a step have left so far."""

    def __init__(self) -> None:
        self.states: dict[_Place, torch.Tensor | None] = {}
        self.finite: list[torch.Tensor] = []  # of each bucket that has ended
        self.complete = False  # whether the last bucket has ended


class Staging:
    """Stages, and their state by parameter, which belongs to this rank."""

    def __init__(self, stages: Sequence[Stage] = ()) -> None:
        self.stages = tuple(stages)
        for each in self.stages:
            _check(each)
        self._state: dict[_Place, torch.Tensor] = {}
        self._steps: dict[int, _Step] = {}  # paths of a step that was broken off may still run beside the next one's

    # ---- on the path of a bucket --------------------------------------------------------------------------------

    def before(self, flat: torch.Tensor, layers: Segments, ctx: Context) -> dict[_Place, torch.Tensor]:
        """All stages, before the layers of a bucket are measured; returns what :meth:`sent` needs."""
        given = {}
        for layer, gradient in _pieces(flat, layers):
            for number, stage in enumerate(self.stages):
                stage.before(gradient, layer, ctx, self._state.get((number, layer)))
                if stage.keeps_state:
                    given[number, layer] = gradient.clone()
        return given

    @property
    def keeps_state(self) -> bool:
        """Whether a stage wants to know what was sent."""
        return any(stage.keeps_state for stage in self.stages)

    def sent(self, flat: torch.Tensor, layers: Segments, ctx: Context, given: dict[_Place, torch.Tensor]) -> None:
        """What this rank's codes decode to, `flat` (n,) float32, which is used up."""
        states = self._step(ctx.key.step).states
        for layer, values in _pieces(flat, layers):
            for number, stage in reversed(list(enumerate(self.stages))):
                place = number, layer
                if stage.keeps_state:
                    before = self._state.get(place)
                    states[place] = stage.next_state(given[place], values.clone(), layer, ctx, before)
                stage.after(values, layer, ctx)

    def after(self, flat: torch.Tensor, layers: Segments, ctx: Context) -> None:
        """All stages, once the means of a bucket's layers are there."""
        for layer, mean in _pieces(flat, layers):
            for stage in reversed(self.stages):
                stage.after(mean, layer, ctx)

    def _step(self, step: int) -> _Step:
        return self._steps.setdefault(step, _Step())

    # ---- in a run -----------------------------------------------------------------------------------------------

    def watched(self, path: Path[torch.Tensor], step: int, final: bool) -> Path[torch.Tensor]:
        """The path of a bucket, and whether its mean is finite. final: no bucket of the step follows."""
        mean = yield from path
        values = mean.values() if mean.layout == torch.sparse_coo else mean
        record = self._step(step)
        record.finite.append(torch.isfinite(values).all())
        record.complete |= final
        return mean

    def settle(self) -> None:
        """Between two steps: take over the states of the step before, if all of it ended and was finite."""
        steps, self._steps = self._steps, {}
        for step in steps.values():
            if step.complete and all(bool(each) for each in step.finite):
                for place, state in step.states.items():
                    self._state.pop(place, None)
                    if state is not None:
                        self._state[place] = state

    def state_dict(self, rank: int, world_size: int, name: Callable[[int], str]) -> dict[str, Any]:
        """For a checkpoint of this rank. name: of a parameter, by its number."""
        self.settle()
        states: list[dict[str, torch.Tensor]] = [{} for _ in self.stages]
        for (stage, layer), state in self._state.items():
            states[stage][name(layer)] = state
        return {"stages": list(map(repr, self.stages)), "rank": rank, "world_size": world_size, "states": states}

    def load_state_dict(
        self, saved: Mapping[str, Any], rank: int, world_size: int, number: Callable[[str], int]
    ) -> None:
        """`state_dict` undone. number: of a parameter, by its name.

        Raises:
            ValueError: the state is of other stages, or of another rank or world size.
        """
        mine = list(map(repr, self.stages))
        if saved["stages"] != mine:
            raise ValueError(f"the checkpoint has stages {saved['stages']}, this state {mine}; give the same")
        whose, ours = (saved["rank"], saved["world_size"]), (rank, world_size)
        if any(saved["states"]) and whose != ours:
            raise ValueError(
                f"the checkpoint has the stages' state of rank {whose[0]} of {whose[1]}, and this is rank {ours[0]} of "
                f"{ours[1]}. Such state, as a residual, belongs to a rank: give each rank what it has saved itself, at "
                'the same world size; or begin without, and leave "stages" out of what is loaded'
            )
        self.settle()
        self._state = {
            (stage, number(name)): state
            for stage, states in enumerate(saved["states"])
            for name, state in states.items()
        }


def _check(stage: object) -> None:
    if not isinstance(stage, Stage):
        raise TypeError(f"stages: wanted a terncomm.path.stages.Stage, got {stage!r}")


def _pieces(flat: torch.Tensor, layers: Segments) -> list[tuple[int, torch.Tensor]]:
    places = zip(layers.layers.tolist(), layers.offsets.tolist(), layers.sizes, strict=True)
    return [(layer, flat[offset : offset + size]) for layer, offset, size in places]
