"""Rank processes that live as long as the test session, joined by gloo into a world of any size up to their number.

A test sends a module-level function; every rank calls it and sends back what it returned. A rank that raises, dies,
takes too long or writes anything fails the call, and a call that failed ends all ranks: the next one gets fresh ones.
Ranks serve worlds of several sizes in turn (their group is destroyed and made anew), for starting one takes seconds.
"""

import faulthandler
import gc
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

from terncomm import ops

START_LIMIT_S = 240.0  # a cold cache of kernels is compiled meanwhile
GRACE_S = 5.0  # for the other ranks, once one has failed
SMALL_MODELS = (  # what terncomm says of the models of tests, also in pyproject.toml
    "only .* elements are compressed",
    "parameters without their module",
)


@contextmanager
def encoding_breaks(here: bool) -> Iterator[None]:
    """Inside, encoding raises, if it is to break on this rank."""
    with mock.patch.object(ops, "encode_pack", side_effect=ValueError("boom")) if here else nullcontext():
        yield


class RankError(RuntimeError):
    """What went wrong, rank by rank, with tracebacks."""


class _Rank:
    """One process, the pipe to it, and what it writes."""

    def __init__(self, rank: int, directory: Path) -> None:
        self.rank = rank
        self._log = directory / f"rank-{rank}"
        self._read = 0
        ours, theirs = multiprocessing.Pipe()
        path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"import ranks; ranks.serve({rank}, {theirs.fileno()})"],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
            )
        theirs.close()
        self.connection = ours

    def send(self, function: Callable[..., Any], *args: Any) -> None:
        self.connection.send_bytes(pickle.dumps((function, args)))

    def receive(self) -> tuple[bool, Any]:
        try:
            return pickle.loads(self.connection.recv_bytes())  # type: ignore[no-any-return]
        except (EOFError, OSError):
            return False, f"died with exit status {self.process.wait()}"

    def written(self) -> str:
        """What it has written since it was last asked."""
        data = self._log.read_bytes()
        self._read, begin = len(data), self._read
        return data[begin:].decode(errors="replace")


class Ranks:
    """Rank processes, started when first needed."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="terncomm-ranks-")
        self._ranks: list[_Rank] = []
        self._world_size = 0
        self._worlds = 0

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, limit_s: float = 60.0) -> list[Any]:
        """`function(*args)` on every rank of a world of `world_size`; results in rank order.

        Raises:
            RankError: it failed on a rank, which is told with its traceback.
        """
        try:
            self._join(world_size)
            return self._call(self._ranks[:world_size], limit_s, function, *args)
        except BaseException:
            self.kill()
            raise

    def _join(self, world_size: int) -> None:
        if self._world_size == world_size:
            return
        self._leave()
        path = Path(self._directory.name)
        self._ranks += [_Rank(rank, path) for rank in range(len(self._ranks), world_size)]
        self._worlds += 1
        self._call(self._ranks[:world_size], START_LIMIT_S, join, world_size, str(path / f"store-{self._worlds}"))
        self._world_size = world_size

    def _leave(self) -> None:
        joined, self._world_size = self._ranks[: self._world_size], 0
        self._call(joined, 30.0, leave)

    def _call(self, ranks: list[_Rank], limit_s: float, function: Callable[..., Any], *args: Any) -> list[Any]:
        for rank in ranks:
            rank.send(function, *args)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + limit_s
        while late := {r.connection: r for r in ranks if r.rank not in results and r.rank not in failures}:
            ready = wait(list(late), max(0.0, deadline - time.monotonic()))
            if not ready:
                for rank in late.values():
                    rank.process.send_signal(signal.SIGUSR1)  # it writes where its threads are
                    failures[rank.rank] = f"no answer within {limit_s:g} s"
                time.sleep(0.5)
            for connection in ready:
                rank = late[connection]  # type: ignore[index]
                fine, value = rank.receive()
                if fine:
                    results[rank.rank] = value
                else:
                    failures[rank.rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        for rank in ranks:
            if text := rank.written():
                failures[rank.rank] = f"{failures.get(rank.rank, 'returned')}\nand wrote:\n{text}"
        if failures:
            raise RankError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        return [results[rank.rank] for rank in ranks]

    def close(self) -> None:
        """End the ranks as programs end: barrier, destroy, return. Raises if one does not, or has something to say."""
        try:
            self._leave()
            for rank in self._ranks:
                rank.connection.send_bytes(pickle.dumps(None))
            codes = [rank.process.wait(60) for rank in self._ranks]
            written = [rank.written() for rank in self._ranks]
        finally:
            self.kill()
            self._directory.cleanup()
        if any(codes) or any(written):
            raise RankError(f"ranks ended with exit status {codes} and wrote: {written}")

    def kill(self) -> None:
        """End the ranks at once."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.wait()
            rank.connection.close()
        self._ranks, self._world_size = [], 0


# ---- in the rank -----------------------------------------------------------------------------------------------------

_rank = 0


def serve(rank: int, descriptor: int) -> None:
    """What a rank's process runs."""
    import torch

    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    global _rank
    _rank = rank
    connection = Connection(descriptor)
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, tasks), daemon=True).start()
    while (task := tasks.get()) is not None:
        connection.send_bytes(_answer(task))
        gc.collect()
        gc.freeze()  # what is left are modules, and looking at them again takes long


def join(world_size: int, store: str) -> None:
    import torch.distributed as dist

    from terncomm import ops

    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=_rank, world_size=world_size, timeout=limit)
    ops.compile_kernels()


def leave() -> None:
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()


def _listen(connection: Connection, tasks: "queue.SimpleQueue[Any]") -> None:
    """Pass tasks on. Nobody is there to answer once the tests' process has gone."""
    task: Any = b""
    while task is not None:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)
        task = None if message == pickle.dumps(None) else message
        tasks.put(task)


def _answer(task: bytes) -> bytes:
    import torch

    try:
        with warnings.catch_warnings():
            function, args = pickle.loads(task)
            warnings.simplefilter("error")
            for words in SMALL_MODELS:
                warnings.filterwarnings("ignore", words)
            torch.manual_seed(0)
            return pickle.dumps((True, function(*args)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


def quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """For functions on ranks that compile: without what the compiler says of itself, and forgotten afterwards."""
    import torch

    def run(*args: Any) -> Any:
        logging.getLogger("torch").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return function(*args)
            finally:
                torch._dynamo.reset()
                logging.getLogger("torch").setLevel(logging.WARNING)

    return run
