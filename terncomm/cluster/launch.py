"""Starts a command as the ranks of a job, one process each, and sees every one of them to its end.

Ranks are started directly, without torchrun's agents, with the environment that torchrun gives its workers.
"""

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import IO, BinaryIO

from terncomm.cluster.guard import Guard
from terncomm.cluster.interrupts import Interrupts
from terncomm.cluster.namespaces import INTERFACE, address
from terncomm.cluster.network import Network

FAILED_GRACE_S = 5.0  # for the others to say what they miss
TERM_GRACE_S = 3.0
TIMED_OUT = 124  # as timeout(1) ends


class LinkEnded(RuntimeError):
    """The process of a user-space link ended while ranks ran."""


@dataclass(frozen=True)
class Job:
    """What to run.

    Args:
        command: a script (*.py) or -m and a module, run by this interpreter, or an executable; with its arguments.
        ranks_per_node: ranks that share a namespace and its link.
        environment: for every rank, beside what `environment` of this module says.
        timeout_s: after this the job is ended.
    """

    command: list[str]
    ranks_per_node: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    timeout_s: float | None = None

    @property
    def argv(self) -> list[str]:
        """The command with the interpreter, where it needs one."""
        script = self.command[0] == "-m" or self.command[0].endswith(".py")
        return [sys.executable, *self.command] if script else self.command


