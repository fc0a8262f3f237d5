"""terncomm plan: step time and break-even without training."""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch

from terncomm.simulator.fabric import GLOO, NCCL, Switched
from terncomm.simulator.links import LINK_WORDS, Link, rate_text
from terncomm.simulator.networks import NETWORKS, Network, of_module, of_size, parse_count
from terncomm.simulator.plan import DEVICES, FP16, WORTH, Job, advice, plan
from terncomm.simulator.reductions import CODECS
from terncomm.simulator.workloads import module_of
from terncomm.structure import GROUPS, structural


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = "MODE: planned - no network is used and nothing is trained: arithmetic on sizes, rates and delays."
    parser.add_argument(
        "network",
        help=f"{', '.join(NETWORKS)}; a number of parameters, as 25.6M; or FILE.py:FUNCTION, which returns an "
        "nn.Module, or a pair of it and one example input",
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 4, 8, 16, 64], metavar="W")
    parser.add_argument(
        "--links", nargs="+", default=["100mbit", "1gbit", "10gbit", "100gbit"], metavar="LINK",
        help=f"{LINK_WORDS} (default: 100mbit 1gbit 10gbit 100gbit)",
    )  # fmt: skip
    parser.add_argument("--codecs", nargs="+", default=["none", "fp16", "int8", "terngrad"], metavar="CODEC",
                        help=f"{', '.join(CODECS)}, or one of yours as FILE.py:CLASS")  # fmt: skip
    parser.add_argument("--per-node", type=int, default=1, help="workers that share a node's link")
    parser.add_argument("--inside", help="link between the workers of a node (default: takes no time)")
    parser.add_argument(
        "--batch-size",
        type=int,
        help="samples per worker and step (default: the network's usual; of your own, the example's)",
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="gpu",
        help="what a worker computes and encodes with: cpu-core is measured, gpu assumed (default: gpu)",
    )
    parser.add_argument("--tflops", type=float, help="sustained, instead of the device's")
    parser.add_argument("--compute-ms", type=float, help="forward and backward of one worker, from your own job")
    parser.add_argument("--bucket-cap-mb", type=float, help="as of DDP")
    parser.add_argument("--software", choices=["gloo", "nccl"], help="default: nccl for gpu, else gloo")
    parser.add_argument("--out", type=Path, help="file for the records, one JSON line for each point")


def network_of(text: str) -> Network:
    """A known network, one of so many parameters, or the user's own module.

    Raises:
        ValueError: none of these.
    """
    if text in NETWORKS:
        return NETWORKS[text]
    if ":" in text:
        module, example = module_of(text)
        first = example[0] if isinstance(example, tuple) and example else example
        if first is not None and not (isinstance(first, torch.Tensor) and first.dim()):
            raise ValueError(
                f"{text}: wanted an example input that is a tensor of samples, or a tuple that starts with one"
            )
        batch = 1 if first is None else len(first)
        return of_module(module, text, example=example, exempt=structural(module, GROUPS), batch_size=batch)
    if text.endswith(".py"):
        raise ValueError(f"{text}: which function of it? wanted FILE.py:FUNCTION")
    try:
        return of_size(parse_count(text))
    except ValueError:
        known = ", ".join(NETWORKS)
        raise ValueError(
            f"unknown network {text!r}; known: {known}; or parameters, as 25.6M; or FILE.py:FUNCTION"
        ) from None


def main(args: argparse.Namespace) -> int:
    """Print a table and the advice for each number of workers; write the records."""
    network = network_of(args.network)
    links = [Link.parse(text) for text in args.links]
    inside = Link.parse(args.inside) if args.inside else None
    device = DEVICES[args.device]
    if args.tflops is not None:
        if not args.tflops > 0:
            raise ValueError(f"--tflops must be positive, got {args.tflops}")
        device = replace(device, flops_per_s=args.tflops * 1e12, source=f"{args.tflops:g} TFLOP/s given")
    compute_s = None if args.compute_ms is None else args.compute_ms / 1e3
    batch = network.batch_size if args.batch_size is None else args.batch_size
    job = Job(network, batch, device, compute_s, args.bucket_cap_mb)
    software = {"gloo": GLOO, "nccl": NCCL}[args.software or ("nccl" if args.device == "gpu" else "gloo")]
    codecs = list(dict.fromkeys(["none", *args.codecs]))
    begun = time.perf_counter()
    points = list(
        plan(
            job,
            workers=args.workers,
            links=links,
            codecs=codecs,
            per_node=args.per_node,
            inside=inside,
            software=software,
        )
    )
    seconds = time.perf_counter() - begun
    computing = f"{args.compute_ms:g} ms given" if args.compute_ms is not None else device.source
    print(f"MODE: planned. {job.title}, {batch} sample{'s' * (batch > 1)} per worker")
    print(f"computing: {computing}; messages by {software.name}")
    print(f"{len(points)} points in {1e3 * seconds:.0f} ms")
    if args.device == "gpu":
        print(
            "the codecs' speed is assumed: on CUDA they are plain torch today, slower and not measured. "
            "--device cpu-core: measured"
        )
    if job.measured:
        print(f"cost of {', '.join(job.measured)}: measured now, on a core of this machine; how noisy is not known")
    advised = set()
    for workers in args.workers:
        print(f"\nW = {workers}" + (f", {args.per_node} on each node" if args.per_node > 1 else ""))
        print(f"{'codec':18}{'MB/step':>10}" + "".join(f"{link.name:>16}" for link in links) + f"{'pays up to':>14}")
        for codec in codecs:
            mine = [p for p in points if p["config"]["codec"] == codec and p["config"]["workers"] == workers]
            cells = "".join(f"{1e3 * point['step_s']:13.1f} ms" for point in mine)
            until = (
                ""
                if codec == "none"
                else _until(job.break_even(codec, workers, Switched(links[0], args.per_node, inside, software)))
            )
            print(f"{codec:18}{mine[0]['sent_bytes'] / 1e6:10.2f}{cells}{until:>14}")
        for link in links:
            steps = {
                p["config"]["codec"]: p["step_s"]
                for p in points
                if p["config"]["workers"] == workers and p["config"]["link"] == link.name
            }
            chosen, why = advice(steps)
            advised.add(chosen)
            print(f"  {link.name}: {why}")
    if "fp16" in advised:
        print(FP16)
    print(
        f"\npays up to: the rate at which steps are still {WORTH:.2f}x as fast as without a codec; delays as on "
        f"{links[0].name}"
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("".join(json.dumps(point) + "\n" for point in points))
        print(f"{len(points)} records in {args.out}. Draw them: terncomm plot {args.out}")
    return 0


def _until(bits_per_s: float | None) -> str:
    if bits_per_s is None:
        return "never"
    return "any rate" if math.isinf(bits_per_s) else rate_text(bits_per_s)
