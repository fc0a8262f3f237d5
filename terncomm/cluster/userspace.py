"""The user-space link: a switch that hands frames on after a delay, for kernels without `netem`.

Run as a program of its own, from this file and without the package: `network` starts it in a switch namespace with one
packet socket per port. Rates stay with `tbf`, at both ends; this process adds the delay. Frames come with segmentation
left to do (up to 64 KB), so a system call moves what would be 45 packets. Between two ports frames keep their order,
with jitter too: one that would overtake waits for the one before it. Where a port's queue is full, its frames wait
here and none is dropped. It ends when its standard input closes, that is when whoever started it ends, however.

On a machine of two cores (EPYC, 2026-11) four ports carried 1 Gbit/s each, two ports 2 Gbit/s each; delays of 0.2 to
1 ms were 0.06 ms longer than asked, of 10 and 25 ms 0.2 ms longer, TCP's own time included.

Nothing but the standard library is imported: the process starts in a moment.
"""

import contextlib
import gc
import heapq
import json
import os
import random
import select
import socket
import struct
import sys
import time
from collections import deque

ETH_P_ALL = 3
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23  # of linux/if_packet.h
SO_RCVBUFFORCE, SO_TIMESTAMPNS = 33, 35
VNET_HDR_BYTES = 10  # struct virtio_net_hdr stands before each frame
PR_SET_TIMERSLACK = 29
M_TRIM_THRESHOLD, M_TOP_PAD = -1, -2
LARGEST_FRAME = 70_000
BATCH = 16  # frames read from a port before others have their turn


def port(interface: str, queue_bytes: int) -> socket.socket:
    """A packet socket on an interface of the present namespace.

    queue_bytes: sent frames that may wait in the kernel, no more than the interface's queue takes: none is dropped.
    """
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    made.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    made.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    made.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, queue_bytes // 2)  # the kernel doubles it
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)  # as much of it as is allowed
    with contextlib.suppress(PermissionError):  # in a user namespace
        made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
    made.bind((interface, ETH_P_ALL))
    return made


def hardware_address(index: int) -> str:
    """Ethernet address of the host on a port; frames are sent on by its last two bytes."""
    return f"02:00:00:00:{index >> 8:02x}:{index & 255:02x}"


def switch(ports: list[socket.socket], lifeline: int, delay_s: float, jitter_s: float, loss: float) -> None:
    """Hand frames on until `lifeline` closes.

    A frame's delay counts from the kernel's time stamp of its arrival, and the sleep before it is due is shortened by
    how late such sleeps end (a moving average), so neither a busy machine nor a slow timer adds to it on average.

    delay_s: of every frame, changed by up to `jitter_s` either way, evenly.
    loss: probability that a frame is lost.
    """
    now, wall, push, pop, draw = time.monotonic, time.time, heapq.heappush, heapq.heappop, random.random
    stamp = struct.Struct("qq").unpack  # timespec
    count = len(ports)
    of_descriptor = {made.fileno(): index for index, made in enumerate(ports)}
    receive = [made.recvmsg for made in ports]
    send = [made.send for made in ports]
    others = [[j for j in range(count) if j != i] for i in range(count)]
    waiting: list[deque[bytes]] = [deque() for _ in ports]  # for room in a port's queue
    due: list[tuple[float, int, int, bytes]] = []  # when, order of arrival, port, frame
    last = [[0.0] * count for _ in ports]  # due time of the last frame between two ports
    serial = 0
    late_s = 50e-6
    shift_s = now() - wall()  # stamps are of the wall clock, which may be set
    watched = [lifeline, *of_descriptor]
    while True:
        full = [ports[index] for index in range(count) if waiting[index]]
        wake = due[0][0] - late_s if due else 0.0
        timeout = max(wake - now(), 0.0) if due else None
        readable, writable, _ = select.select(watched, full, [], timeout)
        if timeout and not readable and not writable:
            late_s += 0.05 * (min(now() - wake, 1e-3) - late_s)
        for made in writable:
            index = of_descriptor[made.fileno()]
            queue = waiting[index]
            with contextlib.suppress(BlockingIOError):
                while queue:
                    send[index](queue[0])
                    queue.popleft()
        begin, read = now(), wall()
        if now() - begin < 50e-6:  # not preempted in between
            shift_s = begin - read
        for descriptor in readable:
            if descriptor == lifeline:
                return
            source = of_descriptor[descriptor]
            take = receive[source]
            with contextlib.suppress(BlockingIOError):
                for _ in range(BATCH):
                    frame, ancillary, _, _ = take(LARGEST_FRAME, 32)
                    if loss and draw() < loss:
                        continue
                    seconds, nanoseconds = stamp(ancillary[0][2])
                    when = min(seconds + 1e-9 * nanoseconds + shift_s, now()) + delay_s
                    target = frame[14] << 8 | frame[15]
                    known = frame[10] == 2 and target < count
                    for index in (target,) if known else others[source]:
                        varied = when + jitter_s * (2 * draw() - 1) if jitter_s else when
                        moment = last[source][index] = max(varied, last[source][index])
                        serial += 1
                        push(due, (moment, serial, index, frame))
        time_now = now()
        while due and due[0][0] <= time_now:
            _, _, target, frame = pop(due)
            if waiting[target]:
                waiting[target].append(frame)
                continue
            try:
                send[target](frame)
            except BlockingIOError:
                waiting[target].append(frame)


def main() -> None:
    """Run the switch that the first argument describes, in JSON."""
    asked = json.loads(sys.argv[1])
    import ctypes

    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_TIMERSLACK, 1)  # sleep to the microsecond
    libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)  # memory of frames is kept for the next ones
    libc.mallopt(M_TOP_PAD, 16 << 20)
    with contextlib.suppress(PermissionError):  # busy ranks must not delay frames
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    gc.disable()
    ports = [socket.socket(fileno=descriptor) for descriptor in asked["ports"]]
    switch(ports, 0, asked["delay_s"], asked["jitter_s"], asked["loss"])


if __name__ == "__main__":
    main()
