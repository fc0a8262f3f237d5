"""CIFAR-10 in its published "binary version": records of one label and 3 x 32 x 32 bytes, red, green, blue.

References: A. Krizhevsky. Learning Multiple Layers of Features from Tiny Images. 2009. K. He, X. Zhang, S. Ren, J. Sun.
Deep Residual Learning for Image Recognition. CVPR 2016, section 4.2.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from terncomm.simulator.workloads.base import DataError, Options, Workload, check_labels, folder_with

TRAIN = [f"data_batch_{number}.bin" for number in range(1, 6)]
TEST = ["test_batch.bin"]
WHAT = "data_batch_1.bin to _5.bin and test_batch.bin of https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
RECORD_NBYTES = 1 + 3 * 32 * 32
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
PADDING = 4


def cifar10(options: Options) -> Workload:
    """Return ResNet-20, 50000 augmented training and 10000 test images (3, 32, 32) from `options.data_dir`."""
    folder = folder_with(TRAIN + TEST, options.data_dir, "cifar-10-batches-bin", WHAT)
    train = Images(*read(folder, TRAIN), seed=options.seed)
    return Workload(
        network=resnet20(), train=train, test=Images(*read(folder, TEST)), lr=0.05, set_epoch=train.set_epoch
    )


def read(folder: Path, names: list[str]) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 32, 32) and labels (N,) of these files together, both uint8."""
    parts = []
    for path in (folder / name for name in names):
        try:
            content = np.fromfile(path, np.uint8)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; wanted: {WHAT}") from error
        if len(content) == 0 or len(content) % RECORD_NBYTES:
            raise DataError(
                f"{path} has {len(content)} bytes, which is no whole number of records of {RECORD_NBYTES}: "
                f"it is cut off, or of another format; wanted: {WHAT}"
            )
        records = torch.from_numpy(content).view(-1, RECORD_NBYTES)
        check_labels(records[:, 0], path)
        parts.append(records)
    records = torch.cat(parts)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].clone()


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Normalized images; with a seed, cropped at random out of a frame of zeros, and mirrored at random.

    Where image `i` is cropped in an epoch follows from (seed, epoch, i): on any rank, after any resumption.

    Args:
        images: (N, 3, 32, 32) uint8.
        labels: (N,) uint8.
        seed: of the augmentation; None for none.
    """

    def __init__(self, images: Tensor, labels: Tensor, seed: int | None = None) -> None:
        self.images, self.labels, self.seed = images, labels.long(), seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew what is cropped and mirrored."""
        if self.seed is not None:
            noise = np.random.default_rng([self.seed, epoch])
            self.corners = noise.integers(2 * PADDING + 1, size=(len(self), 2))
            self.mirrored = noise.integers(2, size=len(self), dtype=bool)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image (3, 32, 32) of mean about 0 and variance about 1, and its label ()."""
        image = (self.images[index] / 255 - MEAN) / STD
        if self.seed is not None:
            top, left = self.corners[index]
            image = functional.pad(image, [PADDING] * 4)[:, top : top + 32, left : left + 32]
            if self.mirrored[index]:
                image = image.flip(-1)
        return image, self.labels[index]


class Residual(nn.Module):
    """Two convolutions of 3 x 3, added to their input; a shortcut without parameters (option A of the paper).

    The last norm begins at zero, a block as its shortcut (P. Goyal et al. Accurate, Large Minibatch SGD. 2017, 5.1).

    Shapes: (B, inputs, H, W) -> (B, outputs, H / stride, W / stride).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, outputs - inputs
        last = nn.GroupNorm(8, outputs)
        self.layers = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.GroupNorm(8, outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), last),
        )
        nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H / stride, W / stride)."""
        shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return functional.relu(self.layers(x) + shortcut)


def resnet20() -> nn.Module:
    """Return ResNet-20 of 0.27 M parameters, (B, 3, 32, 32) -> (B, 10), with GroupNorm in place of BatchNorm.

    BatchNorm would keep statistics that differ between ranks and are no gradients: a checkpoint of one rank would lack
    the others', and small batches per rank would make them poor. GroupNorm keeps nothing.
    """
    blocks = [
        Residual(inputs, outputs, stride)
        for width, narrower in ((16, 16), (32, 16), (64, 32))
        for inputs, outputs, stride in ((narrower, width, width // narrower), (width, width, 1), (width, width, 1))
    ]
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.GroupNorm(8, 16), nn.ReLU()),
        *blocks,
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
