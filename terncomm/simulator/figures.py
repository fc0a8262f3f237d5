"""Pictures of the report, each with the table it was drawn from. Only what draws imports this: it loads matplotlib."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from terncomm.simulator.records import PARTS, Record
from terncomm.simulator.summary import (
    MODE_TEXT,
    Band,
    Curve,
    Panel,
    Plan,
    Target,
    accumulated,
    band,
    codec_order,
    link_label,
    parts_of,
    pick,
    rate_text,
    reach,
)

Row = dict[str, Any]
Drawn = tuple[Figure, list[Row]]
# Okabe and Ito's colours, told apart by colour-blind readers; the marker says it again.
_KNOWN = {
    "none": ("black", "o"),
    "fp16": ("#E69F00", "s"),
    "int8": ("#0072B2", "^"),
    "terngrad": ("#D55E00", "D"),
    "terngrad-noclip": ("#CC79A7", "v"),
}
_OTHERS = (("#009E73", "P"), ("#56B4E9", "X"), ("#666666", "*"), ("#8C6D1F", "h"))
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
_PART_STYLE = {
    "compute_s": ("compute", "#B5B5B5", ""),
    "encode_s": ("encode", "#56B4E9", "...."),
    "exchange_s": ("exchange", "#E8B54A", "////"),
    "decode_s": ("decode", "#009E73", "xxxx"),
}
_RC: Any = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "text.parse_math": False,
    "svg.hashsalt": "terncomm",
    "figure.dpi": 100.0,
}
_WIDTH = 7.6  # inches of every picture: they stand under each other in the report


def style() -> Any:
    """Context in which the pictures are drawn and saved: fonts, grids, and no mathematics in text."""
    return mpl.rc_context(_RC)


@dataclass(frozen=True)
class Look:
    """Colour and marker say the codec; dashes and a hollow marker say that it is a variant of it."""

    color: str
    marker: str
    variant: int

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of `Axes.plot`."""
        return {
            "color": self.color,
            "marker": self.marker,
            "linestyle": _DASHES[self.variant % len(_DASHES)],
            "markerfacecolor": "white" if self.variant else self.color,
            "markersize": 4.5,
            "linewidth": 1.4,
        }

    @property
    def bar(self) -> dict[str, Any]:
        """Arguments of `Axes.barh`."""
        hatch = ("", "///", "...", "\\\\\\")[self.variant % 4]
        return {"color": "white" if self.variant else self.color, "edgecolor": self.color, "hatch": hatch}


Looks = dict[str, Look]


def looks(panels: Iterable[Panel], plans: Iterable[Plan] = ()) -> Looks:
    """One look per label, the same in every picture of a report."""
    labels = {curve.label: (codec_order(curve.codec), curve.accumulate) for p in panels for curve in p.curves}
    for plan in plans:
        for label, codec in plan.codecs.items():
            labels.setdefault(label, (codec_order(codec), 1))
    found: Looks = {}
    variants: dict[str, int] = {}
    others: list[str] = []
    for label, ((_, codec), _) in sorted(labels.items(), key=lambda item: (item[1], item[0])):
        if codec not in _KNOWN and codec not in others:
            others.append(codec)
        color, marker = _KNOWN.get(codec) or _OTHERS[others.index(codec) % len(_OTHERS)]
        found[label] = Look(color, marker, variants.get(codec, 0))
        variants[codec] = variants.get(codec, 0) + 1
    return found


# Training runs


def against_bytes(panel: Panel, look: Looks) -> Drawn:
    """Accuracy and loss against bytes that each rank has sent."""
    fields = _fields(panel)
    rows = []
    points = {(field, c.label): [p for p in c.points(field) if p[1].mean > 0] for field in fields for c in panel.curves}
    size, unit = _byte_unit([x.mean for found in points.values() for _, x, _ in found])
    figure, grid = _page(
        f"{panel.name}: {_names(fields)} against bytes sent",
        f"{MODE_TEXT[panel.mode]}; {_band_text(panel.curves)}; markers: evaluations, from the first exchange on",
        (1, len(fields)),
        3.0,
        _handles(panel, look),
    )
    for axes, field in zip(grid[0], fields, strict=True):
        for curve in panel.curves:
            _curve(axes, points[field, curve.label], size, look[curve.label], field)
            rows += [
                {**_identity(panel, curve), "step": step, "measure": field}
                | {"sent_bytes_per_rank": x.mean, **_columns(field, y)}
                for step, x, y in points[field, curve.label]
            ]
        axes.set(xlabel=f"sent per rank since start ({unit}, log scale)")
        _measure_axis(axes, field)
        _log_axis(axes.xaxis, [x.mean / size for found in points.values() for _, x, _ in found])
    return figure, rows


