"""Step time of a real DDP job on really limited links: one network namespace per rank, `tbf` on both ends of each link.

    python benchmarks/bandwidth.py                       # as root: 100 Mbit and 1 Gbit, 4 ranks
    python benchmarks/bandwidth.py --record              # and write benchmarks/results/bandwidth.csv
    unshare -rn python benchmarks/bandwidth.py           # without root, where user namespaces are allowed

Every rank steps a stack of linear layers with each codec in turn. Bytes are read from the rank's interface.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

CODECS = ("none", "fp16", "int8", "terngrad")
PREFIX = "tcbench"
BURST = "256kb"  # below this, 1 Gbit is not reached: segmentation offload sends bursts of 64 KB


def run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bandwidth.py: `{command}` failed: {done.stderr.strip()} (root, or unshare -rn, is needed)")


def build(ranks: int, rate: str) -> None:
    """Namespaces PREFIX0.. on one switch namespace, every port limited to `rate` in both directions."""
    run(f"ip netns add {PREFIX}sw")
    run(f"ip -n {PREFIX}sw link add br0 type bridge")
    run(f"ip -n {PREFIX}sw link set br0 up")
    for rank in range(ranks):
        name = f"{PREFIX}{rank}"
        run(f"ip netns add {name}")
        run(f"ip link add e0 netns {name} type veth peer name s{rank} netns {PREFIX}sw")
        run(f"ip -n {name} addr add 10.77.0.{rank + 1}/24 dev e0")
        run(f"ip -n {name} link set lo up")
        run(f"ip -n {name} link set e0 up")
        run(f"ip -n {PREFIX}sw link set s{rank} master br0 up")
        if rate != "none":
            for where, device in ((name, "e0"), (f"{PREFIX}sw", f"s{rank}")):
                limit = f"rate {rate} burst {BURST} latency 50ms"
                run(f"ip netns exec {where} tc qdisc add dev {device} root tbf {limit}")


def remove() -> None:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for line in listed.splitlines():
        if line.startswith(PREFIX):
            subprocess.run(["ip", "netns", "del", line.split()[0]], check=False)


def sent_bytes() -> int:
    """Bytes that this namespace's e0 has sent."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("e0:"))
    return int(line.split(":")[1].split()[8])


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
                before = sent_bytes()
            dist.barrier()
            begin = time.perf_counter()
            model(inputs).square().mean().backward()
            times.append(time.perf_counter() - begin)
            model.zero_grad()
        sent = (sent_bytes() - before) / arguments.steps
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
    remove()
    children = []
    try:
        build(arguments.ranks, rate)
        for rank in range(arguments.ranks):
            env = os.environ | {
                "RANK": str(rank), "WORLD_SIZE": str(arguments.ranks), "MASTER_ADDR": "10.77.0.1",
                "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": "e0", "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            command = ["ip", "netns", "exec", f"{PREFIX}{rank}", sys.executable, __file__, "--rank-of", rate]
            command += ["--steps", str(arguments.steps), "--layers", str(arguments.layers)]
            children.append(
                subprocess.Popen(command, env=env, stdout=subprocess.PIPE if rank == 0 else None, text=True)
            )
        out, _ = children[0].communicate(timeout=600)
        if any(child.wait(timeout=60) for child in children):
            raise SystemExit(f"bandwidth.py: a rank failed at {rate}, see above")
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
        remove()
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
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
    parser.add_argument("--steps", type=int, default=5)
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
