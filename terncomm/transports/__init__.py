"""Transports: objects that move bytes between ranks."""

from terncomm.transports.base import Overlapping, RankFailed, Transport, overlaps
from terncomm.transports.horovod import HorovodTransport
from terncomm.transports.local import LocalTransport
from terncomm.transports.metered import Metered
from terncomm.transports.mpi import MPITransport
from terncomm.transports.process_group import ProcessGroupTransport

__all__ = [
    "HorovodTransport",
    "LocalTransport",
    "MPITransport",
    "Metered",
    "Overlapping",
    "ProcessGroupTransport",
    "RankFailed",
    "Transport",
    "overlaps",
]
