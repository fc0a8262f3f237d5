"""Kills the processes and removes the folders of its parent when the parent ends, even if the parent is killed.

This file runs as a separate program. It reads lines from standard input: `group ID` adds a process group, `ended ID`
removes one from the list, `folder PATH` adds a folder. When the input closes, it sends SIGKILL to every group on the
list and removes every folder.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys


class Guard:
    """Starts the guard program and reports to it. On exit of the context, the guard cleans up and ends."""

    def __enter__(self) -> "Guard":
        command = [sys.executable, "-I", "-S", __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        return self

    def add(self, what: str, name: str | int) -> None:
        """Report one thing to the guard.

        what: "group" (a process group to kill), "ended" (a process group that has ended) or "folder" (one to remove).
        name: the ID of the process group, or the path of the folder.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {name}\n".encode())
        self._process.stdin.flush()

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Read standard input to its end, then kill the groups and remove the folders."""
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
