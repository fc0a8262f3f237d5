"""Numbers of the report, from records: what can be compared, bands over seeds, targets, gaps, break-even rates."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from terncomm.simulator.records import PARTS, Record, rate_and_delay

KNOWN_CODECS = ("none", "fp16", "int8", "terngrad", "terngrad-noclip")
Field = Literal["test_accuracy", "test_loss"]
# Student's t, 97.5 % point, for 1, 2, ... degrees of freedom; beyond the last the last, which is a little wide.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


@dataclass(frozen=True)
class Band:
    """Mean, lowest and highest of `count` values."""

    mean: float
    low: float
    high: float
    count: int


def band(values: Iterable[float | None]) -> Band | None:
    """Band of the values; None where there is none, or one of them is missing or not finite."""
    found = list(values)
    numbers = [value for value in found if value is not None and math.isfinite(value)]
    if not numbers or len(numbers) < len(found):
        return None
    low, high = min(numbers), max(numbers)
    mean = min(max(statistics.fmean(numbers), low), high)  # of equal values it may round to beside them
    return Band(mean, low, high, len(numbers))


# Training runs


@dataclass(frozen=True)
class Run:
    """One finished training run, simulated or measured.

    Args:
        accumulate: steps whose gradients are summed locally before one exchange.
        options: the rest of its configuration, as text.
        clocks: seconds at each entry of the history, by link.
        record: what it was read from.
    """

    mode: str
    data: str
    workers: int
    codec: str
    accumulate: int
    seed: int
    options: dict[str, str]
    clocks: dict[str, list[float]]
    record: Record

    @property
    def history(self) -> list[Record]:
        """Evaluations, the first before training."""
        history: list[Record] = self.record["history"]
        return history

    @classmethod
    def of(cls, record: Record) -> "Run":
        """The run of a simulate record, or of a cluster record that has a history."""
        if record["mode"] == "cluster":
            return cls._of_cluster(record)
        config = dict(record["config"])
        names = ("data", "workers", "codec", "seed")
        data, workers, codec, seed = (config.pop(name) for name in names)
        accumulate = config.pop("accumulate", 1)
        clocks = {
            link["link"]: [entry["step"] / accumulate * link["step_s"] for entry in record["history"]]
            for link in record["links"]
        }
        return cls("simulate", data, workers, codec, accumulate, seed, _texts(config), clocks, record)

    @classmethod
    def _of_cluster(cls, record: Record) -> "Run":
        config = record["config"]
        asked = command_options(config)
        options = {
            name: value
            for name, value in asked.items()
            if name not in ("data", "codec", "seed", "accumulate") and "/" not in value and not value.endswith(".jsonl")
        }
        return cls(
            "cluster",
            asked.get("data", script(config)),
            config["ranks"],
            asked.get("codec", script(config)),
            _integer(asked.get("accumulate"), 1),
            _integer(asked.get("seed"), 0),
            options,
            {config["link"]: [entry["seconds"] for entry in record.get("history") or []]},
            record,
        )


def command_options(config: Record) -> dict[str, str]:
    """Options of a cluster run: of its command, "--name value" or "--name=value", and over them those of its config."""
    command = [str(word) for word in config.get("command", [])]
    options: dict[str, str] = {}
    for word, following in zip(command, [*command[1:], "--"], strict=True):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            options[name.replace("-", "_")] = value if equals else "" if following.startswith("--") else following
    return options | _texts({k: v for k, v in config.items() if k not in ("command", "link", "ranks")})


def script(config: Record) -> str:
    """Name of the script that a cluster run's command starts; "run" where none is seen."""
    names = [PurePath(str(word)).name for word in config.get("command", [])]
    return next((name for name in names if name.endswith((".py", ".sh"))), names[0] if names else "run")


def _integer(text: str | None, otherwise: int) -> int:
    return int(text) if text is not None and text.isdecimal() else otherwise


