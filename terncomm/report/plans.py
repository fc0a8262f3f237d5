"""Plans from records: what belongs in one picture, and the rates at which a codec stops to pay."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from terncomm.report.training import codec_order, distinguish, texts
from terncomm.simulator.links import rate_text
from terncomm.simulator.plan import WORTH
from terncomm.simulator.records import Record, label_of, rate_and_delay


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
            options = texts({key: value for key, value in config.items() if key not in fixed})
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
            apart, named = distinguish(spot)
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
    """Rates (bits per second, with none's seconds per batch there) where a codec comes to be WORTH it, or ceases to be.

    Args:
        stops: where it stops paying as the rate grows.
        starts: where it starts to pay as the rate grows.
        pays: at each rate, whether steps are at least WORTH times as fast as with none.
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
    """Where seconds by bits per second fall below those of `base` over WORTH, straight between points on log-log axes.

    >>> break_even({1e8: 10.0, 1e10: 1.0}, {1e8: 1.0, 1e10: 10.0}).text
    'pays below 952 Mbit/s'
    """
    rates = sorted(base.keys() & codec.keys())
    ratios = [math.log(WORTH * codec[rate] / base[rate]) for rate in rates]
    pays = tuple(ratio < 0 for ratio in ratios)
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
