"""Network namespaces of this process: each is a host with one interface.

They have no name and leave nothing behind: the kernel removes one, its interfaces and its links, when the last process
or descriptor that holds it is gone. Needs root, or `unshare -rn` where user namespaces are allowed.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from terncomm.simulator import interfaces

INTERFACE = "e0"
NEWNET = 0x40000000  # CLONE_NEWNET of sched.h

_libc = ctypes.CDLL(None, use_errno=True)


class NotPermitted(RuntimeError):
    """Network namespaces, or a limit on their links, cannot be made here."""


def address(node: int) -> str:
    """IPv4 address of a node."""
    return f"10.77.{node // 250}.{node % 250 + 1}"


def enter(path: str | int) -> None:
    """Move the calling thread to the network namespace of a path, or of a descriptor."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if isinstance(path, str) else path
    try:
        if _libc.setns(descriptor, NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {path}: {os.strerror(ctypes.get_errno())}")
    finally:
        if isinstance(path, str):
            os.close(descriptor)


class Namespace:
    """A new network namespace, kept until it is closed.

    Raises:
        NotPermitted: this process may not make one.
    """

    def __init__(self) -> None:
        home = _current()
        try:
            if _libc.unshare(NEWNET):
                why = os.strerror(ctypes.get_errno())
                raise NotPermitted(f"this process may not make a network namespace ({why}; root, or unshare -rn, may)")
            self.descriptor = _current()
            enter(home)
        finally:
            os.close(home)

    @property
    def path(self) -> str:
        """Where other processes of this user find it, for `enter` and for `nsenter --net=`, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What this thread opens or starts in the block belongs to the namespace, and stays there."""
        home = _current()
        try:
            enter(self.descriptor)
            yield
        finally:
            enter(home)
            os.close(home)

    def configure(self, *lines: str) -> None:
        """Give lines to `ip` and `tc`, named by their first word.

        Raises:
            NotPermitted: one fails; with the system's own words.
        """
        with self.inside():
            for line in lines:
                try:
                    done = subprocess.run(line.split(), capture_output=True, text=True)
                except FileNotFoundError:
                    raise NotPermitted(f"`{line.split()[0]}` is not installed (Debian: iproute2)") from None
                if done.returncode:
                    raise NotPermitted(f"`{line}` failed: {' '.join(done.stderr.split())}")

    def traffic(self) -> tuple[int, int]:
        """Bytes that the interface has sent, and received."""
        with self.inside():
            return traffic()

    def close(self) -> None:
        """Let go: the namespace ends with its last process."""
        os.close(self.descriptor)


def traffic() -> tuple[int, int]:
    """Bytes that the interface has sent, and received, in the calling thread's namespace."""
    return interfaces.traffic()[INTERFACE]


def _current() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