@dataclass(frozen=True)
class Curve:
    """Runs that differ in nothing but their seed."""

    label: str
    codec: str
    accumulate: int
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> tuple[Run, ...]:
        """One run per seed: the same training over several links counts once."""
        return tuple({run.seed: run for run in reversed(self.runs)}.values())[::-1]

    def on(self, link: str) -> tuple[Run, ...]:
        """The runs that have a time for this link."""
        return tuple(run for run in self.runs if link in run.clocks)

    def final(self, field: str) -> Band | None:
        """Band of the last evaluation."""
        return band(run.history[-1][field] for run in self.seeds)

    def points(self, field: Field, link: str | None = None) -> list[tuple[int, Band, Band]]:
        """Step, band of bytes (or of seconds on a link) and band of `field`, where every run has an evaluation."""
        runs = self.seeds if link is None else self.on(link)
        at: dict[int, list[tuple[float, float | None]]] = {}
        for run in runs:
            xs = [entry["sent_bytes"] for entry in run.history] if link is None else run.clocks[link]
            for entry, x in zip(run.history, xs, strict=True):
                at.setdefault(entry["step"], []).append((x, entry[field]))
        found = []
        for step, pairs in sorted(at.items()):
            x, y = band(x for x, _ in pairs), band(y for _, y in pairs)
            if len(pairs) == len(runs) and x is not None and y is not None:
                found.append((step, x, y))
        return found


@dataclass(frozen=True)
class Panel:
    """Curves that may be compared: one mode, one data set, one number of workers, and otherwise equal conditions.

    Args:
        conditions: options in which this panel differs from others of the same data and workers.
        unequal: options that differ between its curves, as a sentence each.
    """

    mode: str
    data: str
    workers: int
    conditions: tuple[tuple[str, str], ...]
    unequal: tuple[str, ...]
    curves: tuple[Curve, ...]

    @property
    def name(self) -> str:
        """Data, workers and conditions, as in titles."""
        return ", ".join([f"{self.data}, W = {self.workers}", *(f"{k} {v}" for k, v in self.conditions)])

    @property
    def baseline(self) -> Curve | None:
        """The curve of none with an exchange every step."""
        return next((curve for curve in self.curves if curve.codec == "none" and curve.accumulate == 1), None)

    @property
    def links(self) -> list[str]:
        """Links that some run has times for, in order of appearance."""
        return list(dict.fromkeys(link for curve in self.curves for run in curve.runs for link in run.clocks))

    @property
    def has_accuracy(self) -> bool:
        """Whether every run has a test accuracy at its end."""
        return all(run.history[-1]["test_accuracy"] is not None for curve in self.curves for run in curve.runs)

    @property
    def field(self) -> Field:
        """What is compared: accuracy, or loss where there is no accuracy."""
        return "test_accuracy" if self.has_accuracy else "test_loss"


def panels(records: Sequence[Record], *, whole_runs: bool = False) -> list[Panel]:
    """Training runs, sorted into what can be compared.

    An option that takes several values within one codec parts panels where all codecs have it, else curves.

    Args:
        whole_runs: measured runs that ended well, those without a history too, and nothing else.
    """
    groups: dict[tuple[str, str, int], list[Run]] = {}
    for record in records:
        trained = record["mode"] == "simulate" or bool(record.get("history"))
        if _ended_well(record) if whole_runs else trained and record.get("status", 0) == 0:
            run = Run.of(record)
            groups.setdefault((run.mode, run.data, run.workers), []).append(run)
    found = []
    for (mode, data, workers), runs in groups.items():
        parting, naming = _distinguish([(run.codec, run.accumulate, run.options) for run in runs])
        parts: dict[tuple[tuple[str, str], ...], list[Run]] = {}
        for run in runs:
            parts.setdefault(tuple((key, run.options.get(key, "-")) for key in parting), []).append(run)
        for conditions, members in parts.items():
            curves: dict[tuple[int, str, int, str], list[Run]] = {}
            for run in members:
                label = label_of(run.codec, run.accumulate, {k: run.options[k] for k in naming if k in run.options})
                curves.setdefault((*codec_order(run.codec), run.accumulate, label), []).append(run)
            sorted_curves = tuple(
                Curve(label, codec, accumulate, tuple(sorted(curves[key], key=lambda run: run.seed)))
                for key in sorted(curves)
                for _, codec, accumulate, label in [key]
            )
            unequal = _unequal(sorted_curves, naming)
            found.append(Panel(mode, data, workers, conditions, unequal, sorted_curves))
    return sorted(found, key=lambda p: (p.mode == "cluster", p.data, p.workers, p.conditions))