def against_time(panel: Panel, look: Looks) -> Drawn:
    """Accuracy and loss against time, a row of axes per link."""
    fields = _fields(panel)
    rows = []
    figure, grid = _page(
        f"{panel.name}: {_names(fields)} against time",
        f"{MODE_TEXT[panel.mode]}; {_band_text(panel.curves)}; markers: evaluations, from the first exchange on",
        (len(panel.links), len(fields)),
        2.6,
        _handles(panel, look),
    )
    for line, link in zip(grid, panel.links, strict=True):
        curves = [curve for curve in panel.curves if curve.on(link)]
        points = {(f, c.label): [p for p in c.points(f, link) if p[1].mean > 0] for f in fields for c in curves}
        size, unit = _time_unit([x.mean for found in points.values() for _, x, _ in found])
        label = link_label([run for curve in curves for run in curve.on(link)], link)
        for axes, field in zip(line, fields, strict=True):
            for curve in curves:
                _curve(axes, points[field, curve.label], size, look[curve.label], field)
                rows += [
                    {**_identity(panel, curve), "link": link, "time_is": _time_is(panel), "step": step}
                    | {"measure": field, "seconds": x.mean, **_columns(field, y)}
                    for step, x, y in points[field, curve.label]
                ]
            axes.set(xlabel=f"{'real' if panel.mode == 'cluster' else 'predicted'} time ({unit}, log scale)")
            _measure_axis(axes, field)
            _log_axis(axes.xaxis, [x.mean / size for found in points.values() for _, x, _ in found])
        line[0].set_title(label, fontweight="bold")
    return figure, rows


def to_target(panel: Panel, target: Target, look: Looks) -> Drawn:
    """Bytes, and time on each link, at the first evaluation that reaches the target."""
    rows = []
    labels = [curve.label for curve in panel.curves]
    figure, grid = _page(
        f"{panel.name}: what {target.text} takes",
        f"{MODE_TEXT[panel.mode]}; target: {target.why}; first evaluation that reaches it, not interpolated; "
        "bar: mean over the seeds that reach it; line: lowest to highest",
        (1 + len(panel.links), 1),
        0.55 + 0.21 * len(labels),
        [],
    )
    for (axes,), link in zip(grid, [None, *panel.links], strict=True):
        curves = [curve for curve in panel.curves if link is None or curve.on(link)]
        found = {curve.label: reach(curve, target, link) for curve in curves}
        means = [each.band.mean for each in found.values() if each.band]
        size, unit = _byte_unit(means) if link is None else _time_unit(means)
        for curve in curves:
            each = found[curve.label]
            rows.append(
                {**_identity(panel, curve), "measure": target.field, "target": target.value}
                | {"quantity": "sent_bytes_per_rank" if link is None else "seconds", "link": link or ""}
                | {"time_is": "" if link is None else _time_is(panel), **_columns("value", each.band)}
                | {"reached": each.reached, "runs": each.count}
            )
        _bars(axes, {label: (one.band, one.text) for label, one in found.items()}, size, look)
        if link is None:
            axes.set_title("bytes counted" if panel.mode == "simulate" else "bytes", fontweight="bold")
            axes.set_xlabel(f"sent per rank ({unit})")
        else:
            axes.set_title(link_label([run for c in curves for run in c.on(link)], link), fontweight="bold")
            axes.set_xlabel(f"{'real' if panel.mode == 'cluster' else 'predicted'} time ({unit})")
    return figure, rows


