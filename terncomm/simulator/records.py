"""Result records, one JSON object per line: read, and held to what the report needs of them."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from terncomm.simulator.links import Link

Record = dict[str, Any]
MODES = ("simulate", "plan", "cluster")
PARTS = ("compute_s", "encode_s", "exchange_s", "decode_s")


def load(paths: str | Path | Iterable[str | Path]) -> list[Record]:
    """Records of files, and of every *.jsonl in folders, in the order given; a file named twice is read once.

    Raises:
        ValueError: a line is no JSON object or lacks something; the message starts with file and line.
        FileNotFoundError: no such file or folder.
    """
    files: dict[Path, Path] = {}
    for path in [Path(paths)] if isinstance(paths, (str, Path)) else map(Path, paths):
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {path}")
        if not found:
            raise ValueError(f"{path}: no *.jsonl in this folder")
        files |= {file.resolve(): file for file in found}
    return [record for file in files.values() for record in read(file)]


def read(file: Path) -> list[Record]:
    """Records of one file; blank lines are passed over.

    Raises:
        ValueError: as `load`.
    """
    records = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: not a JSON object: {error}") from None
        try:
            check(record)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}") from None
        records.append(record)
    return records


def check(record: Any) -> None:
    """Hold one record to its schema.

    Raises:
        ValueError: something is missing or of another kind; the message names the field.
    """
    if not isinstance(record, dict):
        raise ValueError(f"wanted a JSON object, got {_short(record)}")
    mode = record.get("mode")
    if mode not in MODES:
        raise ValueError(
            f"mode: wanted one of {', '.join(MODES)}, got {_short(mode)}; records are what `terncomm simulate`, "
            "`terncomm plan --out` and `terncomm cluster --out` write"
        )
    _each(record, "", dict, "config", "provenance")
    config = record["config"]
    if mode == "simulate":
        _each(config, "config.", str, "data", "codec")
        _counts(config, "config.", "workers", low=1)
        _counts(config, "config.", "seed", low=None)
        _history(record, ())
        links = record.setdefault("links", [])
        if not isinstance(links, list):
            raise ValueError(f"links: wanted a list, got {_short(links)}")
        for number, link in enumerate(links):
            where = f"links[{number}]"
            if not isinstance(link, dict):
                raise ValueError(f"{where}: wanted an object, got {_short(link)}")
            _each(link, f"{where}.", str, "link")
            _step(link, f"{where}.")
    elif mode == "plan":
        _each(config, "config.", str, "network", "codec", "link")
        _counts(config, "config.", "workers", low=1)
        _step(record, "")
        _amounts(record, "", "sent_bytes", "samples_per_s")
        rate_and_delay(record)
    else:
        _each(config, "config.", str, "link")
        _counts(config, "config.", "ranks", low=1)
        _each(record, "", str, "how")
        if _get(record, "", "probe") is not None:  # ranks on one host have no link
            _each(record, "", dict, "probe")
            _amounts(record["probe"], "probe.", "bits_per_s")
        _counts(record, "", "status", low=None)
        _amounts(record, "", "seconds")
        if record.get("history") is not None:
            _history(record, ("seconds",))
    if "accumulate" in config:
        _counts(config, "config.", "accumulate", low=1)


def label_of(codec: str, accumulate: int, options: dict[str, str]) -> str:
    """How a curve is called in legends and tables.

    >>> label_of("none", 11, {})
    'none, step every 11'
    """
    every = [f"step every {accumulate}"] if accumulate > 1 else []
    return ", ".join([codec, *every, *(f"{key} {value}" for key, value in options.items())])


def rate_and_delay(record: Record) -> tuple[float, float]:
    """Bits per second and one-way delay of a plan record's link.

    Raises:
        ValueError: the record has no bits_per_s, and its link's name says no rate.
    """
    if "bits_per_s" in record:
        _amounts({"delay_s": 0.0, **record}, "", "bits_per_s", "delay_s")
        return record["bits_per_s"], record.get("delay_s", 0.0)
    link = Link.parse(record["config"]["link"])
    return link.bits_per_s, link.delay_s


def _history(record: Record, more: tuple[str, ...]) -> None:
    history = record.get("history")
    if not isinstance(history, list) or not history:
        raise ValueError(f"history: wanted a list of evaluations, got {_short(history)}")
    before = -1
    for number, entry in enumerate(history):
        where = f"history[{number}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: wanted an object, got {_short(entry)}")
        _counts(entry, f"{where}.", "step", low=0)
        _amounts(entry, f"{where}.", "sent_bytes", *more)
        for name in ("test_loss", "test_accuracy"):
            value = _get(entry, f"{where}.", name)
            if value is not None and not _is_number(value):
                raise ValueError(f"{where}.{name}: wanted a number or null, got {_short(value)}")
        if entry["test_accuracy"] is not None and not 0 <= entry["test_accuracy"] <= 1:
            raise ValueError(f"{where}.test_accuracy: wanted a fraction from 0 to 1, got {entry['test_accuracy']}")
        if entry["step"] <= before:
            raise ValueError(f"{where}.step: {entry['step']} does not come after {before}")
        before = entry["step"]


def _step(entry: Record, where: str) -> None:
    _amounts(entry, where, "step_s", *PARTS)
    total = sum(entry[part] for part in PARTS)
    if not math.isclose(total, entry["step_s"], rel_tol=1e-2, abs_tol=1e-6):
        raise ValueError(f"{where}step_s is {entry['step_s']:g}, but {' + '.join(PARTS)} is {total:g}")
    if entry["step_s"] == 0:
        raise ValueError(f"{where}step_s: a step takes time, got 0")


def _get(entry: Record, where: str, name: str) -> Any:
    if name not in entry:
        raise ValueError(f"{where}{name} is missing")
    return entry[name]


def _each(entry: Record, where: str, kind: type, *names: str) -> None:
    for name in names:
        value = _get(entry, where, name)
        if not isinstance(value, kind):
            raise ValueError(f"{where}{name}: wanted {'text' if kind is str else 'an object'}, got {_short(value)}")


def _counts(entry: Record, where: str, name: str, low: int | None) -> None:
    value = _get(entry, where, name)
    if not isinstance(value, int) or isinstance(value, bool) or (low is not None and value < low):
        least = "" if low is None else f" of at least {low}"
        raise ValueError(f"{where}{name}: wanted an integer{least}, got {_short(value)}")


def _amounts(entry: Record, where: str, *names: str) -> None:
    for name in names:
        value = _get(entry, where, name)
        if not _is_number(value) or not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{where}{name}: wanted a number, zero or more, got {_short(value)}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
