"""Train the same network once per codec with launch/train.py, then compare accuracy, bytes and time.

    python launch/compare.py --codecs none int8 terngrad --workers 4
    python launch/compare.py --data cifar10 --epochs 20 -- --data-dir /data/cifar-10-batches-bin

What follows `--` are options of launch/train.py.
Leaves results.md, results.csv, accuracy_vs_bytes.png and the metrics of each run in --out.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CODECS = ("none", "fp16", "bf16", "int8", "terngrad")
# Name in the CSV file: title and format in the table.
COLUMNS = {
    "codec": ("codec", "{}"),
    "test_accuracy": ("accuracy", "{:.2%}"),
    "test_loss": ("test loss", "{:.4f}"),
    "sent_mb_per_rank": ("MB/rank", "{:.2f}"),
    "bytes_per_element_per_step": ("B/element/step", "{:.3f}"),
    "fewer_bytes_than_none": ("fewer bytes", "{:.2f}x"),
    "step_ms": ("step ms", "{:.1f}"),
    "encode_ms_per_step": ("encode ms", "{:.2f}"),
    "exchange_ms_per_step": ("exchange ms", "{:.2f}"),
    "decode_ms_per_step": ("decode ms", "{:.2f}"),
}
Epochs = list[dict[str, Any]]


def parse_arguments(line: list[str]) -> argparse.Namespace:
    """Read the command line."""
    own, passed_on = (line[: line.index("--")], line[line.index("--") + 1 :]) if "--" in line else (line, [])
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog="What follows -- are options of launch/train.py."
    )
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--workers", type=int, default=4, help="processes, at least 2 (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "demo", help="folder (default: results/demo)")
    args = parser.parse_args(own, argparse.Namespace(passed_on=passed_on))
    if args.workers < 2:
        parser.error("--workers: a comparison of bytes sent needs at least 2")
    return args


def train(codec: str, args: argparse.Namespace) -> Epochs:
    """Run launch/train.py under torchrun, passing on what it prints; return its metrics, one dict per epoch."""
    metrics = args.out / f"{codec}.jsonl"
    metrics.unlink(missing_ok=True)
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {args.workers}".split()
    options = f"--data {args.data} --codec {codec} --epochs {args.epochs} --seed {args.seed}".split()
    options += ["--metrics", str(metrics)]
    command = [sys.executable, *torchrun, str(ROOT / "launch" / "train.py"), *args.passed_on, *options]
    child = subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C comes here alone; torchrun is then told to end its workers
    )
    assert child.stdout is not None
    try:
        for line in child.stdout:
            print(line, end="", flush=True)
        status = child.wait()
    finally:
        if child.poll() is None:
            child.terminate()
            child.communicate()
    if status:
        raise SystemExit(f"compare.py: the {codec} run failed (exit status {status}), see above: {shlex.join(command)}")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def summarize(epochs: Epochs) -> dict[str, Any]:
    """Return one row of the table; None where plain DDP measures nothing."""
    last = epochs[-1]
    ring_bytes = 2 * (last["world_size"] - 1) / last["world_size"] * last["raw_bytes"]
    times = {f"{part}_ms_per_step": last.get(f"{part}_s") for part in ("encode", "exchange", "decode")}
    return {
        "codec": last["codec"],
        "test_accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "sent_mb_per_rank": last["wire_bytes"] / 1e6,
        "bytes_per_element_per_step": last["wire_bytes"] / last["parameters"] / last["step"],
        "fewer_bytes_than_none": ring_bytes / last["wire_bytes"],
        "step_ms": 1e3 * statistics.median(epoch["step_s"] for epoch in epochs),
        **{name: None if seconds is None else 1e3 * seconds / last["step"] for name, seconds in times.items()},
    }


def provenance(last: dict[str, Any]) -> dict[str, Any]:
    """Return where and when a run was made, for its row in the CSV file."""
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        **{name: last[name] for name in ("data", "seed", "world_size", "batch_size", "lr", "bytes_source", "torch")},
        "epochs": last["epoch"],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "link": f"{last['backend']} on loopback",
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def describe(last: dict[str, Any]) -> str:
    """Say what was run, where and when."""
    made = provenance(last)
    return (
        f"Data {last['data']}, {last['parameters']} parameters, {last['epoch']} epochs, {last['step']} steps of "
        f"{last['batch_size']} samples per rank, seed {last['seed']}, W = {last['world_size']} ranks over "
        f"{made['link']} ({made['machine']}), torch {last['torch']}, commit {made['commit']}, {made['date']}."
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Return `rows` as a Markdown table whose columns also line up on a terminal."""
    cells = [[title for title, _ in COLUMNS.values()]]
    for row in rows:
        cells.append(["-" if row[name] is None else form.format(row[name]) for name, (_, form) in COLUMNS.items()])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = [[cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)] for line in cells]
    return "\n".join(
        f"| {line[0].ljust(widths[0])} | {' | '.join(rest)} |" for line, rest in zip(cells, lines, strict=True)
    )


def plot(runs: dict[str, Epochs], path: Path) -> None:
    """Draw test accuracy against bytes sent, one point per epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    from terncomm.report.looks import CODEC_STYLES

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for codec, epochs in runs.items():
        color, marker = CODEC_STYLES[codec]
        sent_mb = [epoch["wire_bytes"] / 1e6 for epoch in epochs]
        accuracy = [100 * epoch["test_accuracy"] for epoch in epochs]
        axes.plot(sent_mb, accuracy, color=color, marker=marker, markersize=5, label=f"{codec} ({accuracy[-1]:.1f} %)")
    last = next(iter(runs.values()))[-1]
    axes.set(
        xscale="log",
        xlabel="sent per rank since start (MB)",
        ylabel="test accuracy (%)",
        title=f"Accuracy against bytes: {last['data']}, W = {last['world_size']} ranks, one point per epoch",
    )
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(which="both", alpha=0.25)
    axes.legend(title="codec (at the end)", loc="best")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train with each codec, then print and write the comparison."""
    args = parse_arguments(sys.argv[1:])
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `train` ends its child
    runs: dict[str, Epochs] = {}
    for number, codec in enumerate(args.codecs, 1):
        print(f"== {codec} ({number} of {len(args.codecs)}): starting {args.workers} workers", flush=True)
        runs[codec] = train(codec, args)

    rows = [summarize(epochs) for epochs in runs.values()]
    notes = (
        "Bytes of none and fp16 are the ring all-reduce's formula 2(W-1)/W; the others are counted as they are sent. "
        "Step: forward, backward with the exchange, update; median over epochs of the epoch's mean. "
        "Encode, exchange and decode may overlap with backward. Processes of one machine have no slow network between "
        "them: step times say what a codec costs. What it saves on a slow link: terncomm cluster --rate 100mbit ..."
    )
    report = f"{table(rows)}\n\n{describe(runs[args.codecs[-1]][-1])}\n{notes}\n"
    print(f"\n{report}")
    (args.out / "results.md").write_text(report)
    with (args.out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *provenance(next(iter(runs.values()))[-1])])
        writer.writeheader()
        writer.writerows({**row, **provenance(epochs[-1])} for row, epochs in zip(rows, runs.values(), strict=True))
    plot(runs, args.out / "accuracy_vs_bytes.png")
    print(
        f"written to {args.out}: accuracy_vs_bytes.png, results.md, results.csv, and <codec>.jsonl (one line per epoch)"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("compare.py: interrupted; all workers have ended")