def _ended_well(record: Record) -> bool:
    return bool(record["mode"] == "cluster" and record["status"] == 0)


def newest(records: Iterable[Record]) -> tuple[list[Record], int]:
    """Records without those that a later one of the same experiment replaces, and how many these were.

    Measured runs are kept: a measurement taken twice is two measurements.
    """
    kept: dict[str, Record] = {}
    replaced = 0
    for number, record in enumerate(records):
        key = str(number) if record["mode"] == "cluster" else _frozen([record["mode"], record["config"]])
        if key in kept:
            replaced += 1
            if _date(record) < _date(kept[key]):
                continue
        kept[key] = record
    return list(kept.values()), replaced


def codec_order(codec: str) -> tuple[int, str]:
    """Sort key: known codecs as listed, then the others by name."""
    return (KNOWN_CODECS.index(codec) if codec in KNOWN_CODECS else len(KNOWN_CODECS), codec)


def label_of(codec: str, accumulate: int, options: dict[str, str]) -> str:
    """How a curve is called in legends and tables.

    >>> label_of("none", 11, {})
    'none, step every 11'
    """
    every = [f"step every {accumulate}"] if accumulate > 1 else []
    return ", ".join([codec, *every, *(f"{key} {value}" for key, value in options.items())])


def _distinguish(members: list[tuple[str, int, dict[str, str]]]) -> tuple[list[str], list[str]]:
    """Options that take several values within one codec: those that part panels, and those that part curves."""
    codecs = {codec for codec, _, _ in members}
    parting: list[str] = []
    naming: list[str] = []
    for key in sorted({key for _, _, options in members for key in options}):
        values: dict[tuple[str, int], set[str | None]] = {}
        for codec, accumulate, options in members:
            values.setdefault((codec, accumulate), set()).add(options.get(key))
        if max(map(len, values.values())) > 1:
            holders = {codec for codec, _, options in members if key in options}
            (parting if holders == codecs else naming).append(key)
    return parting, naming


def _unequal(curves: Sequence[Curve], naming: list[str]) -> tuple[str, ...]:
    found = []
    for key in sorted({key for curve in curves for key in curve.runs[0].options} - set(naming)):
        values = {curve.label: curve.runs[0].options[key] for curve in curves if key in curve.runs[0].options}
        if len(set(values.values())) > 1:
            found.append(f"{key} is " + "; ".join(f"{value} for {label}" for label, value in values.items()))
    return tuple(found)


def _texts(options: Record) -> dict[str, str]:
    return {key: value if isinstance(value, str) else _frozen(value) for key, value in options.items()}


