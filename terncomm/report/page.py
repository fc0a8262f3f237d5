"""The report: one HTML file that needs nothing beside it, and each picture as PNG with its numbers as CSV."""

import base64
import csv
import html
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from terncomm.report import looks, pictures
from terncomm.report.pictures import Drawn, Row
from terncomm.report.plans import Plan, plans
from terncomm.report.training import Band, Panel, band, command_options, newest, panels, script
from terncomm.report.verdicts import VERDICT_RULE, target_of, verdict
from terncomm.report.words import MODE_TEXT, link_label, mixed, provenance
from terncomm.simulator.links import rate_text
from terncomm.simulator.plan import WORTH
from terncomm.simulator.records import Record, check

_CSS = """
body { margin: 0 auto; max-width: 62rem; padding: 1rem; font: 16px/1.45 system-ui, sans-serif; color: #1a1a1a;
  background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; } p.mode { font-weight: 600; color: #444; margin: .2rem 0; }
.note { border-left: 4px solid #d55e00; background: #fdf3ec; padding: .4rem .8rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right; vertical-align: top;
  font-variant-numeric: tabular-nums; }
th { text-align: right; border-bottom: 2px solid #888; } th.left, td.left { text-align: left; }
td.text { min-width: 12rem; }
figure { margin: 1.2rem 0; } figure img { width: 100%; min-width: 34rem; max-width: 52rem; height: auto; }
figcaption { font-size: .85rem; color: #444; max-width: 46rem; } small { color: #555; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; } figure, tr, h3 { break-inside: avoid; }
  h2, h3 { break-after: avoid; } figure img { min-width: 0; max-width: 100%; max-height: 24cm; width: auto; }
  .wide { overflow: visible; } .screen { display: none; } table { font-size: 8pt; } }
"""
_LEFT = ("codec", "verdict", "run", "network", "how", "link", "provenance", "value", "option")


@dataclass(frozen=True)
class Picture:
    """One picture: `name` of its files, what it shows, and its numbers."""

    name: str
    caption: str
    figure: Figure
    rows: list[Row]


def write_report(
    records: Sequence[Record],
    out: Path,
    *,
    title: str = "terncomm: accuracy, bytes and time",
    target: float | None = None,
    target_loss: float | None = None,
) -> list[Path]:
    """Write report.html, and beside it NAME.png and NAME.csv of each picture; return the paths, the HTML first.

    Args:
        records: as `records.load` returns them; a simulated or planned experiment found twice counts once, the newest.
        out: folder, made if it is not there.
        target: test accuracy to reach, a fraction; by default 99 % of none's final mean.
        target_loss: test loss to reach, for data without accuracies; by default 101 % of none's final mean.

    Raises:
        ValueError: no records, a record that lacks something, or a target that is no fraction.
    """
    if not records:
        raise ValueError("no records to report on")
    if target is not None and not 0 < target <= 1:
        raise ValueError(f"target: wanted an accuracy above 0 and at most 1 (0.95 is 95 %), got {target}")
    for number, record in enumerate(records):
        try:
            check(record)
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from None
    kept, replaced = newest(records)
    trained, planned = panels(kept), plans(kept)
    out.mkdir(parents=True, exist_ok=True)
    body = [f"<h1>{_escape(title)}</h1>", *_header(kept, replaced)]
    written: list[Path] = []
    with looks.style():
        for mode in ("simulate", "cluster"):
            of_mode = [panel for panel in trained if panel.mode == mode]
            measured = [record for record in kept if record["mode"] == mode == "cluster"]
            if of_mode or measured:
                body += [f"<h2>{'Simulated training' if mode == 'simulate' else 'Measured runs'}</h2>", _mode(mode)]
            body += [part for panel in of_mode for part in _summary(panel)]
            if of_mode:
                body.append(f"<p><small>{_escape(VERDICT_RULE)}</small></p>")
            body += _measured(measured)
            look = looks.looks(trained, planned)
            for picture in _pictures(of_mode, measured, look, target, target_loss):
                written += _save(picture, out)
                body.append(_figure(picture, mode))
        if planned:
            body += ["<h2>Plans</h2>", _mode("plan")]
        for plan in planned:
            body += _break_even_table(plan)
            for picture in _plan_pictures(plan, looks.looks(trained, planned)):
                written += _save(picture, out)
                body.append(_figure(picture, "plan"))
    page = out / "report.html"
    page.write_text(_page(title, body), encoding="utf-8")
    return [page, *written]


