"""Hosts on one switch, each with a full-duplex link of its own that is limited in rate, delay, jitter and loss."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from terncomm.cluster import userspace
from terncomm.cluster.namespaces import INTERFACE, Namespace, NotPermitted, address
from terncomm.simulator.links import Link

FREE = Link("unlimited", math.inf)
BURST_S = 2.1e-3  # a bucket of this much of the rate: 256 KB at 1 Gbit, below which the rate is not reached
SMALLEST_BURST = 12_000  # bytes; eight frames
QUEUE_S = 50e-3  # what waits longer at the switch for a link is dropped
SMALLEST_QUEUE = 256_000  # bytes
HOST_QUEUE = 16_000_000  # bytes; a host drops nothing of its own, TCP keeps this queue short
QUEUE_FRAMES = 100_000  # of netem


@dataclass(frozen=True)
class Network:
    """What `network` made.

    Args:
        nodes: one namespace per host; its interface is `INTERFACE`, with `address(node)`.
        how: what limits the links: "tbf", "tbf + netem", "netem", "user-space link" or "no limit".
        switch: the process of a user-space link.
    """

    nodes: list[Namespace]
    how: str
    switch: subprocess.Popen[bytes] | None = None


@contextmanager
def network(nodes: int, link: Link = FREE, *, jitter_s: float = 0.0, loss: float = 0.0) -> Iterator[Network]:
    """`nodes` hosts on a switch; every link has `link`'s rate in both directions, and its delay from host to host.

    The rate is `tbf`'s, at both ends of the link. Delay and loss are `netem`'s where the kernel has it; where it has
    not, and for jitter, which `netem` cannot give without changing the order of frames, a user-space link's.

    jitter_s: each frame's delay varies by up to this either way, at most the delay.
    loss: probability that a frame is lost.

    Raises:
        NotPermitted: this process may not make it, or the kernel cannot, with the system's own words.
    """
    delayed = bool(link.delay_s or jitter_s or loss)
    with ExitStack() as stack:
        switch = _namespace(stack)
        netem = delayed and not jitter_s and _has_netem(switch)
        bridged = netem or not delayed
        if bridged:
            switch.configure("ip link add br0 type bridge", "ip link set br0 up")
        hosts = [_namespace(stack) for _ in range(nodes)]
        for index, host in enumerate(hosts):
            port = f"s{index}"
            host.configure(
                f"ip link add {INTERFACE} address {userspace.hardware_address(index)} type veth"
                f" peer name {port} netns {switch.path}",
                *_offload(INTERFACE, link, loss),
                f"ip addr add {address(index)}/16 dev {INTERFACE}",
                "ip link set lo up",
                f"ip link set {INTERFACE} up",
                *_qdiscs(INTERFACE, link, HOST_QUEUE, loss, netem),
            )
            switch.configure(
                *[f"ip link set {port} master br0"] * bridged,
                f"ip link set {port} up",
                *_qdiscs(port, link, _queue_bytes(link)),
            )
        if bridged:
            words = ["tbf"] * math.isfinite(link.bits_per_s) + ["netem"] * netem
            yield Network(hosts, " + ".join(words) or "no limit")
        else:
            for host in hosts:
                _send_large(host)
            process = _start_switch(switch, nodes, link, jitter_s, loss)
            stack.callback(_stop, process)
            yield Network(hosts, "user-space link", process)


def _namespace(stack: ExitStack) -> Namespace:
    made = Namespace()
    stack.callback(made.close)
    return made


def _burst_bytes(link: Link) -> int:
    return max(round(link.bits_per_s / 8 * BURST_S), SMALLEST_BURST)


def _queue_bytes(link: Link) -> int:
    return max(round(min(link.bits_per_s / 8 * QUEUE_S, 1e9)), SMALLEST_QUEUE)


def _offload(interface: str, link: Link, loss: float) -> list[str]:
    """TCP hands down no more than half a burst at once; single packets where some are to be lost."""
    if loss:
        return [f"ip link set {interface} gso_max_segs 1"]
    if link.bits_per_s == math.inf:
        return []
    return [f"ip link set {interface} gso_max_size {min(_burst_bytes(link) // 2, 65536)}"]


def _send_large(host: Namespace) -> None:
    """TCP fills segments before it hands them down, however long the round trip: fewer calls for the switch."""
    with host.inside(), suppress(FileNotFoundError):  # kernels before 5.18
        Path("/proc/sys/net/ipv4/tcp_tso_rtt_log").write_text("24")


def _qdiscs(interface: str, link: Link, queue_bytes: int, loss: float = 0.0, netem: bool = False) -> list[str]:
    lines = []
    parent = "root"
    if netem:
        limits = f"limit {QUEUE_FRAMES} delay {1e6 * link.delay_s:.0f}us" + (f" loss {100 * loss}%" if loss else "")
        lines.append(f"tc qdisc add dev {interface} root handle 1: netem {limits}")
        parent = "parent 1:1"
    if math.isfinite(link.bits_per_s):
        limits = f"rate {link.bits_per_s:.0f}bit burst {_burst_bytes(link)} limit {queue_bytes + _burst_bytes(link)}"
        lines.append(f"tc qdisc add dev {interface} {parent} tbf {limits}")
    return lines


def _has_netem(where: Namespace) -> bool:
    try:
        where.configure("tc qdisc add dev lo root netem delay 1ms", "tc qdisc del dev lo root")
    except NotPermitted:
        return False
    return True


def _start_switch(where: Namespace, ports: int, link: Link, jitter_s: float, loss: float) -> subprocess.Popen[bytes]:
    with ExitStack() as stack:
        try:
            with where.inside():
                sockets = [
                    stack.enter_context(userspace.port(f"s{index}", _queue_bytes(link))) for index in range(ports)
                ]
        except OSError as error:
            raise NotPermitted(f"no packet sockets for the user-space link: {error}") from None
        descriptors = [made.fileno() for made in sockets]
        asked = {"ports": descriptors, "delay_s": link.delay_s, "jitter_s": jitter_s, "loss": loss}
        return subprocess.Popen(
            [sys.executable, "-I", "-S", userspace.__file__, json.dumps(asked)],
            stdin=subprocess.PIPE,
            pass_fds=descriptors,
            start_new_session=True,  # Ctrl-C is not for it
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
