"""Stages change gradients before they are coded, and their means afterwards. They may have state per parameter.

A stage is a pure function, like a codec; :class:`Staging` keeps its state. The new states of a step are adopted only if
all buckets of the step have completed with finite means. If a step fails, is aborted or has a non-finite mean, the
states do not change.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from terncomm.codecs.base import check_frozen
from terncomm.path.account import Context
from terncomm.path.message import Path
from terncomm.segments import Segments

_Place = tuple[int, int]  # stage, parameter


class Stage(ABC):
    """Base class of stages: changes the gradient of one layer at a time.

    A subclass must be a frozen dataclass. Ranks and checkpoints compare stages by their `repr`, so it must name every
    option in full: give a matrix by the seed that it is made from. A subclass that has `next_state` keeps state. This
    costs a copy of the gradients, and encoding them once more.

    Stages are called only for layers under an integer codec, and not in steps in which nothing is coded (warm-up).
    A layer that leaves the range of codes (:mod:`terncomm.path.ranges`) is averaged uncompressed, between `before` and
    `after`. Then `next_state` is not called for it, and it has no state after this step.
    With several stages, `before` is called in their order and `after` in reverse order.
    """

    @property
    def keeps_state(self) -> bool:
        """Whether the class has a :meth:`next_state` of its own."""
        return type(self).next_state is not Stage.next_state

    @abstractmethod
    def before(self, gradient: torch.Tensor, layer: int, ctx: Context, state: torch.Tensor | None) -> None:
        """Change this rank's gradient of a layer in place.

        Args:
            gradient: (n,) floats, of any type.
            layer: the number of the parameter, in the order of the model's parameters.
            ctx: rank, world size, and the key of the noise, with seed and step.
            state: the adopted result of :meth:`next_state` for this layer; None: there is none.
        """

    @abstractmethod
    def after(self, mean: torch.Tensor, layer: int, ctx: Context) -> None:
        """Change the mean of a layer, (n,) floats, in place. Must compute the same on all ranks.

        If a stage keeps state, this is also called with what only this rank's codes decode to, on the scale of its
        gradient (not divided by W). That gives `sent` for :meth:`next_state` of the earlier stages.
        """

    def next_state(
        self, given: torch.Tensor, sent: torch.Tensor, layer: int, ctx: Context, state: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The state for the next step; None: no state.

        Args:
            given: (n,) floats, the gradient after :meth:`before` of this stage. May be modified.
            sent: (n,) float32, what only this rank's codes decode to, on the scale of its gradient (not divided by W),
                after :meth:`after` of the later stages. May be modified.
            layer, ctx, state: see :meth:`before`; `state` must not be modified.
        """
        return None


class _Step:
    """The results of the buckets of one step so far."""

    def __init__(self) -> None:
        self.states: dict[_Place, torch.Tensor | None] = {}
        self.finite: list[torch.Tensor] = []  # for each completed bucket, a bool scalar
        self.complete = False  # whether the last bucket has completed


