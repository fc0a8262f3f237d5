"""A switched network on this machine: one network namespace per rank, each with a full-duplex link of its own.

Needs root, or `unshare -rn` where user namespaces are allowed.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BURST = "256kb"  # below this, 1 Gbit is not reached: segmentation offload sends bursts of 64 KB
INTERFACE = "e0"


class NotPermitted(RuntimeError):
    """Network namespaces cannot be made here."""


def address(rank: int) -> str:
    """IPv4 address of a rank."""
    return f"10.77.{rank // 250}.{rank % 250 + 1}"


@contextmanager
def namespaces(ranks: int, rate: str | None = None) -> Iterator[list[str]]:
    """Names of `ranks` namespaces, every port limited to `rate` (of tc, as 100mbit) in both directions.

    Raises:
        NotPermitted: this process may not make them, with the system's own words.
    """
    prefix = f"tc{os.getpid()}-"
    names = [f"{prefix}{rank}" for rank in range(ranks)]
    switch = f"{prefix}switch"
    made = []
    try:
        for name in [switch, *names]:
            _run(f"ip netns add {name}")
            made.append(name)
        _run(f"ip -n {switch} link add br0 type bridge")
        _run(f"ip -n {switch} link set br0 up")
        for rank, name in enumerate(names):
            _run(f"ip link add {INTERFACE} netns {name} type veth peer name s{rank} netns {switch}")
            _run(f"ip -n {name} addr add {address(rank)}/16 dev {INTERFACE}")
            _run(f"ip -n {name} link set lo up")
            _run(f"ip -n {name} link set {INTERFACE} up")
            _run(f"ip -n {switch} link set s{rank} master br0 up")
            if rate is not None:
                for where, device in ((name, INTERFACE), (switch, f"s{rank}")):
                    limit = f"rate {rate} burst {BURST} latency 50ms"
                    _run(f"ip netns exec {where} tc qdisc add dev {device} root tbf {limit}")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


def _run(command: str) -> None:
    try:
        done = subprocess.run(command.split(), capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NotPermitted(f"`{command}`: {error}") from error
    if done.returncode:
        raise NotPermitted(f"`{command}` failed: {done.stderr.strip()} (root, or unshare -rn, is needed)")


def sent_bytes() -> int:
    """Bytes that this namespace's interface has sent."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    line = next(line for line in lines if line.strip().startswith(f"{INTERFACE}:"))
    return int(line.split(":")[1].split()[8])
