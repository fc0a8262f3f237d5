"""The command line: terncomm simulate, plan, cluster, doctor, plot."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from terncomm.version import __version__

COMMANDS = {
    "simulate": "train with virtual workers in this process: accuracy against bytes, and predicted time on links",
    "plan": "step time and break-even of known networks, or of yours, without training",
    "cluster": "run a torchrun script on a really limited network on this machine",
    "doctor": "under torchrun: measure this job's network and say which codec helps",
    "plot": "draw what the others have recorded, on one page",
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line, by default this process's; its exit status.

    2: the words are not as wanted. 1: it could not be done. 130: interrupted. One line on stderr says why.
    """
    words = list(sys.argv[1:] if words is None else words)
    own, passed_on = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(prog="terncomm", description="Compressed gradient communication: what it costs.")
    parser.add_argument("--version", action="version", version=f"terncomm {__version__}")
    commands = parser.add_subparsers(dest="name", metavar="command", required=True)
    chosen = next((word for word in own if not word.startswith("-")), None)
    module = None
    for name, line in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".")
        if name == chosen:  # others need not be loaded
            where = "terncomm.cluster.command" if name == "cluster" else f"terncomm.commands.{name}"
            module = importlib.import_module(where)
            module.add_arguments(command)
    args = parser.parse_args(own)
    args.command = passed_on
    if passed_on and args.name != "cluster":
        parser.error(f"{args.name} takes no command after --, got {' '.join(passed_on)}")
    try:
        status: int = module.main(args)  # type: ignore[union-attr]
    except KeyboardInterrupt:
        print(f"\nterncomm {args.name}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"terncomm {args.name}: error: {error}", file=sys.stderr)
        return 2
    return status
