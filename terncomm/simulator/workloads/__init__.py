"""What can be trained on: a data set, a network that suits it, and options that train it well."""

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from terncomm.from_file import attribute, importing_beside
from terncomm.simulator.workloads.base import DataError, Options, Workload, cosine
from terncomm.simulator.workloads.cifar10 import cifar10
from terncomm.simulator.workloads.digits import digits
from terncomm.simulator.workloads.mnist import mnist
from terncomm.simulator.workloads.text import text

# A further data set is one more function like these: options in, a `Workload` out.
DATA = {"digits": digits, "cifar10": cifar10, "mnist": mnist, "text": text}

__all__ = ["DATA", "DataError", "Options", "Workload", "add_arguments", "cosine", "load"]


def load(name: str, options: Options) -> Workload:
    """Return the workload of this name, or the one that a function of the user's makes of the options.

    Such a function is named "module:function" or "file.py:function".

    Raises:
        DataError: there is no such name, module or function, it returned something else, or data are not as wanted.
    """
    if name in DATA:
        return DATA[name](options)
    if ":" not in name:
        raise DataError(f"unknown data {name!r}; known: {', '.join(DATA)}, or a function of yours as FILE.py:FUNCTION")
    made = _call(name, options)
    if not isinstance(made, Workload):
        raise DataError(f"{name} returned {type(made).__name__}, wanted terncomm.simulator.Workload")
    return made


def module_of(name: str) -> tuple[nn.Module, Any]:
    """Return the module that a function of the user's returns, and the example input if it returns a pair.

    Raises:
        DataError: there is no such function, or it returned something else.
    """
    made = _call(name)
    module, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise DataError(f"{name} returned {type(module).__name__}, wanted an nn.Module, or a pair of it and an input")
    return module, example


def _call(name: str, *arguments: object) -> Any:
    """Call "module:function" or "file.py:function"."""
    try:
        function = attribute(name)
    except ValueError as error:
        raise DataError(str(error)) from error
    try:
        with importing_beside(name.rpartition(":")[0]):
            return function(*arguments)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{name}: {type(error).__name__}: {error}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let the command line choose the data; the parsed words are the fields of :class:`Options` beside `data`."""
    parser.add_argument("--data", default="digits", help=f"{', '.join(DATA)}, or FILE.py:FUNCTION (default: digits)")
    parser.add_argument(
        "--data-dir", type=Path, help="folder with the files of cifar10 or mnist; nothing is downloaded"
    )
    parser.add_argument("--text", type=Path, help="text file for --data text (default: Python's own documentation)")
    parser.add_argument("--tokens", choices=["words", "bytes"], default="words", help="what --data text predicts")
