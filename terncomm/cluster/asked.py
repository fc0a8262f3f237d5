"""What the command line asks for, checked before anything is made."""

import argparse
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from terncomm.cluster.launch import Job
from terncomm.cluster.network import FREE
from terncomm.simulator.links import Link, parse_rate, parse_time

Value = TypeVar("Value")


@dataclass(frozen=True)
class Asked:
    """A run.

    Args:
        jitter_s: each frame's delay varies by up to this either way.
        loss: probability that a frame is lost.
        out: file that a record is added to.
        accept_measured: run on a link that is not as asked, under what was measured.
    """

    job: Job
    ranks: int
    link: Link
    jitter_s: float
    loss: float
    out: Path | None
    accept_measured: bool

    @property
    def nodes(self) -> int:
        """Namespaces."""
        return self.ranks // self.job.ranks_per_node


def asked(args: argparse.Namespace) -> Asked:
    """What parsed arguments say.

    Raises:
        ValueError: one of them cannot be, or they do not go together.
    """
    if args.ranks < 1:
        raise ValueError(f"--ranks must be 1 or more, got {args.ranks}")
    if args.ranks_per_node < 1 or args.ranks % args.ranks_per_node:
        raise ValueError(f"--ranks-per-node must divide --ranks {args.ranks}, got {args.ranks_per_node}")
    if args.timeout is not None and not 0 < args.timeout < math.inf:
        raise ValueError(f"--timeout must be positive and finite, got {args.timeout:g}")
    link = _link(args)
    jitter_s = _option("--jitter", parse_time, args.jitter) if args.jitter else 0.0
    if jitter_s > link.delay_s:
        raise ValueError(f"--jitter {args.jitter} must be no more than the delay, {1e3 * link.delay_s:g} ms")
    loss = _option("--loss", _percentage, args.loss) if args.loss else 0.0
    out = Path(args.out) if args.out else None
    if out:
        there = next(folder for folder in out.absolute().parents if folder.exists())
        if out.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"--out: cannot write a file {out}")
    job = Job(_command(args.command), args.ranks_per_node, timeout_s=args.timeout)
    return Asked(job, args.ranks, link, jitter_s, loss, out, args.accept_measured)


def _link(args: argparse.Namespace) -> Link:
    if args.link and args.rate:
        raise ValueError("--link and --rate exclude each other")
    link = FREE
    if args.link:
        link = _option("--link", Link.parse, args.link)
    elif args.rate:
        link = Link(args.rate, _option("--rate", parse_rate, args.rate))
    if args.delay:
        if link.delay_s:
            raise ValueError(f"--delay {args.delay}: link {link.name} has a delay of its own")
        link = replace(link, name=f"{link.name}/{args.delay}", delay_s=_option("--delay", parse_time, args.delay))
    return link


def _option(name: str, parse: Callable[[str], Value], text: str) -> Value:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _percentage(text: str) -> float:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)%", text.strip())
    if match is None or float(match[1]) >= 100:
        raise ValueError(f"{text!r} is not a share of frames: wanted a percentage below 100, such as 0.1%")
    return float(match[1]) / 100


def _command(words: list[str]) -> list[str]:
    words = words[1:] if words[:1] == ["--"] else words
    if not words:
        raise ValueError("no command; wanted `-- script.py ...`, `-- -m module ...` or `-- executable ...`")
    if words[0] == "-m":
        if len(words) < 2:
            raise ValueError("-m wants a module's name")
    elif words[0].endswith(".py"):
        if not Path(words[0]).is_file():
            raise ValueError(f"no script {words[0]}")
    elif shutil.which(words[0]) is None:
        raise ValueError(f"no executable {words[0]}")
    return words
