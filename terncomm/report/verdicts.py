"""A codec against none: what a target takes, and whether a gap is more than chance between seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from terncomm.report.training import Band, Curve, Field, Panel, Run, band

# Student's t, 97.5 % point, for 1, 2, ... degrees of freedom; beyond the last the last, which is a little wide.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


@dataclass(frozen=True)
class Target:
    """What a run shall reach: at least this accuracy, or at most this loss."""

    field: Field
    value: float
    why: str

    @property
    def text(self) -> str:
        """As in titles."""
        if self.field == "test_accuracy":
            return f"{100 * self.value:.2f} % test accuracy"
        return f"test loss {self.value:.4f}"

    def reached_at(self, run: Run) -> int | None:
        """Index of the first evaluation that reaches it; nothing is interpolated."""
        for index, entry in enumerate(run.history):
            value = entry[self.field]
            if value is not None and (value >= self.value if self.field == "test_accuracy" else value <= self.value):
                return index
        return None


def target_of(panel: Panel, accuracy: float | None = None, loss: float | None = None) -> Target | None:
    """The target given; or 99 % of none's final mean accuracy (101 % of its final mean loss without accuracies).

    Without a run of none the best codec stands for it. None where every run diverged.
    """
    field = panel.field
    given = accuracy if field == "test_accuracy" else loss
    if given is not None:
        return Target(field, given, "as asked for")
    curves = [panel.baseline] if panel.baseline else panel.curves
    finals = [final.mean for curve in curves if (final := curve.final(field))]
    if not finals:
        return None
    whose = "none's" if panel.baseline else "the best codec's"
    if field == "test_accuracy":
        return Target(field, 0.99 * max(finals), f"99 % of {whose} final mean accuracy")
    return Target(field, 1.01 * min(finals), f"101 % of {whose} final mean test loss")


@dataclass(frozen=True)
class Reach:
    """Bytes or seconds to a target over the runs that reach it (`band` is None where none does)."""

    band: Band | None
    reached: int
    count: int

    @property
    def text(self) -> str:
        """Remark beside a bar; empty where every run reaches the target."""
        if self.reached == self.count:
            return ""
        return f"reached by {self.reached} of {self.count}" if self.reached else "not reached"


def reach(curve: Curve, target: Target, link: str | None = None) -> Reach:
    """Bytes (or seconds on a link) at the first evaluation that reaches the target."""
    runs = curve.seeds if link is None else curve.on(link)
    found = []
    for run in runs:
        index = target.reached_at(run)
        if index is not None:
            found.append(run.history[index]["sent_bytes"] if link is None else run.clocks[link][index])
    return Reach(band(found), len(found), len(runs))


VERDICT_RULE = (
    "Gap: the codec's mean over seeds minus that of none, at the last evaluation. No difference is said to be seen "
    "where the gap is at most t s sqrt(1/n + 1/m): n and m are the numbers of seeds, s is their pooled standard "
    "deviation, t is the 97.5 % point of Student's distribution with n + m - 2 degrees of freedom (with 3 seeds each: "
    "2.27 s). About one comparison in 20 of codecs that are in truth equal shows a difference. No difference seen does "
    "not mean equal: the gap that these seeds would have shown is said with it."
)


@dataclass(frozen=True)
class Gap:
    """Mean minus the baseline's mean.

    Args:
        value: the gap.
        least: the least gap that is a difference; None where nothing says how much chance does: one seed each, or
            seeds that all end alike.
    """

    value: float
    least: float | None

    @property
    def seen(self) -> bool:
        """Whether the gap is larger than chance between seeds explains."""
        return self.least is not None and abs(self.value) > self.least


def gap(values: Sequence[float], base: Sequence[float]) -> Gap:
    """Gap between two sets of final results, one number per seed.

    >>> gap([0.96, 0.97, 0.98], [0.97, 0.98, 0.99]).seen
    False
    """
    difference = statistics.fmean(values) - statistics.fmean(base)
    freedom = len(values) + len(base) - 2
    if freedom < 1:
        return Gap(difference, None)
    square = sum(statistics.variance(side) * (len(side) - 1) for side in (values, base) if len(side) > 1) / freedom
    if square == 0:
        return Gap(difference, None)
    student = _T[min(freedom, len(_T)) - 1]
    return Gap(difference, student * math.sqrt(square * (1 / len(values) + 1 / len(base))))


def verdict(panel: Panel, curve: Curve) -> str:
    """A codec against none, in words: by accuracy where there is one, and by loss where that differs."""
    base, field = panel.baseline, panel.field
    diverged = [run for run in curve.seeds if not _is_finite(run.history[-1][field])]
    if diverged:
        return f"{len(diverged)} of {len(curve.seeds)} seeds diverged: {_words(field)} at the end is not a number"
    if base is None:
        return "no run of none to compare with"
    if curve is base:
        return "the baseline"
    if base.final(field) is None:
        return "none diverged: nothing to compare with"
    text = _compared(field, _ends(curve, field), _ends(base, field))
    losses = _ends(curve, "test_loss"), _ends(base, "test_loss")
    if field == "test_accuracy" and all(map(_is_finite, losses[0] + losses[1])) and gap(*losses).seen:
        text += f"; {_compared('test_loss', *losses)}"
    return text


def _ends(curve: Curve, field: Field) -> list[float]:
    return [run.history[-1][field] for run in curve.seeds]


def _compared(field: Field, values: list[float], base: list[float]) -> str:
    found = gap(values, base)
    way = f"{_size(field, found.value)} {'higher' if found.value > 0 else 'lower'}"
    if abs(found.value) < 1e-12:
        way = "the same mean"
    if found.least is None:
        few = len(values) + len(base) < 3
        return f"{way}, but {'one seed each' if few else 'seeds all end alike'}: how much is chance is not known"
    if found.seen:
        return way
    return f"no difference seen ({way}; {_size(field, found.least)} would be seen)"


def _size(field: Field, value: float) -> str:
    if field == "test_accuracy":
        points = 100 * abs(value)
        return f"{points:.1f} points" if points >= 0.1 else f"{points:.2g} points"
    return f"test loss {abs(value):.2g}"


def _words(field: Field) -> str:
    return field.replace("_", " ")


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
