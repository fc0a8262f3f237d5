"""`terncomm cluster`: a torchrun script on a limited network of namespaces.

    terncomm cluster --ranks 4 --rate 100mbit --delay 1ms -- launch/train.py --codec terngrad

Needs root, or a kernel that allows user namespaces. Standard output is rank 0's; lines of `terncomm cluster:` are on
standard error. The exit status is the script's; 1 where a network cannot be had, 2 for arguments that cannot be, 124
after `--timeout`, and 128 + the signal's number after a signal.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from terncomm.cluster import record
from terncomm.cluster.asked import Asked, asked
from terncomm.cluster.guard import Guard
from terncomm.cluster.interrupts import Interrupted, Interrupts
from terncomm.cluster.launch import LinkEnded, run, say
from terncomm.cluster.namespaces import Namespace, NotPermitted
from terncomm.cluster.network import network
from terncomm.cluster.verify import verify
from terncomm.simulator.links import LINK_WORDS

INSTEAD = "`terncomm simulate` and `terncomm plan` need no network"
UNSHARED = "TERNCOMM_CLUSTER_UNSHARED"  # set in the process that unshare starts
METRICS = "TERNCOMM_METRICS"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command; what follows them, after `--`, is the command to run."""
    parser.add_argument("--ranks", type=int, required=True, metavar="N")
    parser.add_argument("--ranks-per-node", type=int, default=1, metavar="N", help="ranks that share a link (1)")
    parser.add_argument("--link", help=f"{LINK_WORDS}; no limit without it and --rate")
    parser.add_argument("--rate", help="of every link, in each direction, as 100mbit")
    parser.add_argument("--delay", help="one way, from host to host, as 1ms")
    parser.add_argument("--jitter", help="each frame's delay varies by up to this either way, as 200us")
    parser.add_argument("--loss", help="share of frames that are lost, as 0.1%%")
    parser.add_argument("--accept-measured", action="store_true", help="run also where the link is not as asked")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="end the ranks after this")
    parser.add_argument("--out", metavar="FILE", help="add a record of the run to this file of JSON lines")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="script.py, -m module or executable, and arguments")


def main(args: argparse.Namespace) -> int:
    """Run the command and return its exit status. Without root this process is replaced by one in a user namespace."""
    try:
        wanted = asked(args)
    except ValueError as error:
        say(str(error))
        return 2
    try:
        with Interrupts() as interrupts, ExitStack() as stack:
            _may_make_namespaces()
            return _run(wanted, interrupts, stack)
    except NotPermitted as error:
        say(f"{error}; {INSTEAD}")
    except (LinkEnded, OSError) as error:
        say(str(error))
    except Interrupted as error:
        say(f"{error}: every rank is ended, the network is gone")
        return 128 + error.number
    return 1


def _may_make_namespaces() -> None:
    """Return if this process may; else start anew in a user namespace, as its root."""
    unshared = os.environ.pop(UNSHARED, None)
    try:
        Namespace().close()
    except NotPermitted as error:
        unshare = ["unshare", "--user", "--map-root-user", "--net"]
        try:
            tried = subprocess.run([*unshare, "true"], capture_output=True, text=True)
        except FileNotFoundError:
            raise NotPermitted(f"{error}, and `unshare` is not installed") from None
        if unshared or tried.returncode:
            raise NotPermitted(f"{error}; {' '.join(tried.stderr.split())}") from None
        os.environ[UNSHARED] = "1"
        os.execvp(unshare[0], [*unshare, sys.executable, *sys.orig_argv[1:]])


def _run(wanted: Asked, interrupts: Interrupts, stack: ExitStack) -> int:
    guard = stack.enter_context(Guard())
    net = stack.enter_context(network(wanted.nodes, wanted.link, jitter_s=wanted.jitter_s, loss=wanted.loss))
    verified = verify(net, wanted)
    if verified is None:
        return 1
    folder = tempfile.mkdtemp(prefix="terncomm-cluster-")
    guard.add("folder", folder)
    metrics = Path(folder) / "metrics.jsonl"
    job = replace(wanted.job, environment={METRICS: str(metrics)})
    before = [node.traffic() for node in net.nodes]
    began = time.monotonic()
    status = run(net, job, guard, interrupts)
    seconds = time.monotonic() - began
    after = [node.traffic() for node in net.nodes]
    sent = [end[0] - begin[0] for begin, end in zip(before, after, strict=True)]
    received = [end[1] - begin[1] for begin, end in zip(before, after, strict=True)]
    per = "rank" if job.ranks_per_node == 1 else "node"
    say(
        f"status {status} after {seconds:.1f} s; MB at each {per}'s interface, gradients and all else: "
        f"sent {', '.join(f'{1e-6 * n:.2f}' for n in sent)}; received {', '.join(f'{1e-6 * n:.2f}' for n in received)}"
    )
    entries, bad = record.history(metrics)
    if bad:
        say(f"{bad} lines of {METRICS} are not JSON, and left out")
    if wanted.out:
        config = {
            "command": job.command,
            "ranks": wanted.ranks,
            "ranks_per_node": job.ranks_per_node,
            **verified.config,
        }
        counted = {"interface_bytes": sent, "interface_bytes_received": received}
        told = {"how": net.how, "probe": verified.probe, "status": status, "seconds": round(seconds, 3), **counted}
        record.append(wanted.out, {"config": config, **told, **({"history": entries} if entries else {})})
    return status
