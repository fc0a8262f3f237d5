"""Checks that a communication library sees all processes that the launcher has started."""

import os

_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "HOROVOD_SIZE", "SLURM_STEP_NUM_TASKS")


def check_sees_all_processes(world_size: int, library: str, advice: str) -> None:
    """Raise if a launcher has started several processes but the library sees only one: each would train alone.

    Args:
        world_size: number of processes that the library sees.
        library: its name, for the error message.
        advice: what the user should do, for the error message.

    Raises:
        ValueError: `world_size` is 1, and an environment variable of a launcher says more.
    """
    if world_size > 1:
        return
    for name in _SIZES:
        started = os.environ.get(name, "1")
        if started.isdigit() and int(started) > 1:
            raise ValueError(f"a launcher has started {started} processes ({name}), but {library} sees one: {advice}")
