"""Pictures of the report, each with the table it was drawn from. Loads matplotlib."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from terncomm.report.drawing import (
    byte_unit,
    draw_bars,
    draw_curve,
    draw_remarks,
    draw_stacks,
    handle,
    handles_of,
    log_axis,
    measure_axis,
    page,
    parts_of,
    time_unit,
)
from terncomm.report.looks import Looks, looks
from terncomm.report.plans import Plan, accumulated
from terncomm.report.training import Band, Curve, Panel, band
from terncomm.report.verdicts import Target, reach
from terncomm.report.words import MODE_TEXT, link_label
from terncomm.simulator.links import rate_text
from terncomm.simulator.plan import WORTH
from terncomm.simulator.records import PARTS, Record

Row = dict[str, Any]
Drawn = tuple[Figure, list[Row]]


def against_bytes(panel: Panel, look: Looks) -> Drawn:
    """Accuracy and loss against bytes that each rank has sent."""
    fields = _fields(panel)
    rows = []
    points = {(field, c.label): [p for p in c.points(field) if p[1].mean > 0] for field in fields for c in panel.curves}
    size, unit = byte_unit([x.mean for found in points.values() for _, x, _ in found])
    figure, grid = page(
        f"{panel.name}: {_names(fields)} against bytes sent",
        f"{MODE_TEXT[panel.mode]}; {_band_text(panel.curves)}; markers: evaluations, from the first exchange on",
        (1, len(fields)),
        3.0,
        handles_of(panel, look),
    )
    for axes, field in zip(grid[0], fields, strict=True):
        for curve in panel.curves:
            draw_curve(axes, points[field, curve.label], size, look[curve.label], field)
            rows += [
                {**_identity(panel, curve), "step": step, "measure": field}
                | {"sent_bytes_per_rank": x.mean, **_columns(field, y)}
                for step, x, y in points[field, curve.label]
            ]
        axes.set(xlabel=f"sent per rank since start ({unit}, log scale)")
        measure_axis(axes, field)
        log_axis(axes.xaxis, [x.mean / size for found in points.values() for _, x, _ in found])
    return figure, rows


def against_time(panel: Panel, look: Looks) -> Drawn:
    """Accuracy and loss against time, a row of axes per link."""
    fields = _fields(panel)
    rows = []
    figure, grid = page(
        f"{panel.name}: {_names(fields)} against time",
        f"{MODE_TEXT[panel.mode]}; {_band_text(panel.curves)}; markers: evaluations, from the first exchange on",
        (len(panel.links), len(fields)),
        2.6,
        handles_of(panel, look),
    )
    for line, link in zip(grid, panel.links, strict=True):
        curves = [curve for curve in panel.curves if curve.on(link)]
        points = {(f, c.label): [p for p in c.points(f, link) if p[1].mean > 0] for f in fields for c in curves}
        size, unit = time_unit([x.mean for found in points.values() for _, x, _ in found])
        label = link_label([run for curve in curves for run in curve.on(link)], link)
        for axes, field in zip(line, fields, strict=True):
            for curve in curves:
                draw_curve(axes, points[field, curve.label], size, look[curve.label], field)
                rows += [
                    {**_identity(panel, curve), "link": link, "time_is": _time_is(panel), "step": step}
                    | {"measure": field, "seconds": x.mean, **_columns(field, y)}
                    for step, x, y in points[field, curve.label]
                ]
            axes.set(xlabel=f"{'real' if panel.mode == 'cluster' else 'predicted'} time ({unit}, log scale)")
            measure_axis(axes, field)
            log_axis(axes.xaxis, [x.mean / size for found in points.values() for _, x, _ in found])
        line[0].set_title(label, fontweight="bold")
    return figure, rows


def to_target(panel: Panel, target: Target, look: Looks) -> Drawn:
    """Bytes, and time on each link, at the first evaluation that reaches the target."""
    rows = []
    labels = [curve.label for curve in panel.curves]
    figure, grid = page(
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
        size, unit = byte_unit(means) if link is None else time_unit(means)
        for curve in curves:
            each = found[curve.label]
            rows.append(
                {**_identity(panel, curve), "measure": target.field, "target": target.value}
                | {"quantity": "sent_bytes_per_rank" if link is None else "seconds", "link": link or ""}
                | {"time_is": "" if link is None else _time_is(panel), **_columns("value", each.band)}
                | {"reached": each.reached, "runs": each.count}
            )
        draw_bars(axes, {label: (one.band, one.text) for label, one in found.items()}, size, look)
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
    figure = draw_stacks(f"{panels[0].data}: where the time of a step goes", "simulate", links, columns, short, cells)
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
    return draw_stacks(f"{plan.name}: where the time of a step goes", "plan", links, columns, columns, cells), rows


def break_evens(plan: Plan, look: Looks) -> Drawn:
    """Time of a step and gain over none against the rate of a link, a row of axes per number of workers.

    Where a codec stops (or starts) to pay is marked and named. Up to four numbers of workers; the table has them all.
    """
    shown = pick(plan.workers, 4)
    labels = list(plan.codecs)
    compared = "none" in labels
    figure, grid = page(
        f"{plan.name}: time of a step against the rate of each worker's link",
        f"{MODE_TEXT['plan']}; ring: where a codec stops (or starts) to pay: steps {WORTH:.2f} times as fast as "
        "none's, on straight lines between the points",
        (len(shown), 2 if compared else 1),
        2.2,
        [handle(label, look) for label in labels],
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
    size, unit = time_unit([math.sqrt(min(r["batch_s"] for r in rows) * max(r["batch_s"] for r in rows))])
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
                line[1].plot(crossings, [WORTH] * len(crossings), **ring, color=look[label].color, markeredgewidth=1.5)
                if label != "none" and found.pays:
                    remarks.append((f"{label} {found.text}", look[label].color))
        line[0].set_title(f"W = {workers}", fontweight="bold")
        line[0].set_ylabel(f"step time ({unit}, log scale)")
        log_axis(line[0].yaxis, [row["batch_s"] / size for row in rows])
        if compared:
            line[1].set_title("times faster than none", fontweight="bold")
            line[1].set_ylabel("times faster (log scale)")
            log_axis(line[1].yaxis, gains, headroom=0.08 * len(remarks))
            draw_remarks(line[1], remarks)
        for axes in line:
            axes.set_xlabel("rate of a link (Gbit/s, log scale)")
            log_axis(axes.xaxis, [rate / 1e9 for rate in plan.rates])
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
    figure, grid = page(
        f"{plan.name}: throughput against workers",
        MODE_TEXT["plan"],
        (len(shown), 2),
        2.1,
        [
            *(handle(label, look) for label in labels),
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
            log_axis(axes.xaxis, plan.workers, at=plan.workers)
        line[1].set_ylim(
            0, 1.06 * max(s / w for w, s in [*free.items(), *((r["workers"], r["samples_per_s"]) for r in rows)])
        )
        log_axis(line[0].yaxis, [*(row["samples_per_s"] for row in rows), *free.values()])
    return figure, rows


def cluster_seconds(panels: Sequence[Panel]) -> Drawn:
    """Real seconds of whole runs, axes per panel (of `panels(..., whole_runs=True)`) and link."""
    look = looks(panels)
    cells = [(panel, link) for panel in panels for link in panel.links]
    figure, grid = page(
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
        size, unit = time_unit([each.mean for each in bands.values() if each])
        draw_bars(axes, {label: (each, "") for label, each in bands.items()}, size, look)
        label = link_label([run for curve in curves for run in curve.on(link)], link)
        axes.set_title(f"{panel.name}\n{label}", fontweight="bold")
        axes.set_xlabel(f"real time ({unit})")
        rows += [
            {**_identity(panel, curve), "link": link, "runs": len(curve.on(link))}
            | _columns("seconds", bands[curve.label])
            for curve in curves
        ]
    return figure, rows


def pick(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, first and last among them, evenly between.

    >>> pick([1, 2, 3, 4, 5], 3)
    [1, 3, 5]
    """
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


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
