"""What the server of `jobs.py` imports before it forks ranks: everything that takes long."""

import pytest  # noqa: F401
import torch._dynamo  # noqa: F401  # DistributedDataParallel asks it
import torch.distributed
import torch.nn.parallel  # noqa: F401

from terncomm import ops

ops.compile_kernels()
