"""MNIST in its published format: idx files, a big-endian header and then unsigned bytes, compressed or not.

Reference: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner. Gradient-Based Learning Applied to Document Recognition.
Proceedings of the IEEE, 1998.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from terncomm.simulator.workloads.base import DataError, Options, Workload, check_labels, folder_with

FILES = {part: (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")}
WHAT = "MNIST's four idx files, plain or .gz, as from https://ossci-datasets.s3.amazonaws.com/mnist/"
UNSIGNED_BYTE = 0x08


def mnist(options: Options) -> Workload:
    """Return a network like LeNet-5, 60000 training and 10000 test images (1, 28, 28) from `options.data_dir`."""
    folder = folder_with([name for pair in FILES.values() for name in pair], options.data_dir, "MNIST/raw", WHAT)
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(800, 256), nn.ReLU()),
        nn.Linear(256, 10),
    )
    return Workload(network=network, train=part(folder, "train"), test=part(folder, "t10k"), lr=0.03)


def part(folder: Path, name: str) -> TensorDataset:
    """Return "train" or "t10k": images (N, 1, 28, 28) of mean about 0 and variance about 1, labels (N,)."""
    images_path, labels_path = (folder / file for file in FILES[name])
    images, labels = read_idx(images_path, (None, 28, 28)), read_idx(labels_path, (None,))
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images in {images_path.name}, {len(labels)} labels")
    check_labels(labels, labels_path)
    return TensorDataset((images[:, None] / 255 - 0.1307) / 0.3081, labels.long())


def read_idx(path: Path, shape: tuple[int | None, ...]) -> Tensor:
    """Return the bytes of the idx file at `path`, or at `path`.gz, as uint8 of this shape; None stands for any size.

    Raises:
        DataError: it is no idx file of bytes, of another shape, cut off, or too long.
    """
    if not path.exists():
        path = path.with_name(path.name + ".gz")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; wanted: {WHAT}") from error
    header_nbytes = 4 + 4 * len(shape)
    magic = bytes([0, 0, UNSIGNED_BYTE, len(shape)])
    if content[:4] != magic:
        raise DataError(f"{path} begins with {content[:4].hex() or 'nothing'}, not with idx's {magic.hex()}")
    if len(content) < header_nbytes:
        raise DataError(f"{path} is cut off: an idx header of {header_nbytes} bytes is wanted, it has {len(content)}")
    found = struct.unpack(f">{len(shape)}I", content[4:header_nbytes])
    if found[0] == 0 or any(wanted not in (None, size) for wanted, size in zip(shape, found, strict=True)):
        wanted = " x ".join("N" if size is None else str(size) for size in shape)
        raise DataError(f"{path} is of {' x '.join(map(str, found))} elements, wanted {wanted}")
    if len(content) != header_nbytes + math.prod(found):
        wanted = header_nbytes + math.prod(found)
        raise DataError(f"{path} has {len(content)} bytes, its header says {wanted}; it is cut off or damaged")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header_nbytes).reshape(found).copy())
