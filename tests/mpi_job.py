"""What the ranks of tests/test_mpi.py run under mpirun. torch.distributed must not be needed."""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from golden import loops
from laws import messages_in_flight_bring_the_same, octets, rows_in_rank_order
from test_loop import reduce_otherwise
from torch import nn

import terncomm
from terncomm.transports import MPITransport, RankFailed


def conformance(transport):
    for k in (0, 1, 7, 1000, 300_001):
        rows_in_rank_order(transport, k)
    messages_in_flight_bring_the_same(transport, (0, 1, 300_001, 7, 1000, 2, 65_537))
    mine = octets(transport.rank, 5)
    for _ in range(20):
        transport.all_gather(mine).zero_()
    assert torch.equal(mine, octets(transport.rank, 5)), "what is received is one's own"
    return "fine"


def network():
    """The same weights wherever it is made, in a thread too."""
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.Linear(64, 5))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def digest(transport, codec, device="cpu"):
    """Of the gradients after three steps."""
    torch.set_num_threads(1)
    model, found = network().to(device), hashlib.sha256()
    for step in range(3):
        model.zero_grad()
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(10 * step + transport.rank))
        model(inputs.to(device)).square().mean().backward()
        terncomm.reduce_gradients(model, codec, transport, seed=1)
        for parameter in model.parameters():
            found.update(parameter.grad.cpu().numpy().tobytes())
    return found.hexdigest()


def raises(transport):
    if transport.rank == 1:
        raise KeyError("rank 1 broke")
    transport.all_gather(octets(0, 10))


def killed(transport):
    if transport.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    transport.all_gather(octets(0, 10))


def leaves(transport):
    """A rank that ends quietly after its first exchange is not waited for."""
    transport.all_gather(octets(transport.rank, 10))
    if transport.rank == 1:
        sys.exit(0)
    began = time.monotonic()
    try:
        transport.all_gather(octets(0, 10))
    except RankFailed as error:
        Path(sys.argv[1], f"told-{transport.rank}").write_text(json.dumps([str(error), time.monotonic() - began]))
        raise


def silent(transport):
    if transport.rank == 1:
        time.sleep(3)
        return "late"
    begin = time.monotonic()
    try:
        transport.all_gather(octets(0, 10))
    except RankFailed as error:
        told = [str(error)]
        try:
            transport.all_gather(octets(0, 10))
        except RankFailed as again:
            told.append(str(again))
        print(json.dumps([*told, time.monotonic() - begin]), flush=True)
        os._exit(0)  # MPI cannot take back a call that is under way


def interrupted(transport):
    """What an interrupt leaves under way must not be taken for the answer to a later call."""

    def interrupt(*_):
        raise KeyboardInterrupt

    if transport.rank == 1:
        time.sleep(3)
        return "late"
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        transport.all_gather(octets(0, 10))
    except KeyboardInterrupt:
        try:
            transport.all_gather(octets(0, 10))
        except RankFailed as error:
            print(json.dumps(str(error)), flush=True)
    os._exit(0)


TOGETHER = (  # name, ranks, arguments; the last leaves its transport in disorder
    ("conformance", 1),
    ("conformance", 3),
    ("digest", 4, "terngrad"),
    ("digest", 2, "int8"),
    ("otherwise", 2),
)


def together(transport):
    """Several cases in one job of four ranks, for it takes long to start one: each over the first few ranks."""
    from mpi4py import MPI  # not where this module is imported for its functions

    told = {}
    for name, ranks, *arguments in TOGETHER:
        inside = transport.rank < ranks
        comm = MPI.COMM_WORLD.Split(0 if inside else MPI.UNDEFINED, transport.rank)
        if inside:
            told[f"{name} {ranks}"] = CASES[name](MPITransport(comm, timeout_s=60), *arguments)
    return told


CASES = {
    "conformance": conformance,
    "digest": digest,
    "golden": loops,
    "otherwise": reduce_otherwise,
    "leaves": leaves,
    "raises": raises,
    "killed": killed,
    "silent": silent,
    "interrupted": interrupted,
    "together": together,
}


def main():
    torch.set_num_threads(1)
    folder, what, *arguments = sys.argv[1:]
    transport = MPITransport(timeout_s=0.5 if what == "silent" else 60)
    result = CASES[what](transport, *arguments)
    assert not torch.distributed.is_initialized()
    Path(folder, str(transport.rank)).write_text(json.dumps(result))  # lines of ranks may be mixed on standard output


if __name__ == "__main__":
    main()
