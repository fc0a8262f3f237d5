"""Colours, markers and fonts, the same in every picture. Loads matplotlib."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl

from terncomm.report.plans import Plan
from terncomm.report.training import Panel, codec_order

# Okabe and Ito's colours, told apart by colour-blind readers; the marker says it again.
CODEC_STYLES = {
    "none": ("black", "o"),
    "fp16": ("#E69F00", "s"),
    "bf16": ("#F0E442", "p"),
    "int8": ("#0072B2", "^"),
    "terngrad": ("#D55E00", "D"),
    "terngrad-noclip": ("#CC79A7", "v"),
}
_OTHERS = (("#009E73", "P"), ("#56B4E9", "X"), ("#666666", "*"), ("#8C6D1F", "h"))
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
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
        if codec not in CODEC_STYLES and codec not in others:
            others.append(codec)
        color, marker = CODEC_STYLES.get(codec) or _OTHERS[others.index(codec) % len(_OTHERS)]
        found[label] = Look(color, marker, variants.get(codec, 0))
        variants[codec] = variants.get(codec, 0) + 1
    return found
