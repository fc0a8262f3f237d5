"""terncomm plot: the report."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = "Leaves report.html, which needs nothing else, and every picture as PNG with its numbers as CSV."
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files of records, or folders with *.jsonl")
    parser.add_argument("--out", type=Path, help="folder (default: report, beside the first path)")
    parser.add_argument("--title", default="Gradient communication: accuracy, bytes, time")
    parser.add_argument("--target", type=float, help="accuracy, as 0.95, for time and bytes to it")
    parser.add_argument("--target-loss", type=float, help="test loss, where there is no accuracy")


def main(args: argparse.Namespace) -> int:
    """Draw."""
    from terncomm.simulator import records

    try:
        from terncomm.report.page import write_report
    except ModuleNotFoundError as error:
        raise ValueError(f"pictures need matplotlib ({error}): pip install 'terncomm[plot]'") from None
    found = records.load(args.paths)
    first: Path = args.paths[0]
    out = args.out or (first if first.is_dir() else first.parent) / "report"
    print(f"drawing {len(found)} records ...", flush=True)
    written = write_report(found, out, title=args.title, target=args.target, target_loss=args.target_loss)
    print(f"{written[0]}, and {len(written) // 2} pictures beside it, each with its numbers as CSV")
    return 0
