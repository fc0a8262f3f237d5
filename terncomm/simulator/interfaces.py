"""Network interfaces of this machine: which there are, and which one carries what is sent."""

import fcntl
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915


def addresses() -> dict[str, str]:
    """Name -> IPv4 address of every interface, "" for one that has none."""
    return {name: _address(name) for _, name in socket.if_nameindex()}


def _address(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def bits_per_s(name: str) -> float | None:
    """What the driver says the interface can do; None where it says nothing."""
    try:
        megabits = int(Path(f"/sys/class/net/{name}/speed").read_text())
    except (OSError, ValueError):
        return None
    return megabits * 1e6 if megabits > 0 else None


def traffic() -> dict[str, tuple[int, int]]:
    """Name -> bytes sent and received since it is up, of the interfaces in the calling thread's namespace."""
    found = {}
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        counts = numbers.split()
        found[name.strip()] = int(counts[8]), int(counts[0])
    return found


def busiest(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> str:
    """The interface that sent most between two readings of :func:`traffic`."""
    return max(after, key=lambda name: after[name][0] - before.get(name, (0, 0))[0])


def missing(variable: str, value: str) -> str | None:
    """What is wrong with the value of GLOO_SOCKET_IFNAME, names, or of NCCL_SOCKET_IFNAME; None if nothing is.

    NCCL takes beginnings of names, names after "=", and after "^" what it shall not use.

    >>> missing("GLOO_SOCKET_IFNAME", "lo") is None
    True
    """
    there = addresses()
    if value.startswith("^"):
        return None
    exact = value.startswith("=") or variable.startswith("GLOO")
    for name in filter(None, value.lstrip("=").split(",")):
        if not any(known == name if exact else known.startswith(name) for known in there):
            known = ", ".join(f"{known} ({address or 'no address'})" for known, address in there.items())
            return f"there is no interface {name}; there are: {known}"
    return None


def machine_id() -> str:
    """Equal for processes that share a machine, whatever containers and network namespaces they are in."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
