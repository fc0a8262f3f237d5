"""Links between workers: how many bytes they carry in a second, and how late."""

import math
import re
from dataclasses import dataclass

_RATES = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBER = r"([+-]?(?:\d+\.?\d*|\.\d+))\s*([a-z/]*)"


def parse_rate(text: str) -> float:
    """A rate as `tc` writes it, "100mbit" or "2.5gbit" -> bits per second.

    Raises:
        ValueError: no such unit, or not a positive number.

    >>> parse_rate("2.5gbit")
    2500000000.0
    """
    return _parse(text, _RATES, "a rate", "100mbit, 2.5gbit", positive=True)


def parse_time(text: str) -> float:
    """A time with its unit, "1ms" or "50us" -> seconds.

    Raises:
        ValueError: no such unit, or a negative number.
    """
    return _parse(text, _TIMES, "a time", "1ms, 50us", positive=False)


def _parse(text: str, units: dict[str, float], what: str, examples: str, positive: bool) -> float:
    match = re.fullmatch(_NUMBER, text.strip().lower())
    wanted = f"wanted {what} such as {examples} (units: {', '.join(units)})"
    if match is None or match[2] not in units:
        raise ValueError(f"{text!r} is not {what}: {wanted}")
    value = float(match[1]) * units[match[2]]
    if value < 0 or (positive and value == 0) or not math.isfinite(value):
        raise ValueError(f"{text!r} is not {'positive' if positive else 'zero or more'}: {wanted}")
    return value


@dataclass(frozen=True)
class Link:
    """The full-duplex link of one worker, or of one node, into a switch that is never the limit.

    Args:
        name: as it stands in results.
        bits_per_s: rate in each direction, of everything that is sent, headers included.
        delay_s: one way, from a worker to another.
        efficiency: payload per byte on the wire; 0.94 is TCP over Ethernet with frames of 1500 bytes.
    """

    name: str
    bits_per_s: float
    delay_s: float = 0.0
    efficiency: float = 0.94

    def __post_init__(self) -> None:
        if not self.bits_per_s > 0:
            raise ValueError(f"bits_per_s must be positive, got {self.bits_per_s}")
        if not (self.delay_s >= 0 and math.isfinite(self.delay_s)):
            raise ValueError(f"delay_s must be zero or more, got {self.delay_s}")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"efficiency must be above 0 and at most 1, got {self.efficiency}")

    @property
    def payload_bytes_per_s(self) -> float:
        """Payload that goes through in a second, in each direction."""
        return self.bits_per_s / 8 * self.efficiency

    @classmethod
    def parse(cls, text: str) -> "Link":
        """A preset's name, a rate, or a rate and a one-way delay.

        Raises:
            ValueError: it is none of these; the message says what is.

        >>> Link.parse("250mbit/5ms")
        Link(name='250mbit/5ms', bits_per_s=250000000.0, delay_s=0.005, efficiency=0.94)
        """
        text = text.strip()
        if text in PRESETS:
            return PRESETS[text]
        rate, slash, delay = text.partition("/")
        try:
            return cls(text, parse_rate(rate), parse_time(delay) if slash else 0.0)
        except ValueError as error:
            known = ", ".join(PRESETS)
            raise ValueError(f"{text!r} is no link: {error}; or a preset: {known}; or RATE/DELAY") from None


PRESETS = {
    link.name: link
    for link in (
        Link("100mbit", 100e6),
        Link("1gbit", 1e9),
        Link("10gbit", 10e9),
        Link("wan-50ms", 100e6, delay_s=0.025),  # 50 ms there and back
    )
}


LINK_WORDS = (
    "100mbit, 1gbit, 10gbit, wan-50ms (100 Mbit/s, 25 ms each way); or RATE, or RATE/DELAY with the delay one way, as "
    "2.5gbit/1ms"
)


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
