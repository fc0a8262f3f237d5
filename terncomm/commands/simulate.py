"""terncomm simulate: one training run with virtual workers, or a sweep of them."""

import argparse
import itertools
from pathlib import Path

from terncomm.simulator.fabric import GLOO
from terncomm.simulator.links import LINK_WORDS, Link
from terncomm.simulator.profile import time_records
from terncomm.simulator.records import label_of
from terncomm.simulator.reductions import CODECS
from terncomm.simulator.simulate import Experiment
from terncomm.simulator.sweep import sole_writer, sweep, write
from terncomm.simulator.workloads import Options, load
from terncomm.simulator.workloads import add_arguments as add_data_arguments

_ACCUMULATE = "accumulate-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = (
        "Lists make a sweep: every codec with every number of workers and every seed. Runs that --out has are not "
        "repeated. MODE: simulated - training is real, bytes are counted, time on links is predicted."
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--codecs",
        "--codec",
        nargs="+",
        default=["none", "fp16", "int8", "terngrad"],
        metavar="CODEC",
        help=f"{', '.join(CODECS)}; {_ACCUMULATE}K: none, K steps' gradients added up before one exchange; or as "
        '"Ternary(clip=1.5)", or one of yours as FILE.py:CLASS',
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[4], metavar="W")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument("--batch-size", type=int, default=16, help="samples per worker and step (default: %(default)s)")
    batch.add_argument("--total-batch", type=int, help="samples per step of all workers together")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--steps-per-epoch", type=int, help="at most so many (default: all data; at most 30 for text)")
    parser.add_argument("--lr", type=float, help="learning rate at the start (default: the data's own)")
    parser.add_argument("--warmup-steps", type=int, default=0, help="first steps in which nothing is coded")
    parser.add_argument("--bucket-cap-mb", type=float, help="as of DDP (default: 25, the first bucket 1)")
    parser.add_argument(
        "--links",
        nargs="+",
        default=["100mbit", "1gbit", "10gbit", "wan-50ms"],
        metavar="LINK",
        help=f"on which step time is predicted: {LINK_WORDS} (default: the presets)",
    )
    parser.add_argument("--per-node", type=int, default=1, help="workers that share a node's link")
    parser.add_argument("--inside", help="link between the workers of a node (default: takes no time)")
    parser.add_argument("--out", type=Path, default=Path("results/simulate"), help="folder for runs.jsonl")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one core each")


def experiments(args: argparse.Namespace) -> list[Experiment]:
    """What the command line asks for."""
    made = []
    for seed, workers, word in itertools.product(args.seeds, args.workers, args.codecs):
        codec, accumulate = word, 1
        if word.startswith(_ACCUMULATE):
            count = word.removeprefix(_ACCUMULATE)
            if not count.isdecimal():
                raise ValueError(f"unknown codec {word!r}: wanted a number of steps, as {_ACCUMULATE}8")
            codec, accumulate = "none", int(count)
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        if args.total_batch is not None and (args.total_batch < 1 or args.total_batch % workers):
            raise ValueError(f"--total-batch {args.total_batch} cannot be divided among {workers} workers")
        made.append(
            Experiment(
                data=args.data,
                codec=codec,
                accumulate=accumulate,
                workers=workers,
                seed=seed,
                batch_size=args.batch_size if args.total_batch is None else args.total_batch // workers,
                epochs=args.epochs,
                steps_per_epoch=args.steps_per_epoch,
                lr=args.lr,
                warmup_steps=args.warmup_steps,
                bucket_cap_mb=args.bucket_cap_mb,
                options=Options(data_dir=args.data_dir, text=args.text, tokens=args.tokens),
            )
        )
    return made


def _short(data: str) -> str:
    """The function's name stands for FILE.py:FUNCTION."""
    return data.rpartition(":")[2][:10]


def main(args: argparse.Namespace) -> int:
    """Train, predict, record; print what came out."""
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
    wanted = experiments(args)
    links = [Link.parse(text) for text in args.links]
    inside = Link.parse(args.inside) if args.inside else None
    if args.per_node < 1:
        raise ValueError(f"--per-node must be at least 1, got {args.per_node}")
    for data in {(experiment.data, experiment.options) for experiment in wanted}:
        load(*data)  # before a folder is made
    path = args.out / "runs.jsonl"
    print(f"MODE: simulated. {len(wanted)} runs, {args.jobs} at a time; records in {path}", flush=True)
    with sole_writer(args.out):
        records = sweep(wanted, path, jobs=args.jobs, tell=lambda line: print(line, flush=True))
        print("timing one worker of each kind on this machine, for the prediction on links ...", flush=True)
        for record in time_records(records, wanted, links, per_node=args.per_node, inside=inside, software=GLOO):
            write(path, [record])
    print()
    head = "".join(f"{'step on ' + link.name:>20}" for link in links)
    print(f"{'data':10} {'W':>3} {'codec':24} {'seed':>4} {'test loss':>9} {'accuracy':>8} {'MB/worker':>10}{head}")
    for record in records:
        config, last = record["config"], record["history"][-1]
        codec = label_of(config["codec"], config["accumulate"], {})
        loss = "-" if last["test_loss"] is None else f"{last['test_loss']:.4f}"
        accuracy = "-" if last["test_accuracy"] is None else f"{last['test_accuracy']:.2%}"
        times = "".join(f"{1e3 * link['step_s']:17.1f} ms" for link in record["links"])
        print(
            f"{_short(config['data']):10} {config['workers']:3} {codec:24} {config['seed']:4} {loss:>9} {accuracy:>8} "
            f"{last['sent_bytes'] / 1e6:10.2f}{times}"
        )
    if any(experiment.accumulate > 1 for experiment in wanted):
        print("a step with accumulation computes its micro-steps one after the other, and exchanges once")
    print(
        f"\nstep times: predicted for workers that are each a core of this machine. Draw it: terncomm plot {args.out}"
    )
    return 0
