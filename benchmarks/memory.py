"""Peak memory that the hook takes beside a DDP job's own, against the size of the largest bucket.

    python benchmarks/memory.py                 # W = 8, buckets of 25 MB
    python benchmarks/memory.py --record        # and write benchmarks/results/memory.csv

Every rank steps a model of one bucket; the high-water mark of its resident memory in a step, above what it held before
the step, is compared with the same of a step without a hook whose exchange is left out (`no_sync`).
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import socket
import statistics
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm import ops

LIMIT = 1.25  # times the bucket
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Flat(nn.Module):
    """Layers that make one bucket of about `nbytes`; half of a millionth of it is 1-D and travels exactly."""

    def __init__(self, nbytes: int, dtype: torch.dtype) -> None:
        super().__init__()
        width = int((nbytes / 8 / dtype.itemsize) ** 0.5) // 8 * 8
        layers = [layer for _ in range(8) for layer in (torch.zeros(width, width), torch.zeros(width))]
        self.layers = nn.ParameterList(nn.Parameter(layer.to(dtype)) for layer in layers)

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        return sum((layer * scale).sum() for layer in self.layers)


def memory(name: str) -> float:
    """A number of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * float(line.split()[1])


def peak_of(step) -> float:
    """How far resident memory rises above its present level while `step` runs, bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    step()
    return memory("VmHWM") - before


def rank_main(rank: int, world_size: int, port: int, case: tuple[str, str, int], out: Connection) -> None:
    codec, dtype, nbytes = case
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back, and is seen when taken again
    address = f"tcp://127.0.0.1:{port}"
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size, timeout=limit)
    model = DistributedDataParallel(Flat(nbytes, DTYPES[dtype]), bucket_cap_mb=10_000, gradient_as_bucket_view=True)
    with warnings.catch_warnings(action="ignore"):  # advice on clipping
        state = terncomm.register(model, "terngrad" if codec == "exact" else codec, exempt=())
    if codec == "exact":
        state.disable()
    scale = torch.full((1,), 1e-3 * (rank + 1), dtype=DTYPES[dtype])

    def step() -> None:
        model(scale).backward()

    def alone() -> None:
        with model.no_sync():
            step()

    for _ in range(4):  # the first look at clipping, rebuild the buckets, fill caches
        step()
    bucket = sum(p.numel() for p in model.parameters()) * DTYPES[dtype].itemsize
    base = statistics.median(peak_of(alone) for _ in range(3))
    peak = statistics.median(peak_of(step) for _ in range(3))
    out.send((bucket, peak - base))
    dist.barrier()
    dist.destroy_process_group()


def measure(world_size: int, codec: str, dtype: str, nbytes: int) -> dict[str, object]:
    """One row: the largest over ranks."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    ranks = [
        context.Process(target=rank_main, args=(rank, world_size, port, (codec, dtype, nbytes), there), daemon=True)
        for rank, (_, there) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
    for _, there in pipes:
        there.close()
    try:
        told = [here.recv() for here, _ in pipes]
    finally:
        for rank in ranks:
            rank.join(30)
            rank.kill()
    bucket, extra = told[0][0], max(extra for _, extra in told)
    return {
        "codec": codec,
        "dtype": dtype,
        "world_size": world_size,
        "bucket_mb": round(bucket / 1e6, 1),
        "extra_mb": round(extra / 1e6, 1),
        "times_bucket": round(extra / bucket, 2),
        "limit": LIMIT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--megabytes", type=float, default=25, help="size of the bucket")
    parser.add_argument("--codecs", nargs="+", default=["terngrad", "int8", "exact"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines")
    parser.add_argument("--record", action="store_true", help="write the rows to benchmarks/results/memory.csv")
    arguments = parser.parse_args()
    ops.compile_kernels()
    rows = []
    for dtype in arguments.dtypes:
        for codec in arguments.codecs:
            row = measure(arguments.ranks, codec, dtype, int(arguments.megabytes * 1e6))
            rows.append(row)
            text = f"{codec:9} {dtype:9} bucket {row['bucket_mb']:6} MB  extra {row['extra_mb']:6} MB"
            print(json.dumps(row) if arguments.json else f"{text}  {row['times_bucket']:5}x", flush=True)
    if arguments.record:
        from results import write

        write("memory", rows)


if __name__ == "__main__":
    main()