def step_parts(panels: Sequence[Panel]) -> Drawn:
    """Predicted time of a batch by parts: a row of axes per link, a column per panel (of one data set)."""
    cells: dict[tuple[str, str], dict[str, tuple[Record, int]]] = {}
    rows = []
    links = list(dict.fromkeys(link for panel in panels for link in panel.links))
    for panel in panels:
        for curve in panel.curves:
            for link in links:
                entries = [e for run in curve.seeds for e in run.record["links"] if e["link"] == link]
                if entries:
                    mean = {part: math.fsum(e[part] for e in entries) / len(entries) for part in (*PARTS, "step_s")}
                    cells.setdefault((link, panel.name), {})[curve.label] = mean, curve.accumulate
                    rows.append({**_identity(panel, curve), "link": link, **_batch(mean, curve.accumulate)})
    names = [panel.name for panel in panels]
    columns = pick(names, 3)
    short = [name.removeprefix(f"{panels[0].data}, ") for name in columns]
    figure = _stacks(f"{panels[0].data}: where the time of a step goes", "simulate", links, columns, short, cells)
    return figure, rows


def plan_parts(plan: Plan) -> Drawn:
    """Predicted time of a batch by parts, at up to four rates and three numbers of workers; the table has them all."""
    cells: dict[tuple[str, str], dict[str, tuple[Record, int]]] = {}
    rows = []
    for (workers, label, rate), record in sorted(plan.points.items(), key=lambda item: _plan_order(plan, item[0])):
        cell = cells.setdefault((rate_text(rate), f"W = {workers}"), {})
        cell[label] = record, accumulated(record)
        rows.append({**_plan_identity(plan, workers, label, rate), **_batch(record, accumulated(record))})
    links = [rate_text(rate) for rate in pick(plan.rates, 4)]
    columns = [f"W = {workers}" for workers in pick(plan.workers, 3)]
    return _stacks(f"{plan.name}: where the time of a step goes", "plan", links, columns, columns, cells), rows


def break_evens(plan: Plan, look: Looks) -> Drawn:
    """Time of a step and gain over none against the rate of a link, a row of axes per number of workers.

    Where a codec stops (or starts) to pay is marked and named. Up to four numbers of workers; the table has them all.
    """
    shown = pick(plan.workers, 4)
    labels = list(plan.codecs)
    compared = "none" in labels
    figure, grid = _page(
        f"{plan.name}: time of a step against the rate of each worker's link",
        f"{MODE_TEXT['plan']}; ring: where a codec stops (or starts) to pay against none, on straight lines between "
        "the points",
        (len(shown), 2 if compared else 1),
        2.2,
        [_handle(label, look) for label in labels],
    )
    rows = []
    for workers in plan.workers:
        for label in labels:
            found = plan.break_even(workers, label)
            points = [(rate, seconds, "") for rate, seconds in plan.batch_s(workers, label).items()]
            points += [(*crossing, "stops to pay") for crossing in found.stops]
            points += [(*crossing, "starts to pay") for crossing in found.starts]
            rows += [
                _plan_identity(plan, workers, label, rate) | {"batch_s": seconds, "crossing": crossing}
                for rate, seconds, crossing in sorted(points)
            ]
    size, unit = _time_unit([math.sqrt(min(r["batch_s"] for r in rows) * max(r["batch_s"] for r in rows))])
    for line, workers in zip(grid, shown, strict=True):
        base = plan.batch_s(workers, "none")
        remarks: list[tuple[str, str]] = []
        gains = [1.0]
        for label in labels:
            found = plan.break_even(workers, label)
            points_s = plan.batch_s(workers, label)
            line[0].plot([r / 1e9 for r in points_s], [s / size for s in points_s.values()], **look[label].line)
            if compared:
                gain = {rate: base[rate] / s for rate, s in points_s.items() if rate in base}
                gains += gain.values()
                crossings = [rate / 1e9 for rate, _ in (*found.stops, *found.starts)]
                ring: dict[str, Any] = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "linestyle": "none"}
                line[1].plot([rate / 1e9 for rate in gain], list(gain.values()), **look[label].line)
                line[1].plot(crossings, [1.0] * len(crossings), **ring, color=look[label].color, markeredgewidth=1.5)
                if label != "none" and found.pays:
                    remarks.append((f"{label} {found.text}", look[label].color))
        line[0].set_title(f"W = {workers}", fontweight="bold")
        line[0].set_ylabel(f"step time ({unit}, log scale)")
        _log_axis(line[0].yaxis, [row["batch_s"] / size for row in rows])
        if compared:
            line[1].set_title("times faster than none", fontweight="bold")
            line[1].set_ylabel("times faster (log scale)")
            _log_axis(line[1].yaxis, gains, headroom=0.08 * len(remarks))
            _remarks(line[1], remarks)
        for axes in line:
            axes.set_xlabel("rate of a link (Gbit/s, log scale)")
            _log_axis(axes.xaxis, [rate / 1e9 for rate in plan.rates])
    return figure, rows


