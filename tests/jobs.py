"""Jobs of two processes, started by torchrun as people start them."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(job):
    """What a job has printed, once it has ended well."""
    try:
        text, _ = job.communicate(timeout=150)
    finally:
        stop(job)
    assert job.returncode == 0, text
    assert "terminate called" not in text
    return text


def ended_but_copied(job, checkpoint, copy):
    """The same, with a copy of the first checkpoint that is seen: what is left of a job that was killed there."""
    try:
        while job.poll() is None and not checkpoint.exists():
            time.sleep(0.005)
        if checkpoint.exists():
            shutil.copy(checkpoint, copy)
    finally:
        printed = ended(job)
    return printed


def stop(job):
    """End a job: torchrun passes the signal on to its workers."""
    if job.poll() is None:
        job.terminate()
        try:
            job.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            job.kill()
            raise


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
