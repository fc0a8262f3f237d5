"""What the links of a network really give: payload in a second, and delay one way, by TCP between its hosts."""

import math
import selectors
import socket
import statistics
import struct
import time
from contextlib import ExitStack
from dataclasses import dataclass

from terncomm.cluster.namespaces import Namespace, address
from terncomm.simulator.links import Link

CHUNK = 1 << 18
FLOWS = 3  # on each link: what one connection makes of a link differs by a tenth from second to second
WINDOW_S = 0.7
WARM_S = 0.25
WARM_BITS = 5e6  # at low rates; at most 3 * WARM_S of it
WARM_ROUND_TRIPS = 10  # TCP doubles what it sends in each
PINGS_S = 0.4
SETTLE_S = 2.0  # at most


@dataclass(frozen=True)
class Probe:
    """What was measured.

    Args:
        bits_per_s: payload through the slowest link while every host sends to the next.
        delay_s: half of the median round trip of one byte between two hosts, nothing else being sent.
    """

    bits_per_s: float
    delay_s: float


def probe(nodes: list[Namespace], link: Link) -> Probe:
    """Measure links that were asked to be like `link`, in about a second (more where the delay is long).

    Every host sends to the next at once, as in a ring, so a machine that cannot carry all links at once shows it.

    Raises:
        OSError: no connection.
    """
    with ExitStack() as stack:
        count = len(nodes)
        flows = [_connect(stack, nodes, index % count, (index + 1) % count) for index in range(FLOWS * count)]
        delay_s = _round_trip_s(*flows[0]) / 2
        warm_s = WARM_S + min(WARM_BITS / link.bits_per_s, 3 * WARM_S) + WARM_ROUND_TRIPS * 2 * link.delay_s
        bits_per_s = _slowest_bits_per_s(flows, count, warm_s)
    _settle(nodes, link.delay_s)
    return Probe(bits_per_s, delay_s)


def _connect(stack: ExitStack, nodes: list[Namespace], source: int, target: int) -> tuple[socket.socket, socket.socket]:
    with nodes[target].inside():
        listener = stack.enter_context(socket.create_server((address(target), 0)))
    with nodes[source].inside():
        sender = stack.enter_context(socket.socket())
    sender.settimeout(10)
    sender.connect(listener.getsockname())
    receiver = stack.enter_context(listener.accept()[0])
    receiver.settimeout(10)
    for end in (sender, receiver):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # what is not sent is dropped
    return sender, receiver


def _settle(nodes: list[Namespace], delay_s: float) -> None:
    """Wait for what is still on its way, so that it is not taken for a job's."""
    deadline = time.monotonic() + SETTLE_S + 4 * delay_s
    seen, before = [node.traffic() for node in nodes], None
    while seen != before and time.monotonic() < deadline:
        time.sleep(0.03 + 2 * delay_s)
        seen, before = [node.traffic() for node in nodes], seen


def _round_trip_s(sender: socket.socket, receiver: socket.socket) -> float:
    times: list[float] = []
    while len(times) < 5 or (sum(times) < PINGS_S and len(times) < 200):
        begin = time.perf_counter()
        sender.send(b"x")
        receiver.recv(1)
        receiver.send(b"x")
        sender.recv(1)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _slowest_bits_per_s(flows: list[tuple[socket.socket, socket.socket]], links: int, warm_s: float) -> float:
    chunk, room = bytes(CHUNK), bytearray(4 * CHUNK)
    received = [0] * links
    with selectors.DefaultSelector() as selector:
        for index, (sender, receiver) in enumerate(flows):
            sender.setblocking(False)
            receiver.setblocking(False)
            selector.register(sender, selectors.EVENT_WRITE)
            selector.register(receiver, selectors.EVENT_READ, index % links)
        begin = time.perf_counter()
        start, at_start = math.inf, received
        while True:
            for key, events in selector.select(timeout=0.05):
                end = key.fileobj
                assert isinstance(end, socket.socket)
                if events & selectors.EVENT_READ:
                    received[key.data] += end.recv_into(room)
                else:
                    end.send(chunk)
            now = time.perf_counter()
            if math.isinf(start) and now - begin > warm_s:
                start, at_start = now, received.copy()
            elif now - start > WINDOW_S:
                return min(
                    8 * (after - before) / (now - start) for after, before in zip(received, at_start, strict=True)
                )