def throughput(plan: Plan, look: Looks) -> Drawn:
    """Samples per second against workers, of all and of each, a row of axes per rate.

    Up to four rates; the table has them all.
    """
    shown = pick(plan.rates, 4)
    labels = list(plan.codecs)
    rows = [
        _plan_identity(plan, workers, label, rate) | {"samples_per_s": record["samples_per_s"]}
        for (workers, label, rate), record in sorted(plan.points.items(), key=lambda item: _plan_order(plan, item[0]))
    ]
    # What the first codec would do if nothing but its computing took time.
    free = {
        w: record["samples_per_s"] * record["step_s"] / record["compute_s"]
        for (w, label, _), record in sorted(plan.points.items())
        if label == labels[0] and record["compute_s"]
    }
    figure, grid = _page(
        f"{plan.name}: throughput against workers",
        MODE_TEXT["plan"],
        (len(shown), 2),
        2.1,
        [
            *(_handle(label, look) for label in labels),
            Line2D([], [], color="0.6", linewidth=1.2, label="computing alone"),
        ],
    )
    for line, rate in zip(grid, shown, strict=True):
        for axes, each in zip(line, (False, True), strict=True):
            axes.plot(list(free), [s / w if each else s for w, s in free.items()], color="0.6", linewidth=1.2, zorder=1)
            for label in labels:
                points = {
                    w: r["samples_per_s"] for (w, l_, at), r in sorted(plan.points.items()) if (l_, at) == (label, rate)
                }
                axes.plot(list(points), [s / w if each else s for w, s in points.items()], **look[label].line)
            axes.set_title("per worker" if each else f"{rate_text(rate)}: all workers", fontweight="bold")
            axes.set(xlabel="workers (log scale)", ylabel="samples/s per worker" if each else "samples/s (log scale)")
            _log_axis(axes.xaxis, plan.workers, at=plan.workers)
        line[1].set_ylim(
            0, 1.06 * max(s / w for w, s in [*free.items(), *((r["workers"], r["samples_per_s"]) for r in rows)])
        )
        _log_axis(line[0].yaxis, [*(row["samples_per_s"] for row in rows), *free.values()])
    return figure, rows


def cluster_seconds(panels: Sequence[Panel]) -> Drawn:
    """Real seconds of whole runs, axes per panel (of `panels(..., whole_runs=True)`) and link."""
    look = looks(panels)
    cells = [(panel, link) for panel in panels for link in panel.links]
    figure, grid = _page(
        "Seconds of whole runs, from start to end",
        f"{MODE_TEXT['cluster']}; bar: mean over runs; line: lowest to highest",
        (len(cells), 1),
        0.75 + 0.21 * max(len(panel.curves) for panel in panels),
        [],
    )
    rows = []
    for (axes,), (panel, link) in zip(grid, cells, strict=True):
        curves = [curve for curve in panel.curves if curve.on(link)]
        bands = {curve.label: band(run.record["seconds"] for run in curve.on(link)) for curve in curves}
        size, unit = _time_unit([each.mean for each in bands.values() if each])
        _bars(axes, {label: (each, "") for label, each in bands.items()}, size, look)
        label = link_label([run for curve in curves for run in curve.on(link)], link)
        axes.set_title(f"{panel.name}\n{label}", fontweight="bold")
        axes.set_xlabel(f"real time ({unit})")
        rows += [
            {**_identity(panel, curve), "link": link, "runs": len(curve.on(link))}
            | _columns("seconds", bands[curve.label])
            for curve in curves
        ]
    return figure, rows


# Pieces


