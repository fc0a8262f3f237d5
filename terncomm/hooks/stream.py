"""Where the path of a CUDA bucket runs: on a side stream."""

from collections.abc import Callable

import torch

Job = Callable[[], torch.Tensor]


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
