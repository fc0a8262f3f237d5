"""Whether the library that a transport goes over sees the processes that a launcher started."""

import os

_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "HOROVOD_SIZE", "SLURM_STEP_NUM_TASKS")


def check_not_alone(world_size: int, library: str, advice: str) -> None:
    """Raise where a launcher has started several processes and each of them is a world of its own.

    Raises:
        ValueError: with `advice`; every process would train alone, without a word.
    """
    if world_size > 1:
        return
    for name in _SIZES:
        started = os.environ.get(name, "1")
        if started.isdigit() and int(started) > 1:
            raise ValueError(f"a launcher has started {started} processes ({name}), but {library} sees one: {advice}")
