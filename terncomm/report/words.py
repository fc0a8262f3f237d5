"""How rates, links, modes and origins are called in a report."""

from collections.abc import Sequence

from terncomm.report.training import Run
from terncomm.simulator.links import rate_text
from terncomm.simulator.records import Record

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