def _page(
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


def _handle(label: str, look: Looks) -> Line2D:
    return Line2D([], [], label=label, **look[label].line)


def _handles(panel: Panel, look: Looks) -> list[Line2D]:
    """A line per curve, with what it ends with."""
    found = []
    for curve in panel.curves:
        final = curve.final(panel.field)
        end = "diverged" if final is None else f"{final.mean:.3f}"
        if final is not None and panel.has_accuracy:
            end = f"{100 * final.mean:.1f} %"
        found.append(Line2D([], [], **{**look[curve.label].line, "label": f"{curve.label} ({end})"}))
    return found


def _curve(axes: Axes, points: list[tuple[int, Band, Band]], size: float, look: Look, field: str) -> None:
    by = 100 if field == "test_accuracy" else 1
    xs = [x.mean / size for _, x, _ in points]
    lows, highs = [by * y.low for _, _, y in points], [by * y.high for _, _, y in points]
    axes.fill_between(xs, lows, highs, color=look.color, alpha=0.15, linewidth=0)
    axes.plot(xs, [by * y.mean for _, _, y in points], **look.line)


def _bars(axes: Axes, found: dict[str, tuple[Band | None, str]], size: float, look: Looks) -> None:
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


def _stacks(
    title: str,
    mode: str,
    links: Sequence[str],
    columns: Sequence[str],
    names: Sequence[str],
    cells: dict[tuple[str, str], dict[str, tuple[Record, int]]],
) -> Figure:
    labels = list(dict.fromkeys(label for cell in cells.values() for label in cell))
    every = [accumulate for cell in cells.values() for _, accumulate in cell.values()]
    remark = "; step every k: the time of k batches and one exchange, divided by k" if max(every) > 1 else ""
    handles = [Patch(facecolor=c, hatch=h, edgecolor="0.35", label=t, lw=0.4) for t, c, h in _PART_STYLE.values()]
    figure, grid = _page(
        title,
        f"{MODE_TEXT[mode]}; encode, exchange, decode: what computing does not hide{remark}; one scale per row",
        (len(links), len(columns)),
        0.6 + 0.2 * len(labels),
        handles,
    )
    for line, link in zip(grid, links, strict=True):
        steps = [e["step_s"] / k for column in columns for e, k in cells.get((link, column), {}).values()]
        size, unit = _time_unit(steps)
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


def _remarks(axes: Axes, remarks: Sequence[tuple[str, str]]) -> None:
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


def _measure_axis(axes: Axes, field: str) -> None:
    """Loss on a log scale where it falls far; accuracy on a log scale of errors where it comes close to 100 %."""
    axes.set_ylabel("test accuracy (%)" if field == "test_accuracy" else "test loss")
    low, high = axes.dataLim.intervaly
    if field == "test_loss" and low > 0 and high > 8 * low:
        axes.set_ylabel("test loss (log scale)")
        _log_axis(axes.yaxis, [low, high])
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


def _log_axis(axis: Axis, values: Sequence[float], at: Sequence[float] = (), headroom: float = 0.0) -> None:
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


def _byte_unit(values: Sequence[float]) -> tuple[float, str]:
    return _unit(values, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes")))


def _time_unit(values: Sequence[float]) -> tuple[float, str]:
    return _unit(values, ((3 * 86400, "days"), (3 * 3600, "h"), (180, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs")))


def _fields(panel: Panel) -> list[Any]:
    return ["test_accuracy", "test_loss"] if panel.has_accuracy else ["test_loss"]


def _names(fields: Sequence[str]) -> str:
    return " and ".join(field.replace("_", " ") for field in fields)


def _band_text(curves: Sequence[Curve]) -> str:
    counts = sorted({len(curve.seeds) for curve in curves})
    if counts == [1]:
        return "one seed each"
    return (
        f"line: mean, band: lowest to highest of {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds"
    )


def _time_is(panel: Panel) -> str:
    return "measured" if panel.mode == "cluster" else "predicted"


def _columns(name: str, each: Band | None) -> Row:
    return {
        f"{name}_mean": each.mean if each else None,
        f"{name}_low": each.low if each else None,
        f"{name}_high": each.high if each else None,
    }


def _identity(panel: Panel, curve: Curve) -> Row:
    return {
        "mode": panel.mode,
        "data": panel.data,
        "workers": panel.workers,
        "conditions": ", ".join(f"{key} {value}" for key, value in panel.conditions),
        "codec": curve.label,
        "seeds": len(curve.seeds),
    }


def _plan_identity(plan: Plan, workers: int, label: str, rate: float) -> Row:
    return {"mode": "plan", "plan": plan.name, "workers": workers, "codec": label, "bits_per_s": rate}


def _plan_order(plan: Plan, key: tuple[int, str, float]) -> tuple[int, float, int]:
    return key[0], key[2], list(plan.codecs).index(key[1])


def _batch(entry: Record, accumulate: int) -> Row:
    return {"steps_per_exchange": accumulate, "batch_s": entry["step_s"] / accumulate, **parts_of(entry, accumulate)}
