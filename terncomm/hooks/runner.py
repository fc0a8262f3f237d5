"""Where the path runs: one ordered worker thread on CPU, a side stream on CUDA.

No collective is ever issued from a `.then` callback. Callbacks run in completion order, which differs from rank to
rank; collectives issued from them pair up wrongly, on gloo without any error.
"""

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

Job = Callable[[], torch.Tensor]


class WorkerFailed(RuntimeError):
    """An earlier reduction failed, so this one cannot run; the first error is the cause."""


class OrderedWorker:
    """A daemon thread that runs jobs strictly in the order in which they were submitted.

    After a job has failed the others fail too, with the first error as their cause: ranks may have parted ways.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Job, torch.futures.Future[Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Job) -> torch.futures.Future[torch.Tensor]:
        """Queue a job; the future holds its result, or raises its error in its own words."""
        if self._thread is None:
            self._thread = threading.Thread(target=_run, args=(self._jobs,), name="terncomm", daemon=True)
            self._thread.start()
            weakref.finalize(self, _close, self._jobs, self._thread)  # runs at interpreter exit too
        outcome: torch.futures.Future[Any] = torch.futures.Future()
        self._jobs.put((job, outcome))
        # An exception set on a future that DDP holds surfaces as a cast error; one raised in `then` keeps its words.
        return outcome.then(_unwrap)


def _unwrap(outcome: torch.futures.Future[Any]) -> torch.Tensor:
    value = outcome.value()
    if isinstance(value, BaseException):
        raise value
    return value  # type: ignore[no-any-return]


def _run(jobs: "queue.SimpleQueue[tuple[Job, torch.futures.Future[Any]] | None]") -> None:
    failed: BaseException | None = None
    while (item := jobs.get()) is not None:
        job, outcome = item
        try:
            if failed is not None:
                raise WorkerFailed(f"an earlier gradient reduction failed: {failed}") from failed
            result: Any = job()
        except BaseException as error:
            failed = failed or error
            result = error
        outcome.set_result(result)
        del item, job, outcome, result


def _close(jobs: "queue.SimpleQueue[tuple[Job, torch.futures.Future[Any]] | None]", thread: threading.Thread) -> None:
    """Let an idle worker end; do not wait for one that is stuck in a collective."""
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join(timeout=0.5)


class SideStream:
    """Runs a job at once, on a CUDA stream of its own; the future is complete on the device when the job's work is."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def submit(self, job: Job, device: torch.device) -> torch.futures.Future[torch.Tensor]:
        """Enqueue the job behind the work of the current stream; never waits on the host."""
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[device])
        with torch.cuda.stream(stream):
            result = job()
            result.record_stream(stream)
            future.set_result(result)
        return future
