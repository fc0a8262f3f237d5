"""What launch/train.py can train on: a data set, a network that suits it, and options that train it well."""

from workloads.base import DataError, Workload
from workloads.cifar10 import cifar10
from workloads.digits import digits
from workloads.mnist import mnist
from workloads.text import text

# A further data set is one more function like these: the parsed command line in, a `Workload` out.
DATA = {"digits": digits, "cifar10": cifar10, "mnist": mnist, "text": text}

__all__ = ["DATA", "DataError", "Workload"]