def _frozen(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _date(record: Record) -> str:
    return str(record["provenance"].get("date") or "")


# Targets


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


# Gaps

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


# Plans


@dataclass(frozen=True)
class Plan:
    """Predicted steps of one network, without training: what differs is workers, codec and rate.

    Args:
        points: the record of (workers, label, bits per second).
        codecs: codec of each label.
    """

    network: str
    delay_s: float
    conditions: tuple[tuple[str, str], ...]
    points: dict[tuple[int, str, float], Record]
    codecs: dict[str, str]

    @property
    def name(self) -> str:
        """Network and conditions, as in titles."""
        delay = [f"one-way delay {1e3 * self.delay_s:g} ms"] if self.delay_s else []
        return ", ".join([self.network, *delay, *(f"{k} {v}" for k, v in self.conditions)])

    @property
    def workers(self) -> list[int]:
        """Numbers of workers, ascending."""
        return sorted({workers for workers, _, _ in self.points})

    @property
    def rates(self) -> list[float]:
        """Rates of the links in bits per second, ascending."""
        return sorted({rate for _, _, rate in self.points})

    def batch_s(self, workers: int, label: str) -> dict[float, float]:
        """Time per batch by rate: of a step, over the batches that are accumulated in it."""
        return {
            rate: record["step_s"] / accumulated(record)
            for (w, name, rate), record in sorted(self.points.items())
            if w == workers and name == label
        }

    def break_even(self, workers: int, label: str) -> "BreakEven":
        """Where a codec stops paying against none."""
        return break_even(self.batch_s(workers, "none"), self.batch_s(workers, label))


def accumulated(record: Record) -> int:
    """Batches of each worker in one optimizer step."""
    count: int = record["config"].get("accumulate", 1)
    return count


def plans(records: Sequence[Record]) -> list[Plan]:
    """Plan records, sorted into what belongs in one picture."""
    groups: dict[tuple[str, float], list[tuple[Record, float, dict[str, str]]]] = {}
    for record in records:
        if record["mode"] == "plan":
            config = record["config"]
            rate, delay_s = rate_and_delay(record)
            fixed = ("network", "workers", "codec", "link", "accumulate")
            options = _texts({key: value for key, value in config.items() if key not in fixed})
            groups.setdefault((config["network"], delay_s), []).append((record, rate, options))
    found = []
    for (network, delay_s), members in groups.items():
        # Options may go with the number of workers (per_node, say): what parts plans is what varies at one point.
        parting: set[str] = set()
        naming: set[str] = set()
        spots: dict[tuple[int, float], list[tuple[str, int, dict[str, str]]]] = {}
        for record, rate, options in members:
            spot = spots.setdefault((record["config"]["workers"], rate), [])
            spot.append((record["config"]["codec"], accumulated(record), options))
        for spot in spots.values():
            apart, named = _distinguish(spot)
            parting |= set(apart)
            naming |= set(named)
        naming -= parting
        parts: dict[tuple[tuple[str, str], ...], list[tuple[Record, float, dict[str, str]]]] = {}
        for member in members:
            parts.setdefault(tuple((key, member[2].get(key, "-")) for key in sorted(parting)), []).append(member)
        for conditions, part in parts.items():
            points, labels = {}, {}
            for record, rate, options in part:
                codec, accumulate = record["config"]["codec"], accumulated(record)
                label = label_of(codec, accumulate, {key: options[key] for key in sorted(naming) if key in options})
                labels[label] = (codec_order(codec), accumulate)
                points[record["config"]["workers"], label, rate] = record
            codecs = {label: labels[label][0][1] for label in sorted(labels, key=lambda name: (labels[name], name))}
            found.append(Plan(network, delay_s, conditions, points, codecs))
    return sorted(found, key=lambda plan: (plan.network, plan.delay_s, plan.conditions))


@dataclass(frozen=True)
class BreakEven:
    """Rates (bits per second, seconds per batch) where a codec's curve crosses none's.

    Args:
        stops: where it stops paying as the rate grows.
        starts: where it starts to pay as the rate grows.
        pays: at each rate, whether it takes less time than none.
    """

    stops: tuple[tuple[float, float], ...]
    starts: tuple[tuple[float, float], ...]
    pays: tuple[bool, ...]

    @property
    def text(self) -> str:
        """In words."""
        if not self.pays:
            return "not compared"
        if not self.stops and not self.starts:
            return "pays at every rate" if self.pays[0] else "pays at no rate"
        below = [f"below {rate_text(rate)}" for rate, _ in self.stops]
        above = [f"above {rate_text(rate)}" for rate, _ in self.starts]
        return "pays " + " and ".join([*above, *below])


def break_even(base: dict[float, float], codec: dict[float, float]) -> BreakEven:
    """Crossings of two curves of seconds by bits per second, straight between points on log-log axes.

    >>> break_even({1e8: 10.0, 1e10: 1.0}, {1e8: 1.0, 1e10: 10.0}).text
    'pays below 1 Gbit/s'
    """
    rates = sorted(base.keys() & codec.keys())
    ratios = [math.log(codec[rate] / base[rate]) for rate in rates]
    pays = tuple(ratio < -1e-9 for ratio in ratios)
    stops: list[tuple[float, float]] = []
    starts: list[tuple[float, float]] = []
    for i in range(len(rates) - 1):
        if pays[i] != pays[i + 1]:
            part = ratios[i] / (ratios[i] - ratios[i + 1])
            cross = _between(part, rates[i], rates[i + 1]), _between(part, base[rates[i]], base[rates[i + 1]])
            (stops if pays[i] else starts).append(cross)
    return BreakEven(tuple(stops), tuple(starts), pays)


def _between(part: float, low: float, high: float) -> float:
    return math.exp(math.log(low) + part * (math.log(high) - math.log(low)))


def rate_text(bits_per_s: float) -> str:
    """A rate with its unit, in two digits.

    >>> rate_text(3.21e9), rate_text(96.1e6)
    ('3.2 Gbit/s', '96 Mbit/s')
    """
    for size, unit in ((1e12, "Tbit/s"), (1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")):
        if bits_per_s >= 0.9995 * size:
            value = bits_per_s / size
            return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.2g} {unit}"
    return f"{bits_per_s:g} bit/s"


# What the records say about themselves

MODE_TEXT = {
    "simulate": "simulated: bytes counted, time predicted",
    "plan": "planned, no training: every number predicted",
    "cluster": "measured on limited links",
}


def link_label(runs: Sequence[Run], link: str) -> str:
    """Whether the times on a link are predicted or measured, and how."""
    if runs[0].mode == "simulate":
        return f"simulated: time predicted for {link}"
    return measured_label([run.record for run in runs], link)


def measured_label(records: Sequence[Record], link: str) -> str:
    """How a link was limited, and what a probe saw of it."""
    hows = sorted({record["how"] for record in records})
    place = "network namespaces, " if all(how.startswith("tbf") for how in hows) else ""
    rates = [record["probe"]["bits_per_s"] for record in records]
    texts = list(dict.fromkeys(rate_text(rate) for rate in (min(rates), max(rates))))
    return f"measured: {place}{link} ({' and '.join(hows)}; probe {' to '.join(texts)})"


def parts_of(entry: Record, accumulate: int) -> dict[str, float]:
    """Seconds of each part of a step, per batch."""
    return {part: entry[part] / accumulate for part in PARTS}


def provenance(records: Sequence[Record]) -> dict[str, list[str]]:
    """Distinct values of each field of provenance, sorted; "not recorded" where one is missing."""
    names = ["terncomm", "commit", "torch", "python", "machine", "date"]
    names += sorted({name for record in records for name in record["provenance"]} - set(names))
    return {
        name: sorted({str(record["provenance"].get(name) or "not recorded") for record in records}) for name in names
    }


def mixed(records: Sequence[Record]) -> list[str]:
    """Sentences that warn where the records were not all made alike."""
    plural = {"terncomm": "versions of terncomm", "commit": "commits", "torch": "versions of torch"}
    plural |= {"python": "versions of Python", "machine": "machines"}
    found = provenance(records)
    return [
        f"The records come from {len(found[name])} {what}: {', '.join(found[name])}."
        for name, what in plural.items()
        if len(found[name]) > 1
    ]


def pick(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, first and last among them, evenly between.

    >>> pick([1, 2, 3, 4, 5], 3)
    [1, 3, 5]
    """
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]
