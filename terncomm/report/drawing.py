"""What pictures are made of: a page, axes with plain numbers, bars, stacks. Loads matplotlib."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from terncomm.report.looks import Look, Looks
from terncomm.report.training import Band, Panel
from terncomm.report.words import MODE_TEXT
from terncomm.simulator.records import PARTS, Record

_PART_STYLE = {
    "compute_s": ("compute", "#B5B5B5", ""),
    "encode_s": ("encode", "#56B4E9", "...."),
    "exchange_s": ("exchange", "#E8B54A", "////"),
    "decode_s": ("decode", "#009E73", "xxxx"),
}
_WIDTH = 7.6  # inches of every picture: they stand under each other in the report


def page(
    title: str, remark: str, shape: tuple[int, int], height: float, handles: Sequence[Line2D | Patch]
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a title, the mode and what else must be said above, and a legend below its axes.

    Args:
        shape: rows and columns of axes.
        height: of a row, in inches.
    """
    title = textwrap.fill(title, 84)
    remark = textwrap.fill(remark, 122)
    columns = max(1, int((_WIDTH - 0.2) // (0.6 + 0.066 * max((len(str(h.get_label())) for h in handles), default=1))))
    lines = math.ceil(len(handles) / columns)
    top = 0.12 + 0.19 * (1 + title.count("\n")) + 0.15 * (1 + remark.count("\n")) + 0.08
    bottom = 0.19 * lines + 0.14 if handles else 0.04
    total = top + shape[0] * height + bottom
    figure = Figure(figsize=(_WIDTH, total))
    area = (0.01, bottom / total, 0.98, 1 - (top + bottom) / total)
    figure.set_layout_engine("constrained", rect=area, h_pad=0.06, w_pad=0.06)
    grid = figure.subplots(*shape, squeeze=False)
    left = 0.1 / _WIDTH
    figure.text(left, 1 - 0.1 / total, title, va="top", fontsize=11, fontweight="bold", linespacing=1.2)
    below = 0.12 + 0.19 * (1 + title.count("\n"))
    figure.text(left, 1 - below / total, remark, va="top", fontsize=8, color="0.3", linespacing=1.2)
    if handles:
        legend = figure.legend(
            handles=list(handles),
            loc="lower center",
            bbox_to_anchor=(0.5, 0.02 / total),
            ncols=min(columns, len(handles)),
            frameon=False,
            borderpad=0.2,
            handlelength=2.6,
            columnspacing=1.4,
        )
        legend.set_in_layout(False)
    return figure, [list(line) for line in grid]


def handle(label: str, look: Looks) -> Line2D:
    """A line of a legend."""
    return Line2D([], [], label=label, **look[label].line)


def handles_of(panel: Panel, look: Looks) -> list[Line2D]:
    """A line per curve, with what it ends with."""
    found = []
    for curve in panel.curves:
        final = curve.final(panel.field)
        end = "diverged" if final is None else f"{final.mean:.3f}"
        if final is not None and panel.has_accuracy:
            end = f"{100 * final.mean:.1f} %"
        found.append(Line2D([], [], **{**look[curve.label].line, "label": f"{curve.label} ({end})"}))
    return found


def draw_curve(axes: Axes, points: list[tuple[int, Band, Band]], size: float, look: Look, field: str) -> None:
    """The mean, with a band from the lowest to the highest."""
    by = 100 if field == "test_accuracy" else 1
    xs = [x.mean / size for _, x, _ in points]
    lows, highs = [by * y.low for _, _, y in points], [by * y.high for _, _, y in points]
    axes.fill_between(xs, lows, highs, color=look.color, alpha=0.15, linewidth=0)
    axes.plot(xs, [by * y.mean for _, _, y in points], **look.line)


def draw_bars(axes: Axes, found: dict[str, tuple[Band | None, str]], size: float, look: Looks) -> None:
    """Bars per label with the range over seeds, the value beside it; a remark where there is no value."""
    top = max((each.high for each, _ in found.values() if each), default=0.0) / size or 1.0
    for number, (label, (each, remark)) in enumerate(found.items()):
        value = 0.0
        if each:
            value = each.high / size
            mean = each.mean / size
            axes.barh(number, mean, height=0.66, **look[label].bar)
            error = [[max(mean - each.low / size, 0.0)], [max(value - mean, 0.0)]]
            if each.count > 1:
                halo = [withStroke(linewidth=3.2, foreground="white")]
                axes.errorbar(mean, number, xerr=error, ecolor="0.2", elinewidth=1.4, path_effects=halo)
            remark = f"{_digits(mean)}{f'  ({remark})' if remark else ''}"
        axes.annotate(remark, (value, number), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.4, -0.6)
    wide = max(len(remark) for _, remark in found.values() if remark) if any(r for _, r in found.values()) else 0
    axes.set_xlim(0, (1.15 + 0.012 * wide) * top)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def draw_stacks(
    title: str,
    mode: str,
    links: Sequence[str],
    columns: Sequence[str],
    names: Sequence[str],
    cells: dict[tuple[str, str], dict[str, tuple[Record, int]]],
) -> Figure:
    """Bars of what a step is made of: axes for each link and column, a bar for each label in `cells`."""
    labels = list(dict.fromkeys(label for cell in cells.values() for label in cell))
    every = [accumulate for cell in cells.values() for _, accumulate in cell.values()]
    remark = "; step every k: the time of k batches and one exchange, divided by k" if max(every) > 1 else ""
    handles = [Patch(facecolor=c, hatch=h, edgecolor="0.35", label=t, lw=0.4) for t, c, h in _PART_STYLE.values()]
    figure, grid = page(
        title,
        f"{MODE_TEXT[mode]}; encode, exchange, decode: what computing does not hide{remark}; one scale per row",
        (len(links), len(columns)),
        0.6 + 0.2 * len(labels),
        handles,
    )
    for line, link in zip(grid, links, strict=True):
        steps = [e["step_s"] / k for column in columns for e, k in cells.get((link, column), {}).values()]
        size, unit = time_unit(steps)
        for place, (axes, column, name) in enumerate(zip(line, columns, names, strict=True)):
            cell = cells.get((link, column), {})
            for number, label in enumerate(labels):
                if label in cell:
                    start = 0.0
                    for part, seconds in parts_of(*cell[label]).items():
                        _, color, hatch = _PART_STYLE[part]
                        style: dict[str, Any] = {"color": color, "hatch": hatch, "edgecolor": "0.35", "linewidth": 0.4}
                        axes.barh(number, seconds / size, left=start / size, height=0.7, **style)
                        start += seconds
                    text = _digits(start / size)
                    axes.annotate(
                        text, (start / size, number), (3, 0), textcoords="offset points", va="center", fontsize=7.5
                    )
            axes.set_yticks(range(len(labels)), labels if place == 0 else [""] * len(labels))
            axes.set_ylim(len(labels) - 0.4, -0.6)
            axes.set_xlim(0, 1.22 * max(steps) / size)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
            axes.set_title(f"{link}: {name}" if place == 0 else name, fontweight="bold")
            axes.set_xlabel(f"predicted time of a step ({unit})")
    return figure


def draw_remarks(axes: Axes, remarks: Sequence[tuple[str, str]]) -> None:
    """Lines in the upper right corner: curves of time fall to the right and leave it free."""
    for number, (text, color) in enumerate(remarks):
        axes.annotate(
            text,
            (1, 1),
            (0, -10 * number),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=7.5,
            color=color,
            fontweight="bold",
        )


def measure_axis(axes: Axes, field: str) -> None:
    """Loss on a log scale where it falls far; accuracy on a log scale of errors where it comes close to 100 %."""
    axes.set_ylabel("test accuracy (%)" if field == "test_accuracy" else "test loss")
    low, high = axes.dataLim.intervaly
    if field == "test_loss" and low > 0 and high > 8 * low:
        axes.set_ylabel("test loss (log scale)")
        log_axis(axes.yaxis, [low, high])
    elif field == "test_accuracy" and high > 90 and (100 - low) > 4 * (100 - high):
        axes.set_ylabel("test accuracy (%)\nlog scale of errors")
        axes.set_yscale("function", functions=(_errors, _accuracy))
        axes.set_ylim(low - 0.05 * (100 - low), high + 0.15 * (100 - high))
        axes.yaxis.set_major_locator(FixedLocator([0, 25, 50, 70, 80, 90, 95, 97, 98, 99, 99.5, 99.8]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
        axes.yaxis.set_minor_locator(NullLocator())


def _errors(accuracy: Any) -> Any:
    return -np.log10(np.maximum(100.05 - accuracy, 0.01))  # 100 % has a place too


def _accuracy(errors: Any) -> Any:
    return 100.05 - 10.0 ** (-errors)


def log_axis(axis: Axis, values: Sequence[float], at: Sequence[float] = (), headroom: float = 0.0) -> None:
    """A log scale with plain numbers at its ticks: 1, 2, 5 and their powers of ten, closer where the range is small.

    Args:
        headroom: part of the axis that stays free above the values.
    """
    if not values:
        return
    low, high = min(values), max(values)
    horizontal = isinstance(axis, XAxis)
    span = math.log10(high / low)
    margin = max(0.05 * span, 0.04)
    low, high = low / 10**margin, high * 10 ** (margin + headroom / (1 - headroom) * span)
    (axis.axes.set_xscale if horizontal else axis.axes.set_yscale)("log")
    (axis.axes.set_xlim if horizontal else axis.axes.set_ylim)(low, high)
    if span < 0.5:
        subs: tuple[float, ...] = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    elif span < 1:
        subs = (1, 2, 3, 5, 7)
    elif span < 2.2:
        subs = (1, 2, 5)
    else:
        subs = (1, 3) if span < 3 else (1,)
    ticks = [sub * 10.0**power for power in range(-9, 16) for sub in subs]
    ticks = [tick for tick in at or ticks if low <= tick <= high]
    if len(ticks) < 2:
        ticks = sorted({float(f"{value:.2g}") for value in (min(values), max(values))})
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float) -> str:
    """Three digits, never an exponent."""
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    if value and abs(value) < 1e-3:
        return f"{value:.6f}".rstrip("0")
    return f"{value:.3g}"


def _digits(value: float) -> str:
    """Three digits, zeros at the end too."""
    return _plain(value) if value >= 1000 or value < 1e-3 else f"{value:#.3g}".rstrip(".")


def _unit(values: Sequence[float], units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    top = max(values, default=0.0)
    return next(((size, unit) for size, unit in units if top >= size), units[-1])


def byte_unit(values: Sequence[float]) -> tuple[float, str]:
    """The unit in which the largest value is a plain number, in bytes, and its name."""
    return _unit(values, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes")))


def time_unit(values: Sequence[float]) -> tuple[float, str]:
    """The same of times, in seconds."""
    return _unit(values, ((3 * 86400, "days"), (3 * 3600, "h"), (180, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs")))


def parts_of(entry: Record, accumulate: int) -> dict[str, float]:
    """Seconds of each part of a step, per batch."""
    return {part: entry[part] / accumulate for part in PARTS}
