"""What the hook costs beside encode, exchange and decode, and what its statistics cost.

    python benchmarks/overhead.py               # W = 2
    python benchmarks/overhead.py --record      # and write benchmarks/results/overhead.csv

Steps of four kinds take turns in one run: backward without reduction (`no_sync`), with the hook, with the hook and
statistics read every step, and with the hook whose clocks and looks at clipping are taken out. Medians are compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm.hooks.statistics import ClipWatch
from terncomm.reduce import Clock

CODECS = ("terngrad", "int8")


def measured(codec: str, rounds: int) -> dict[str, object]:
    """The row of a codec, from this rank."""
    torch.manual_seed(0)
    network = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.ReLU())])
    model = DistributedDataParallel(network)
    state = terncomm.register(model, codec, exempt=())
    inputs = torch.randn(256, 1024, generator=torch.Generator().manual_seed(dist.get_rank()))

    def step() -> None:
        model(inputs).square().mean().backward()

    def alone() -> None:
        with model.no_sync():
            step()

    def read() -> None:
        step()
        state.stats()

    def bare() -> None:
        with mock.patch.object(Clock, "_enter"), mock.patch.object(ClipWatch, "measure_bucket", return_value=None):
            step()

    kinds = {"alone": alone, "hook": step, "read": read, "bare": bare}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    accounted = []
    for turn in range(rounds + 3):
        for name, kind in kinds.items():
            model.zero_grad()
            dist.barrier()
            state.reset_stats()
            begin = time.perf_counter()
            kind()
            took = time.perf_counter() - begin
            if turn >= 3:  # the first looks at clipping, and rebuilt buckets
                times[name].append(took)
                if name == "hook":
                    stats = state.stats()
                    accounted.append(stats["encode_s"] + stats["exchange_s"] + stats["decode_s"])

    def percent(shares: list[float]) -> float:
        return round(100 * statistics.median(shares), 1)

    turns = list(zip(times["hook"], accounted, times["alone"], strict=True))
    return {
        "codec": codec,
        "world_size": dist.get_world_size(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "alone_ms": round(1e3 * statistics.median(times["alone"]), 1),
        "hook_ms": round(1e3 * statistics.median(times["hook"]), 1),
        "accounted_ms": round(1e3 * statistics.median(accounted), 1),
        "unaccounted_percent": percent([(hook - spent - without) / without for hook, spent, without in turns]),
        "statistics_percent": percent([r / b - 1 for r, b in zip(times["read"], times["bare"], strict=True)]),
        "steps": rounds,
    }


def rank_main(rounds: int) -> None:
    """One rank; rank 0 prints a JSON line for each codec."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for codec in CODECS:
        row = measured(codec, rounds)
        if dist.get_rank() == 0:
            print(json.dumps(row), flush=True)
        dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--record", action="store_true", help="write the rows to benchmarks/results/overhead.csv")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        rank_main(arguments.rounds)
        return
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {arguments.ranks}".split()
    command = [sys.executable, *torchrun, __file__, "--rounds", str(arguments.rounds)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for row in rows:
        print(
            f"{row['codec']:9} alone {row['alone_ms']} ms, with the hook {row['hook_ms']} ms, of which encode, "
            f"exchange and decode {row['accounted_ms']} ms; beyond these {row['unaccounted_percent']} %, "
            f"statistics {row['statistics_percent']} %"
        )
    if arguments.record:
        from results import write

        write("overhead", rows)


if __name__ == "__main__":
    main()
