"""terncomm doctor: is the network my problem, and will a codec help?"""

import argparse
import math
import os
import socket
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from terncomm.commands.plan import network_of
from terncomm.simulator import codec_costs, interfaces
from terncomm.simulator.calibrate import calibrate
from terncomm.simulator.networks import Network
from terncomm.simulator.plan import FP16, GENTLEST, Device, Job, advice
from terncomm.simulator.timing import time_module
from terncomm.simulator.workloads import module_of
from terncomm.transports import RankFailed

_EXAMPLE = "torchrun --nproc-per-node 2 -m terncomm doctor --params 25.6M --compute-ms 120"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.usage = _EXAMPLE
    parser.epilog = "MODE: measured on the group of this job; the step times are predicted from that."
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--params", default="25.6M", help="parameters of the model (default: %(default)s)")
    what.add_argument("--network", help="a known network, or FILE.py:FUNCTION, which returns a module and an input")
    parser.add_argument("--compute-ms", type=float, help="forward and backward of one worker, from your own job")
    parser.add_argument("--bucket-cap-mb", type=float, help="as of DDP")
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long to measure (default: %(default)s)")
    parser.add_argument(
        "--join", type=float, default=30.0, help="seconds to wait for other ranks (default: %(default)s)"
    )


def main(args: argparse.Namespace) -> int:
    """Measure, predict, advise; rank 0 prints."""
    network = network_of(args.network or args.params)
    for name in ("compute_ms", "seconds", "join"):
        value = getattr(args, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {value}")
    if "RANK" not in os.environ:
        raise ValueError(f"start this under torchrun, as your job: {_EXAMPLE}")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if wrong := interfaces.missing(variable, os.environ.get(variable, "")):
            print(f"terncomm doctor: {variable}={os.environ[variable]}: {wrong}", file=sys.stderr, flush=True)
            return 1
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=args.join))
    except (RuntimeError, ValueError) as error:
        print(f"terncomm doctor: {_unreachable(error)}", file=sys.stderr, flush=True)
        return 1
    try:
        return _examine(args, network)
    except (RankFailed, dist.DistError) as error:
        print(f"terncomm doctor: rank {os.environ['RANK']}: {_unreachable(error)}", file=sys.stderr, flush=True)
        return 1
    finally:
        dist.destroy_process_group()


def _unreachable(error: Exception) -> str:
    known = ", ".join(f"{name} ({address})" for name, address in interfaces.addresses().items() if address)
    store = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    first = str(error).splitlines()[0]
    return (
        f"the ranks do not reach each other (store {store}): {first}. Interfaces here: {known}. If the wrong one is "
        "used, set GLOO_SOCKET_IFNAME, or NCCL_SOCKET_IFNAME for nccl"
    )


def _examine(args: argparse.Namespace, network: Network) -> int:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    began = time.perf_counter()

    def tell(text: str = "") -> None:
        if rank == 0:
            print(text, flush=True)

    if world_size == 1:
        tell("terncomm doctor: one rank sends nothing; start at least 2")
        return 2
    tell(f"MODE: measured. {world_size} ranks over gloo; about {args.seconds:.0f} s ...")
    before = interfaces.traffic()
    found = calibrate(dist.group.WORLD, budget_s=args.seconds * 2 / 3)
    name = interfaces.busiest(before, interfaces.traffic())
    mine = [
        interfaces.machine_id(),
        socket.gethostname(),
        name,
        interfaces.addresses().get(name, ""),
        interfaces.bits_per_s(name),
    ]
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, mine)
    tell(f"\n{'rank':>4}  {'host':24} {'interface':12} {'address':16} {'says it can do':>14}")
    for number, (_, host, interface, address, rate) in enumerate(everyone):
        told = "-" if rate is None else f"{rate / 1e9:g} Gbit/s"
        tell(f"{number:4}  {host:24} {interface:12} {address:16} {told:>14}")
    tell("interface: the one whose counter grew while this was measured")
    tell(f"\nall-reduce sends {8e-6 * found.bytes_per_s:.0f} Mbit/s per rank; a round of messages takes at least "
         f"{1e3 * found.round_s:.2f} ms")  # fmt: skip

    costs = codec_costs.over_group(("fp16", "int8", "terngrad"), found.fabric, dist.group.WORLD)
    tell("codecs here: " + ", ".join(
        f"{codec} {4e-9 / max(sum(cost.per_element_s), 1e-15):.1f} GB/s of gradients" for codec, cost in costs.items()
    ))  # fmt: skip
    compute_s, source = _computing(args, network)
    sharing = max(sum(one[0] == other[0] for other in everyone) for one in everyone)
    cores = len(os.sched_getaffinity(0)) / sharing
    machine = Device(name="this", flops_per_s=1e12, costs=costs, cores=cores, source="")
    job = Job(network, 1, machine, compute_s, args.bucket_cap_mb)
    steps = {codec: job.point(codec, world_size, found.fabric) for codec in GENTLEST}
    tell(f"\n{job.title}; computing {1e3 * compute_s:.0f} ms ({source})")
    tell(f"{'codec':10}{'MB sent':>10}{'step':>12}{'computing':>12}{'codec':>10}{'exposed':>12}{'faster':>9}")
    for codec, step in steps.items():
        tell(
            f"{codec:10}{job.sent_bytes(codec, world_size) / 1e6:10.2f}{1e3 * step.step_s:9.1f} ms"
            f"{1e3 * step.compute_s:9.1f} ms{1e3 * (step.encode_s + step.decode_s):7.1f} ms"
            f"{1e3 * step.exchange_s:9.1f} ms{steps['none'].step_s / step.step_s:8.2f}x"
        )
    none = steps["none"]
    if compute_s == 0:
        tell("\nNo verdict on your step without what it computes: give --compute-ms, or --network FILE.py:FUNCTION.")
    else:
        chosen, reason = advice({codec: step.step_s for codec, step in steps.items()})
        waiting = 1 - none.compute_s / none.step_s
        tell(f"\nWithout a codec {waiting:.0%} of the step is waiting for the network. Verdict: {reason}.")
        if chosen == "fp16":
            tell(f"{FP16}.")
        if waiting > 0.3:
            tell("Also free: accumulate gradients (no_sync), and the exchange comes once in k steps.")
    if torch.cuda.is_available():
        tell("Measured over gloo, codecs on the CPU: a job on GPUs over NCCL has other speeds.")
    tell(f"({time.perf_counter() - began:.0f} s)")
    return 0


def _computing(args: argparse.Namespace, network: Network) -> tuple[float, str]:
    if args.compute_ms is not None:
        return args.compute_ms / 1e3, "given"
    if args.network and ":" in args.network:
        module, example = module_of(args.network)
        if example is not None:
            dist.barrier()
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, time_module(module, example))
            return max(everyone), "measured here, on the example input"
    return 0.0, "not given: --compute-ms; what follows is the exchange alone"
