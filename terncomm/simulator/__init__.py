"""What a codec costs in accuracy and saves in bytes and time, on links and worlds that are not there.

* `simulate(Experiment(...))`: real training with W virtual workers, by the hook's own code; bytes are counted, time on
  links is predicted.
* `plan(Job(...), ...)`: no training: the layers of known networks, in DDP's buckets, overlapped with computation.

Both give records: plain dicts, which `terncomm plot` draws.
"""

from terncomm.simulator.links import PRESETS, Link
from terncomm.simulator.networks import NETWORKS, Network
from terncomm.simulator.plan import DEVICES, Device, Job, advice, plan
from terncomm.simulator.reductions import Reduction
from terncomm.simulator.simulate import Experiment, simulate
from terncomm.simulator.sweep import sweep
from terncomm.simulator.workloads import DataError, Options, Workload

__all__ = [
    "DEVICES",
    "NETWORKS",
    "PRESETS",
    "DataError",
    "Device",
    "Experiment",
    "Job",
    "Link",
    "Network",
    "Options",
    "Reduction",
    "Workload",
    "advice",
    "plan",
    "simulate",
    "sweep",
]
