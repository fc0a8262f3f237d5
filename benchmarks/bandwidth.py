"""Step time of a real DDP job on really limited links: one network namespace per rank, `tbf` on both ends of each link.

    python benchmarks/bandwidth.py                       # as root: 100 Mbit and 1 Gbit, 4 ranks
    python benchmarks/bandwidth.py --record              # and write benchmarks/results/bandwidth.csv
    unshare -rn python benchmarks/bandwidth.py           # without root, where user namespaces are allowed

Every rank steps a stack of linear layers with each codec in turn. Bytes are read from the rank's interface.
"""

import argparse
import json
import statistics
import time

from limited_ranks import lines

from terncomm.cluster.namespaces import NotPermitted, traffic

CODECS = ("none", "fp16", "bf16", "int8", "terngrad")


def rank_main(arguments: argparse.Namespace) -> None:
    """One rank: time `--steps` steps of every codec; rank 0 prints a JSON line for each."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
    from torch.nn.parallel import DistributedDataParallel

    import terncomm

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for codec in CODECS:
        torch.manual_seed(0)
        width = 1024
        layers = [nn.Linear(width, width) for _ in range(arguments.layers)]
        model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=25)
        if codec == "fp16":
            model.register_comm_hook(None, fp16_compress_hook)
        elif codec != "none":
            terncomm.register(model, codec, exempt=())
        inputs = torch.randn(2, width, generator=torch.Generator().manual_seed(dist.get_rank()))
        times, before = [], 0
        for step in range(arguments.steps + 2):
            if step == 2:
                before = traffic()[0]
            dist.barrier()
            begin = time.perf_counter()
            model(inputs).square().mean().backward()
            times.append(time.perf_counter() - begin)
            model.zero_grad()
        sent = (traffic()[0] - before) / arguments.steps
        if dist.get_rank() == 0:
            parameters = sum(p.numel() for p in model.parameters())
            row = {"codec": codec, "parameters": parameters, "bytes_per_step": round(sent), "times": times[2:]}
            print(json.dumps(row), flush=True)
        dist.barrier()
        del model
    dist.barrier()
    dist.destroy_process_group()


def measure(rate: str, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of all codecs on links of `rate`."""
    command = ["--rank-of", rate, "--steps", str(arguments.steps), "--layers", str(arguments.layers)]
    try:
        rounds = [list(lines(__file__, command, arguments.ranks, rate)) for _ in range(arguments.rounds)]
    except NotPermitted as error:
        raise SystemExit(f"bandwidth.py: {error}") from None
    # A connection may stay slow for all its life, so each round has new ones.
    found = [
        {**same[0], "times": [each for one in same for each in one["times"]]} for same in zip(*rounds, strict=True)
    ]
    base = statistics.median(found[0]["times"])
    rows = []
    for one in found:
        step_s = statistics.median(one["times"])
        rows.append(
            {
                "codec": one["codec"],
                "link": rate,
                "world_size": arguments.ranks,
                "parameters": one["parameters"],
                "step_ms": round(1e3 * step_s, 1),
                "times_faster_than_none": round(base / step_s, 2),
                "interface_bytes_per_step": one["bytes_per_step"],
                "times_fewer_bytes": round(found[0]["bytes_per_step"] / one["bytes_per_step"], 2),
                "steps": len(one["times"]),
            }
        )
        print(
            f"{rate:8} {one['codec']:9} {rows[-1]['step_ms']:9.1f} ms  {base / step_s:6.2f}x faster  "
            f"{one['bytes_per_step'] / 1e6:8.2f} MB/step  {rows[-1]['times_fewer_bytes']:6.2f}x fewer",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit", "none"], help="of tc, or none")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12, help="of 1024 x 1024")
    parser.add_argument("--steps", type=int, default=3, help="of each codec and round")
    parser.add_argument("--rounds", type=int, default=3, help="new processes and connections for each")
    parser.add_argument("--record", action="store_true", help="write the rows to benchmarks/results/bandwidth.csv")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        rank_main(arguments)
        return
    rows = [row for rate in arguments.rates for row in measure(rate, arguments)]
    if arguments.record:
        from results import write

        write("bandwidth", rows)


if __name__ == "__main__":
    main()
