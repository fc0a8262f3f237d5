"""Runs the path of a CUDA bucket on a side stream."""

from collections.abc import Callable

import torch

Job = Callable[[], torch.Tensor]


class SideStream:
    """Runs jobs on a CUDA stream of its own, one for each device. A job is a function that returns a CUDA tensor."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def submit(self, job: Job, device: torch.device) -> torch.futures.Future[torch.Tensor]:
        """Run the job at once. Its kernels run after those already on the current stream; the host does not wait.

        Returns:
            A future of the job's tensor, complete on the device when the job's kernels are.
        """
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[device])
        with torch.cuda.stream(stream):
            result = job()
            result.record_stream(stream)
            future.set_result(result)
        return future
