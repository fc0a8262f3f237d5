"""Is the network what was asked for? Measured before the first step, and said in one line."""

import math
from dataclasses import asdict, dataclass

from terncomm.cluster.asked import Asked
from terncomm.cluster.launch import say
from terncomm.cluster.namespaces import NotPermitted
from terncomm.cluster.network import Network
from terncomm.cluster.probe import Probe, probe
from terncomm.simulator.links import Link

ATTEMPTS = 3  # other work on the machine may disturb one
LEAST_RATE, MOST_RATE = 0.85, 1.15  # of the asked payload
DELAY_SHARE, DELAY_S = 0.2, 0.2e-3  # a delay may be off by their sum


@dataclass(frozen=True)
class Verified:
    """What a record says of the link: fields of its "config", and its "probe" (None with one node)."""

    config: dict[str, object]
    probe: dict[str, float] | None


def verify(network: Network, asked: Asked) -> Verified | None:
    """Measure, print one line, and return what is to be recorded; None if the link is refused.

    Loss makes TCP slow by itself, so then the rate is told but not judged.
    """
    link = asked.link
    where = f"{asked.ranks} ranks, " + (
        "one namespace each" if asked.job.ranks_per_node == 1 else f"{asked.nodes} namespaces"
    )
    config: dict[str, object] = {
        "link": link.name,
        "bits_per_s": link.bits_per_s if math.isfinite(link.bits_per_s) else None,
        "delay_s": link.delay_s,
        "jitter_s": asked.jitter_s,
        "loss": asked.loss,
    }
    if asked.nodes == 1:
        say(f"{where}; one host, so no link is used")
        return Verified(config, None)
    for _ in range(ATTEMPTS):
        try:
            found = probe(network.nodes, link)
        except OSError as error:
            raise NotPermitted(f"{network.how}: one host does not reach the next: {error}") from None
        if fits(found, link, asked.jitter_s, asked.loss):
            break
    else:
        if not asked.accept_measured:
            say(
                f"refused: {network.how} on this machine gives {_told(found, link)}; "
                f"--accept-measured runs on that and labels the result with it, `terncomm simulate` needs no network"
            )
            return None
        config |= {"link": f"{_short(found)} (measured)", "asked_link": link.name}
    accepted = "" if config["link"] == link.name else f"; labelled {config['link']}"
    say(f"{where}, {network.how}; {_told(found, link)}{accepted}")
    return Verified(config, asdict(found))


def fits(found: Probe, link: Link, jitter_s: float = 0.0, loss: float = 0.0) -> bool:
    """Whether what was measured is what was asked, within the tolerances above."""
    rate = found.bits_per_s / (link.bits_per_s * link.efficiency)
    rate_fits = math.isinf(link.bits_per_s) or loss > 0 or LEAST_RATE <= rate <= MOST_RATE
    return rate_fits and abs(found.delay_s - link.delay_s) <= DELAY_SHARE * link.delay_s + DELAY_S + jitter_s


def _told(found: Probe, link: Link) -> str:
    rate = f"asked {_rate(link.bits_per_s)}" if math.isfinite(link.bits_per_s) else "no rate asked"
    delay = f"asked delay {1e3 * link.delay_s:g} ms" if link.delay_s else "no delay asked"
    measured = f"measured {_rate(found.bits_per_s)} of payload"
    return f"{rate}, {measured}; {delay}, measured {1e3 * found.delay_s:.2f} ms (one way)"


def _rate(bits_per_s: float) -> str:
    unit, name = next((pair for pair in ((1e9, "G"), (1e6, "M")) if bits_per_s >= pair[0]), (1e3, "k"))
    return f"{bits_per_s / unit:.4g} {name}bit/s"


def _short(found: Probe) -> str:
    return f"{1e-6 * found.bits_per_s:.4g}mbit/{1e3 * found.delay_s:.3g}ms"