class Staging:
    """The stages, and this rank's state of each stage and parameter."""

    def __init__(self, stages: Sequence[Stage] = ()) -> None:
        if isinstance(stages, Stage):
            raise TypeError(f"stages: wanted a sequence of stages, got {stages!r}: write [{stages!r}]")
        self.stages = tuple(stages)
        for each in self.stages:
            _check(each)
        self._state: dict[_Place, torch.Tensor] = {}
        self._steps: dict[int, _Step] = {}  # paths of an aborted step may still run while the next step's run

    # ---- on the path of a bucket --------------------------------------------------------------------------------

    def before(self, flat: torch.Tensor, layers: Segments, ctx: Context) -> dict[_Place, torch.Tensor]:
        """Apply `before` of all stages to the layers of a bucket in place.

        Returns:
            Copies for :meth:`compute_next_states`.
        """
        given = {}
        for layer, gradient in _pieces(flat, layers):
            for number, stage in enumerate(self.stages):
                _in_place(stage, "before", stage.before(gradient, layer, ctx, self._state.get((number, layer))))
                if stage.keeps_state:
                    given[number, layer] = gradient.clone()
        return given

    @property
    def keeps_state(self) -> bool:
        """Whether any stage keeps state."""
        return any(stage.keeps_state for stage in self.stages)

    def compute_next_states(
        self, flat: torch.Tensor, layers: Segments, ctx: Context, given: dict[_Place, torch.Tensor]
    ) -> None:
        """Compute the next states of a bucket's layers.

        Args:
            flat: (n,) float32, what only this rank's codes decode to; overwritten.
            layers: of the bucket.
            ctx: of the reduction.
            given: what :meth:`before` returned, for these layers and perhaps others.
        """
        states = self._step(ctx.key.step).states
        for layer, values in _pieces(flat, layers):
            for number, stage in reversed(list(enumerate(self.stages))):
                place = number, layer
                if stage.keeps_state:
                    before = self._state.get(place)
                    states[place] = stage.next_state(given[place], values.clone(), layer, ctx, before)
                _in_place(stage, "after", stage.after(values, layer, ctx))

    def drop_states(self, layers: Iterable[int], ctx: Context) -> None:
        """After this step, these layers have no state: they were averaged uncompressed, so nothing was lost."""
        states = self._step(ctx.key.step).states
        states |= {(number, layer): None for layer in layers for number in range(len(self.stages))}

    def after(self, flat: torch.Tensor, layers: Segments, ctx: Context) -> None:
        """Apply `after` of all stages, in reverse order, to the means of a bucket's layers in place."""
        for layer, mean in _pieces(flat, layers):
            for stage in reversed(self.stages):
                _in_place(stage, "after", stage.after(mean, layer, ctx))

    def _step(self, step: int) -> _Step:
        return self._steps.setdefault(step, _Step())

    # ---- during training ----------------------------------------------------------------------------------------

    def recording_finite(self, path: Path[torch.Tensor], step: int, final: bool) -> Path[torch.Tensor]:
        """Run the path of a bucket, and record whether its mean is finite. final: it is the step's last bucket."""
        mean = yield from path
        values = mean.values() if mean.layout == torch.sparse_coo else mean
        record = self._step(step)
        record.finite.append(torch.isfinite(values).all())
        record.complete |= final
        return mean

    def adopt_states(self) -> None:
        """Adopt the new states of steps whose buckets all completed with finite means. Called between steps."""
        steps, self._steps = self._steps, {}
        for step in steps.values():
            if step.complete and all(bool(each) for each in step.finite):
                for place, state in step.states.items():
                    self._state.pop(place, None)
                    if state is not None:
                        self._state[place] = state

    def state_dict(self, rank: int, world_size: int, name: Callable[[int], str]) -> dict[str, Any]:
        """This rank's state for a checkpoint. name: layer number -> parameter name."""
        self.adopt_states()
        states: list[dict[str, torch.Tensor]] = [{} for _ in self.stages]
        for (stage, layer), state in self._state.items():
            states[stage][name(layer)] = state
        return {"stages": list(map(repr, self.stages)), "rank": rank, "world_size": world_size, "states": states}

    def load_state_dict(
        self, saved: Mapping[str, Any], rank: int, world_size: int, number: Callable[[str], int]
    ) -> None:
        """Restore what :meth:`state_dict` returned. number: parameter name -> layer number.

        Raises:
            ValueError: `saved` has different stages, or state of another rank or world size.
        """
        mine = list(map(repr, self.stages))
        if saved["stages"] != mine:
            raise ValueError(f"the checkpoint has stages {saved['stages']}, this state has {mine}; use the same stages")
        whose, ours = (saved["rank"], saved["world_size"]), (rank, world_size)
        if any(saved["states"]) and whose != ours:
            raise ValueError(
                f"the checkpoint has the stages' state of rank {whose[0]} of {whose[1]}, and this is rank {ours[0]} of "
                f"{ours[1]}. This state (for example a residual) belongs to a rank: load on each rank what it saved "
                'itself, at the same world size. Or start without this state: remove "stages" from what you load'
            )
        self.adopt_states()
        self._state = {
            (stage, number(name)): state
            for stage, states in enumerate(saved["states"])
            for name, state in states.items()
        }


def _check(stage: object) -> None:
    if not isinstance(stage, Stage):
        raise TypeError(f"stages: wanted a terncomm.path.stages.Stage, got {stage!r}")
    why = "ranks and checkpoints compare stages by their repr, which must name every option"
    check_frozen("stages", stage, why, told_by_repr=True)


def _in_place(stage: Stage, method: str, returned: object) -> None:
    """Refuse what a method returned instead of changing its argument."""
    if returned is not None:
        raise TypeError(
            f"{stage!r}.{method} returned a {type(returned).__name__}: it must change the tensor in place and return "
            "nothing"
        )


def _pieces(flat: torch.Tensor, layers: Segments) -> list[tuple[int, torch.Tensor]]:
    places = zip(layers.layers.tolist(), layers.offsets.tolist(), layers.sizes, strict=True)
    return [(layer, flat[offset : offset + size]) for layer, offset, size in places]
