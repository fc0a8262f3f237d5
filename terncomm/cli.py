"""The command line: terncomm simulate, plan, cluster, doctor, plot."""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from terncomm.version import __version__

COMMANDS = {
    "simulate": "train with virtual workers in this process: accuracy against bytes, and predicted time on links",
    "plan": "step time and break-even of known networks, or of yours, without training",
    "cluster": "run a torchrun script on a really limited network on this machine",
    "doctor": "under torchrun: measure this job's network and say which codec helps",
    "plot": "draw what the others have recorded, on one page",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # -5mbit is a value with a minus, and its option says what is wrong with it; not an option of its own
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help tells what is wanted)\n")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line, by default this process's; its exit status.

    2: the words are not as wanted. 1: it could not be done. 130: interrupted. One line on stderr says why.
    """
    words = list(sys.argv[1:] if words is None else words)
    own, passed_on = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = _Parser(prog="terncomm", description="Compressed gradient communication: what it costs.")
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
        kept = ": runs that ended are kept, and the same command goes on from there" if args.name == "simulate" else ""
        print(f"\nterncomm {args.name}: interrupted{kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        print(f"terncomm {args.name}: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if os.environ.get("TERNCOMM_DEBUG"):
            raise
        notes = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
        first = (str(error).splitlines() or [""])[0]
        print(
            f"terncomm {args.name}: {type(error).__name__}: {first}{notes} (TERNCOMM_DEBUG=1 shows where)",
            file=sys.stderr,
        )
        return 1
    return status