def _pictures(
    trained: Sequence[Panel],
    measured: Sequence[Record],
    look: looks.Looks,
    accuracy: float | None,
    loss: float | None,
) -> Iterator[Picture]:
    for panel in trained:
        stem = ("measured" if panel.mode == "cluster" else "simulated", panel.name)
        what = "Accuracy and loss" if panel.has_accuracy else "Loss"
        name = "accuracy" if panel.has_accuracy else "loss"
        if _moves(panel, None):
            yield _picture(
                (*stem, f"{name}_vs_bytes"),
                f"{panel.name}: {what.lower()} against bytes.",
                pictures.against_bytes(panel, look),
            )
        if any(_moves(panel, link) for link in panel.links):
            yield _picture(
                (*stem, f"{name}_vs_time"),
                f"{panel.name}: {what.lower()} against time.",
                pictures.against_time(panel, look),
            )
        target = target_of(panel, accuracy, loss)
        if target:
            caption = f"{panel.name}: what {target.text} takes ({target.why})."
            yield _picture((*stem, "to_target"), caption, pictures.to_target(panel, target, look))
    for data in dict.fromkeys(panel.data for panel in trained if panel.mode == "simulate" and panel.links):
        group = [panel for panel in trained if panel.data == data and panel.links]
        caption = f"{data}: predicted time of a step by parts."
        yield _picture(("simulated", data, "step_parts"), caption, pictures.step_parts(group))
    whole = panels(measured, whole_runs=True)
    if whole:
        yield _picture(("measured", "seconds"), "Seconds of whole runs.", pictures.cluster_seconds(whole))


def _moves(panel: Panel, link: str | None) -> bool:
    """Whether bytes (or seconds on a link) go beyond zero: one worker sends nothing."""
    return any(x.mean > 0 for curve in panel.curves for _, x, _ in curve.points("test_loss", link))


def _plan_pictures(plan: Plan, look: looks.Looks) -> Iterator[Picture]:
    if len(plan.rates) > 1:
        caption = f"{plan.name}: time of a step against the rate of a link, and where codecs stop to pay."
        yield _picture(("planned", plan.name, "break_even"), caption, pictures.break_evens(plan, look))
    if len(plan.workers) > 1:
        caption = f"{plan.name}: throughput against workers."
        yield _picture(("planned", plan.name, "throughput"), caption, pictures.throughput(plan, look))
    caption = f"{plan.name}: predicted time of a step by parts."
    yield _picture(("planned", plan.name, "step_parts"), caption, pictures.plan_parts(plan))


def _picture(words: tuple[str, ...], caption: str, drawn: Drawn) -> Picture:
    name = "-".join(re.sub(r"[^a-z0-9_.]+", "-", word.lower()).strip("-.") or "x" for word in words)
    return Picture(name[:120], caption, *drawn)


def _save(picture: Picture, out: Path) -> list[Path]:
    png, table = out / f"{picture.name}.png", out / f"{picture.name}.csv"
    picture.figure.savefig(png, dpi=150)
    picture.figure.set_layout_engine("none")  # the layout is found; the drawing in the HTML keeps it
    table.write_text(_csv(picture.rows), encoding="utf-8", newline="")
    return [png, table]


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# HTML


