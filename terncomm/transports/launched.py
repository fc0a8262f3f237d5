"""Whether a program sees all processes that a launcher has started."""

import logging
import os
import warnings

_log = logging.getLogger("terncomm")

_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "HOROVOD_SIZE", "SLURM_STEP_NUM_TASKS")
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "HOROVOD_RANK", "SLURM_PROCID")


def processes_started() -> tuple[int, str]:
    """How many processes a launcher has started, and the environment variable that says so; (1, "") if none does."""
    for name in _SIZES:
        started = os.environ.get(name, "1")
        if started.isdigit() and int(started) > 1:
            return int(started), name
    return 1, ""


def check_sees_all_processes(world_size: int, library: str, advice: str) -> None:
    """Raise if a launcher has started several processes but the library sees only one: each would train alone.

    Args:
        world_size: number of processes that the library sees.
        library: its name, for the error message.
        advice: what the user should do, for the error message.

    Raises:
        ValueError: `world_size` is 1, and an environment variable of a launcher says more.
    """
    started, name = processes_started()
    if world_size == 1 and started > 1:
        raise ValueError(f"a launcher has started {started} processes ({name}), but {library} sees one: {advice}")


def tell_of_one_process(framework: str, advice: str) -> None:
    """Log that one process has nothing to compress; warn if a launcher has started more, which then train alone.

    Args:
        framework: what sees one process, for the message.
        advice: what the user should do, for the message.
    """
    started, name = processes_started()
    if started == 1:
        _log.info("one process: there is nothing to compress")
    elif all(os.environ.get(rank, "0") == "0" for rank in _RANKS):
        warnings.warn(
            f"a launcher has started {started} processes ({name}), but {framework} sees one: each trains a model of "
            f"its own, and no gradients are averaged or compressed. {advice}",
            stacklevel=3,
        )
