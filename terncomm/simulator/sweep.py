"""Many training runs, several at a time; what is already in the file is not done again."""

import concurrent.futures
import ctypes
import fcntl
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from terncomm.simulator import records
from terncomm.simulator.simulate import Experiment, simulate
from terncomm.simulator.workloads import load

Record = dict[str, Any]
_PR_SET_PDEATHSIG = 1


def sweep(
    experiments: Sequence[Experiment],
    path: Path,
    *,
    jobs: int = 1,
    tell: Callable[[str], None] = print,
) -> list[Record]:
    """Run the experiments that `path` has no record of; append a record of each as it ends, one JSON line.

    jobs: processes, each with one torch thread. An interruption loses the runs that are under way and no other.

    Raises:
        DataError: the data of an experiment are not as wanted; nothing has been run.
        ValueError: a line of `path` is no record.
    """
    known = {_identity(record["config"]): record for record in _read(path)}
    wanted = {_identity(experiment.config()): experiment for experiment in experiments}
    missing = [experiment for identity, experiment in wanted.items() if identity not in known]
    if len(missing) < len(wanted):
        tell(f"{len(wanted) - len(missing)} of {len(wanted)} runs are in {path} already")
    for data in {(experiment.data, experiment.options) for experiment in missing}:
        load(*data)
    began = time.perf_counter()
    done = 0

    def keep(record: Record) -> None:
        nonlocal done
        done += 1
        known[_identity(record["config"])] = record
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        left_s = (time.perf_counter() - began) / done * (len(missing) - done)
        tell(f"{done:3}/{len(missing)}  {describe(record)}  {_duration(left_s)} left")

    if jobs == 1 or len(missing) <= 1:
        for experiment in missing:
            keep(_run(experiment, tell))
    else:
        _in_parallel(missing, jobs, keep)
    return [known[identity] for identity in wanted]


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Inside, no other process is in such a block for this folder, which is made if need be. Leaves a file there.

    Raises:
        BlockingIOError: another one is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "runs.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another simulation is writing into {folder}: wait, or choose another") from None
        yield


def describe(record: Record) -> str:
    """One line: what was run, and how it ended."""
    config, last = record["config"], record["history"][-1]
    codec = records.label_of(config["codec"], config["accumulate"], {})
    loss = "diverged" if last["test_loss"] is None else f"test loss {last['test_loss']:.4f}"
    accuracy = "" if last["test_accuracy"] is None else f"  accuracy {last['test_accuracy']:6.2%}"
    return (
        f"{config['data']} W={config['workers']:<3} {codec:24} seed {config['seed']}  {loss}{accuracy}  "
        f"{last['sent_bytes'] / 1e6:9.2f} MB/worker"
    )


def write(path: Path, changed: Sequence[Record]) -> None:
    """Replace what `path` holds of these runs, keeping its other lines; whole at any time."""
    known = {_identity(record["config"]): record for record in [*_read(path), *changed]}
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text("".join(json.dumps(record) + "\n" for record in known.values()))
    os.replace(unfinished, path)


def _run(experiment: Experiment, tell: Callable[[str], None] = lambda line: None) -> Record:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same bits as a process of DDP has with one thread; more would hardly help
    began = time.perf_counter()
    try:
        return simulate(experiment, on_epoch=lambda point: tell(_progress(point, experiment, began)))
    finally:
        torch.set_num_threads(threads)


def _progress(point: Record, experiment: Experiment, began: float) -> str:
    loss, accuracy, epoch = point["train_loss"], point["test_accuracy"], point["epoch"]
    left_s = (time.perf_counter() - began) / max(epoch, 1) * (experiment.epochs - epoch)
    return (
        f"  {experiment.codec:16} epoch {epoch:3}/{experiment.epochs}  train loss "
        f"{'-' if loss is None else format(loss, '.4f'):>8}"
        + ("" if accuracy is None else f"  test accuracy {accuracy:7.2%}")
        + f"  sent {point['sent_bytes'] / 1e6:9.2f} MB/worker"
        + (f"  {_duration(left_s)} left" if epoch else "")
    )


def _in_parallel(experiments: Sequence[Experiment], jobs: int, keep: Callable[[Record], None]) -> None:
    context = multiprocessing.get_context("spawn")
    before, others = signal.signal(signal.SIGTERM, _interrupt), set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(min(jobs, len(experiments)), context, _initialize)
    try:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is the parent's to act on
        futures = [pool.submit(_run, one) for one in experiments]
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for future in concurrent.futures.as_completed(futures):
            keep(future.result())
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _initialize() -> None:
    """End with the parent, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _identity(config: dict[str, Any]) -> str:
    """Equal for the same run."""
    return json.dumps(config, sort_keys=True)


def _read(path: Path) -> list[Record]:
    """What a file holds; a last line that was cut off while it was written does not count."""
    if not path.exists():
        return []
    whole, newline, rest = path.read_text().rpartition("\n")
    if rest:
        path.write_text(whole + newline)
    return records.read(path)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