def _page(title: str, body: Sequence[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n"
        "</body>\n</html>\n"
    )


def _header(records: Sequence[Record], replaced: int) -> list[str]:
    found = provenance(records)
    counts = {mode: sum(record["mode"] == mode for record in records) for mode in MODE_TEXT}
    lines = [
        _list([f"{count} records {_escape(MODE_TEXT[mode])}" for mode, count in counts.items() if count]),
    ]
    notes = mixed(records)
    if len([count for count in counts.values() if count]) > 1:
        notes.append("Simulated, planned and measured numbers stand in sections of their own; each picture says which.")
    if replaced:
        notes.append(f"{replaced} records were left out, as the same experiment was found again: the newest counts.")
    lines += [f'<p class="note">{_escape(note)}</p>' for note in notes]
    made = [{"provenance": name, "value": ", ".join(values)} for name, values in found.items()]
    lines += ["<h3>Made by</h3>", _table(made)]
    for mode, count in counts.items():
        if count:
            asked = _asked([record for record in records if record["mode"] == mode])
            lines += [f"<h3>What was run ({_escape(MODE_TEXT[mode].split(':')[0].split(',')[0])})</h3>", _table(asked)]
    if counts["simulate"]:
        lines.append(
            "<p><strong>How time was predicted.</strong> A simulated run counts its bytes and trains for real; time on "
            "a link is computed: the time of one optimizer step (compute, and of encode, exchange and decode what "
            "computing does not hide) times the number of exchanges up to an evaluation.</p>"
        )
    if counts["plan"]:
        lines.append(
            "<p><strong>Plans</strong> are computed in the same way for networks that were not trained: "
            "they say nothing of accuracy.</p>"
        )
    if counts["cluster"]:
        lines.append(
            "<p><strong>Measured runs</strong> are real processes on links held to a rate; "
            "a probe says what the link carried in truth.</p>"
        )
    return lines


def _asked(records: Sequence[Record]) -> list[Row]:
    """Each option with its distinct values; a cluster run's command is taken apart."""
    values: dict[str, dict[str, None]] = {}
    for record in records:
        config = dict(record["config"])
        if record["mode"] == "cluster":
            config = {"script": script(config), "ranks": config["ranks"], "link": config["link"]}
            config |= {k: v for k, v in command_options(record["config"]).items() if "/" not in v}
        if "parameters" in record:
            config["parameters"] = record["parameters"]
        for name, value in config.items():
            if value not in (None, [], ""):
                values.setdefault(name, {})[str(value)] = None
    return [{"option": name, "value": _some(list(found))} for name, found in values.items()]


def _some(values: list[str]) -> str:
    return ", ".join(values[:16]) + (f", ... ({len(values)} in all)" if len(values) > 16 else "")


def _mode(mode: str) -> str:
    return f'<p class="mode">{_escape(MODE_TEXT[mode])}</p>'


def _summary(panel: Panel) -> list[str]:
    """Heading and table of one panel: what each codec ends with, and the verdict."""
    base = panel.baseline.final("sent_bytes") if panel.baseline else None
    rows = []
    for curve in panel.curves:
        sent = curve.final("sent_bytes")
        row = {"codec": curve.label, "seeds": str(len(curve.seeds))}
        if panel.has_accuracy:
            row["accuracy % (lowest to highest)"] = _band(curve.final("test_accuracy"), 100, ".2f")
        row["test loss (lowest to highest)"] = _band(curve.final("test_loss"), 1, ".4f")
        row["MB sent per rank"] = f"{sent.mean / 1e6:,.4g}" if sent else "-"
        row["fewer bytes than none"] = f"{base.mean / sent.mean:.2f}x" if base and sent and sent.mean else "-"
        for link in panel.links:
            if panel.mode == "simulate":
                steps = [e["step_s"] / run.accumulate for run in curve.on(link) for e in _on(run.record, link)]
                row[f"ms per step, predicted, {link}"] = _band(band(steps), 1e3, ".4g", False)
            else:
                ends = [run.clocks[link][-1] for run in curve.on(link)]
                row[f"seconds, measured, {link}"] = _band(band(ends), 1, ".4g")
        rows.append({**row, "verdict": verdict(panel, curve)})
    lines = [f"<h3>{_escape(panel.name)}</h3>", _table(rows)]
    if any(curve.accumulate > 1 for curve in panel.curves) and panel.mode == "simulate":
        lines.append("<p><small>Step every k: time of an optimizer step over k batches, divided by k.</small></p>")
    if panel.unequal:
        text = f"Not all else is equal: {'. '.join(panel.unequal)}."
        lines.append(f'<p class="note">{_escape(text)}</p>')
    if panel.mode == "cluster":
        runs = [run for curve in panel.curves for run in curve.runs]
        labels = [link_label([run for run in runs if link in run.clocks], link) for link in panel.links]
        lines.append(_list([_escape(label) for label in labels]))
    return lines


def _measured(records: Sequence[Record]) -> list[str]:
    if not records:
        return []
    rows = []
    for record in records:
        config, probe = record["config"], record["probe"]
        options = command_options(config)
        sent = record.get("interface_bytes") or []
        rows.append(
            {
                "run": " ".join([script(config), *(options[key] for key in ("data", "codec") if key in options)]),
                "seed": options.get("seed", "-"),
                "ranks": str(config["ranks"]),
                "link": config["link"],
                "how": record["how"],
                "probe": rate_text(probe["bits_per_s"])
                + (f", {1e3 * probe['delay_s']:.3g} ms" if probe.get("delay_s") is not None else ""),
                "status": str(record["status"]) if record["status"] == 0 else f"{record['status']} (failed)",
                "seconds": f"{record['seconds']:.4g}",
                "MB out of a rank's interface": _band(band(sent), 1e-6, ",.4g"),
            }
        )
    failed = sum(record["status"] != 0 for record in records)
    lines = ["<h3>All measured runs</h3>", _table(rows)]
    if failed:
        lines.append(f'<p class="note">{failed} of {len(records)} runs failed and are in no picture.</p>')
    return lines


def _break_even_table(plan: Plan) -> list[str]:
    rows = []
    if "none" in plan.codecs:
        rows = [
            {"codec": label} | {f"W = {w}": plan.break_even(w, label).text for w in plan.workers}
            for label in plan.codecs
            if label != "none"
        ]
    lines = [f"<h3>{_escape(plan.name)}</h3>"]
    if rows and len(plan.rates) > 1:
        rule = (
            f"<p><small>A codec pays where it makes predicted steps {WORTH:.2f} times as fast. Between planned rates "
            f"({rate_text(plan.rates[0])} to {rate_text(plan.rates[-1])}) both are taken as straight on logarithmic "
            "axes.</small></p>"
        )
        lines += [_table(rows), rule]
    return lines


def _figure(picture: Picture, mode: str) -> str:
    drawing = io.BytesIO()
    picture.figure.savefig(drawing, format="svg", metadata={"Date": None})
    caption = f"{picture.caption} [{MODE_TEXT[mode]}]"
    return (
        '<figure>\n<div class="wide">'
        f'<img alt="{_escape(caption)}" src="{_data("image/svg+xml", drawing.getvalue())}">'
        f"</div>\n<figcaption>{_escape(caption)} "
        f'<a class="screen" download="{_escape(picture.name)}.csv" '
        f'href="{_data("text/csv", _csv(picture.rows).encode())}">Numbers as CSV</a>'
        "</figcaption>\n</figure>"
    )


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    kinds = {name: ' class="left text"' if name in ("verdict", "value") else ' class="left"' for name in _LEFT}
    head = "".join(f'<th scope="col"{kinds.get(name, "")}>{_escape(name)}</th>' for name in names)
    lines = [
        "<tr>" + "".join(f"<td{kinds.get(name, '')}>{_escape(row.get(name, '-'))}</td>" for name in names) + "</tr>"
        for row in rows
    ]
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _band(each: Band | None, by: float, form: str, spread: bool = True) -> str:
    if each is None:
        return "-"
    text = format(by * each.mean, form)
    if each.count > 1 and spread:
        text += f" ({format(by * each.low, form)} to {format(by * each.high, form)})"
    return text


def _on(record: Record, link: str) -> list[Record]:
    return [entry for entry in record["links"] if entry["link"] == link]


def _escape(text: object) -> str:
    return html.escape(str(text), quote=True)
