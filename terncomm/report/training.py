"""Training runs from records, simulated and measured: sorted into what can be compared, bands over seeds."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from terncomm.simulator.records import Record, label_of

KNOWN_CODECS = ("none", "fp16", "bf16", "int8", "terngrad", "terngrad-noclip")
Field = Literal["test_accuracy", "test_loss"]


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
        config.pop("files", None)
        clocks = {
            link["link"]: [entry["step"] / accumulate * link["step_s"] for entry in record["history"]]
            for link in record["links"]
        }
        return cls("simulate", data, workers, codec, accumulate, seed, texts(config), clocks, record)

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
    return options | texts({k: v for k, v in config.items() if k not in ("command", "link", "ranks")})


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
        parting, naming = distinguish([(run.codec, run.accumulate, run.options) for run in runs])
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
        config = {name: value for name, value in record["config"].items() if name != "files"}  # their checksums
        key = str(number) if record["mode"] == "cluster" else _frozen([record["mode"], config])
        if key in kept:
            replaced += 1
            if _date(record) < _date(kept[key]):
                continue
        kept[key] = record
    return list(kept.values()), replaced


def codec_order(codec: str) -> tuple[int, str]:
    """Sort key: known codecs as listed, then the others by name."""
    return (KNOWN_CODECS.index(codec) if codec in KNOWN_CODECS else len(KNOWN_CODECS), codec)


def distinguish(members: list[tuple[str, int, dict[str, str]]]) -> tuple[list[str], list[str]]:
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


def texts(options: Record) -> dict[str, str]:
    """Options as text, equal where they are equal."""
    return {key: value if isinstance(value, str) else _frozen(value) for key, value in options.items()}


def _frozen(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _date(record: Record) -> str:
    return str(record["provenance"].get("date") or "")
