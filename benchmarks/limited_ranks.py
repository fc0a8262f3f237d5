"""Starts a benchmark's own ranks on limited links, each in a network namespace, and reads the JSON lines of rank 0."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from terncomm.cluster.launch import environment
from terncomm.cluster.network import FREE, network
from terncomm.simulator.links import Link

PORT = 29511  # in a namespace of its own: nobody else is there


def lines(script: str, arguments: list[str], ranks: int, rate: str) -> Iterator[dict[str, Any]]:
    """Run `script` with these arguments as `ranks` ranks on links of `rate` ("none": no limit); yield rank 0's lines.

    Raises:
        NotPermitted: network namespaces cannot be made here.
        SystemExit: a rank failed; what it said is above.
    """
    children: list[subprocess.Popen[str]] = []
    with network(ranks, FREE if rate == "none" else Link.parse(rate)) as net:
        try:
            for rank, node in enumerate(net.nodes):
                with node.inside():
                    children.append(
                        subprocess.Popen(
                            [sys.executable, os.path.abspath(script), *arguments],
                            env=os.environ | environment(rank, ranks, 1, PORT) | {"OMP_NUM_THREADS": "1"},
                            stdout=None if rank else subprocess.PIPE,
                            text=True,
                        )
                    )
            assert children[0].stdout is not None
            for line in children[0].stdout:
                yield json.loads(line)
            if any(child.wait(timeout=60) for child in children):
                raise SystemExit(f"{os.path.basename(script)}: a rank failed at {rate}, see above")
        finally:
            for child in children:
                child.kill()
                child.wait()