def environment(rank: int, ranks: int, per_node: int, port: int) -> dict[str, str]:
    """What torchrun tells a worker, and by which interface backends are to speak.

    gloo, tensorpipe and NCCL take the namespace's interface. NCCL's ways around the network (peer to peer, shared
    memory) are switched off. OpenMP has one thread, as under torchrun, unless OMP_NUM_THREADS is set.
    """
    nodes = ranks // per_node
    told = {
        "RANK": rank,
        "LOCAL_RANK": rank % per_node,
        "GROUP_RANK": rank // per_node,
        "ROLE_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": per_node,
        "GROUP_WORLD_SIZE": nodes,
        "ROLE_WORLD_SIZE": ranks,
        "ROLE_NAME": "default",
        "MASTER_ADDR": address(0),
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "TP_SOCKET_IFNAME": INTERFACE,
        "NCCL_SOCKET_IFNAME": INTERFACE,
        "NCCL_P2P_DISABLE": 1,
        "NCCL_SHM_DISABLE": 1,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # A namespace has no name service, and c10d would warn on every rank that addresses have no names.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    return {name: str(value) for name, value in told.items()}


def run(network: Network, job: Job, guard: Guard, interrupts: Interrupts) -> int:
    """Run the job and return its exit status: 0, the first failed rank's (128 + the signal that killed it), or 124.

    Rank 0 writes where this process writes; lines of other ranks are prefixed. When a rank fails the others have a few
    seconds to say so themselves, then they are ended, and with them all that ranks have started.

    Raises:
        LinkEnded: the user-space link is gone.
        OSError: the command cannot be started.
    """
    with network.nodes[0].inside(), socket.create_server((address(0), 0)) as free:
        port = free.getsockname()[1]
    ranks = len(network.nodes) * job.ranks_per_node
    running = _Running(network, guard)
    try:
        for rank in range(ranks):
            env = os.environ | environment(rank, ranks, job.ranks_per_node, port) | job.environment
            with interrupts.held():
                running.start(rank, rank // job.ranks_per_node, job.argv, env)
        return running.wait(job.timeout_s)
    finally:
        running.end()


class _Running:
    """Processes of ranks. They are reaped at the very end, so that until then their group numbers are their own."""

    def __init__(self, network: Network, guard: Guard) -> None:
        self.network = network
        self.guard = guard
        self.ranks: dict[int, subprocess.Popen[bytes]] = {}
        self.alive: set[int] = set()
        self.pipes: list[_Pipe] = []
        self.stack = ExitStack()
        self.selector = self.stack.enter_context(selectors.DefaultSelector())
        if network.switch:
            self._watch(network.switch.pid, None)

    def _watch(self, pid: int, rank: int | None) -> None:
        descriptor = os.pidfd_open(pid)
        self.stack.callback(os.close, descriptor)
        self.selector.register(descriptor, selectors.EVENT_READ, rank)

    def start(self, rank: int, node: int, argv: list[str], env: dict[str, str]) -> None:
        out = subprocess.PIPE if rank else None
        with self.network.nodes[node].inside():
            process = subprocess.Popen(
                argv, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        self.guard.add("group", process.pid)
        self.ranks[rank] = process
        self.alive.add(rank)
        self._watch(process.pid, rank)
        for source, sink in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer)):
            if source is not None:
                pipe = _Pipe(f"[rank {rank}] ".encode(), self.stack.enter_context(source), sink)
                self.pipes.append(pipe)
                self.selector.register(source, selectors.EVENT_READ, pipe)

    def wait(self, timeout_s: float | None) -> int:
        status = 0
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.alive:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                if not status:
                    status = TIMED_OUT
                    say(f"not done within {timeout_s:g} s: ranks {_list(self.alive)} are ended")
                else:
                    say(f"ranks {_list(self.alive)} still run, and are ended")
                break
            for key, _ in self.selector.select(left):
                if isinstance(key.data, _Pipe):
                    if not key.data.copy():
                        self.selector.unregister(key.fileobj)
                    continue
                self.selector.unregister(key.fileobj)
                if key.data is None:
                    raise LinkEnded("the user-space link ended while ranks ran")
                self.alive.discard(key.data)
                code = _status(self.ranks[key.data].pid)
                if code and not status:
                    status = code if code > 0 else 128 - code
                    how = f"failed with status {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
                    say(f"rank {key.data} {how}")
                    grace = time.monotonic() + FAILED_GRACE_S
                    deadline = grace if deadline is None else min(deadline, grace)
        return status

    def end(self) -> None:
        """End what runs, pass on what was written, reap."""
        self._signal(signal.SIGTERM, self.alive)
        deadline = time.monotonic() + TERM_GRACE_S
        while self.alive and time.monotonic() < deadline:
            self.alive = {rank for rank in self.alive if _status(self.ranks[rank].pid) is None}
            time.sleep(0.01)
        self._signal(signal.SIGKILL, set(self.ranks))
        for pipe in self.pipes:
            pipe.finish()
        for process in self.ranks.values():
            process.wait()
            self.guard.add("ended", process.pid)
        self.stack.close()

    def _signal(self, number: int, ranks: set[int]) -> None:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.killpg(self.ranks[rank].pid, number)


class _Pipe:
    """What a rank writes, passed on in whole lines, each with a prefix."""

    def __init__(self, prefix: bytes, source: IO[bytes], sink: BinaryIO) -> None:
        self.prefix = prefix
        self.source = source
        self.sink = sink
        self.rest = b""
        os.set_blocking(source.fileno(), False)

    def copy(self) -> bool:
        """Pass on the lines that have come; False at the end of the pipe."""
        data = os.read(self.source.fileno(), 1 << 16)
        *lines, self.rest = (self.rest + data).split(b"\n")
        if not data and self.rest:
            lines.append(self.rest)
            self.rest = b""
        if lines:
            self.sink.write(b"".join(self.prefix + line + b"\n" for line in lines))
            self.sink.flush()
        return bool(data)

    def finish(self) -> None:
        """Pass on what is left, whether or not another process still holds the pipe open."""
        with suppress(BlockingIOError, BrokenPipeError):
            while self.copy():
                pass
        if self.rest:
            self.sink.write(self.prefix + self.rest + b"\n")
            self.sink.flush()


def say(text: str) -> None:
    """One line on standard error; standard output is the script's."""
    sys.stdout.flush()
    print(f"terncomm cluster: {text}", file=sys.stderr, flush=True)


def _status(pid: int) -> int | None:
    """Exit status, or minus the signal that killed it, or None while it runs; the process is not reaped."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _list(ranks: set[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
