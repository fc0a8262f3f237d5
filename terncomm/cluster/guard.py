"""Ends what its parent started and has not ended, once the parent is gone: also where that was killed.

Run as a program of its own, from this file. Lines on standard input say what there is: `group ID` for a process group,
`ended ID` for one that needs no end any more, `folder PATH` for a folder. When the input closes, every group that has
not ended is killed and every folder removed.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys


class Guard:
    """The parent's end of it; a context that leaves nothing of what it was told."""

    def __enter__(self) -> "Guard":
        command = [sys.executable, "-I", "-S", __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        return self

    def add(self, what: str, name: str | int) -> None:
        """Tell of a "group", of one that has "ended", or of a "folder"."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {name}\n".encode())
        self._process.stdin.flush()

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Read until the end of the input, then clean up."""
    groups, folders = set(), set()
    for line in sys.stdin:
        what, name = line.rstrip("\n").split(" ", 1)
        if what == "folder":
            folders.add(name)
        elif what == "group":
            groups.add(int(name))
        else:
            groups.discard(int(name))
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
