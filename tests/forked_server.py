"""What the server of `forked.py` imports before it forks ranks: everything that takes long."""

import pytest  # noqa: F401
import torch._dynamo  # DistributedDataParallel asks it
import torch.distributed
import torch.nn.parallel  # noqa: F401

from terncomm import ops

ops.compile_kernels()
