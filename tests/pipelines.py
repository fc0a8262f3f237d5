"""Runs small paths through pipelines, one for each rank of a world in threads."""

from itertools import pairwise

import torch

from terncomm.path.pipeline import Pipeline
from terncomm.path.sums import row_edges
from terncomm.transports import LocalTransport


class Chunked:
    """A transport of threads that has `begin`: each message in three transfers."""

    in_flight = 2

    def __init__(self, inner):
        self.inner, self.rank, self.world_size = inner, inner.rank, inner.world_size

    def begin(self, kind, payload):
        rows = payload.expand(self.world_size, -1) if kind == "all_gather" else payload
        received = torch.empty_like(rows, memory_format=torch.contiguous_format)
        cuts = row_edges(rows.shape[1], 3)

        def transfers():
            for begin, end in pairwise(cuts):

                def wait(begin=begin, end=end):
                    received[:, begin:end] = self.inner.all_to_all(rows[:, begin:end].contiguous())

                yield wait

        return received, transfers()


def pipelined(paths_of, world_size, wrapped=lambda transport: transport):
    """Run the paths that `paths_of(rank)` gives, one pipeline for each rank; their futures' outcomes, rank by rank."""
    pipelines = [Pipeline() for _ in range(world_size)]
    failed = []

    def failing(error, phase):
        failed.append((error, phase))
        return error

    futures = []
    for transport, pipeline in zip(LocalTransport.world(world_size, timeout_s=20), pipelines, strict=True):
        transports = {"all": wrapped(transport)}
        paths = paths_of(transport.rank)
        futures.append([pipeline.submit(path, transports, clock, failing) for path, clock in paths])
    outcomes = []
    for each in futures:
        outcomes.append([])
        for future in each:
            try:
                outcomes[-1].append(future.wait())
            except Exception as error:
                outcomes[-1].append(error)
    return outcomes, failed


def ask(*requests, result=None):
    """A path that asks for these and returns the last answer, or `result`."""
    answer = None
    for request in requests:
        answer = yield request
    return answer if result is None else result


def octets(*values):
    return torch.tensor(values, dtype=torch.uint8)
