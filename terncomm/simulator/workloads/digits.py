"""Digits of 8 x 8 pixels, which ship with scikit-learn."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from terncomm.simulator.workloads.base import DataError, Options, Workload


def digits(options: Options) -> Workload:
    """Return a convolutional network, 1437 training and 360 test images (1, 8, 8) of handwritten digits."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise DataError(f"the digits come with scikit-learn ({error}): pip install 'terncomm[examples]'") from error

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(labels)
    train, test = train_test_split(torch.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.GroupNorm(8, 128), nn.ReLU()),
        *(nn.Conv2d(128, 128, 3, padding=1), nn.GroupNorm(8, 128), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(512, 512), nn.ReLU()),
        nn.Linear(512, 10),
    )
    return Workload(
        network=network,
        train=TensorDataset(images[train], labels[train]),
        test=TensorDataset(images[test], labels[test]),
        lr=0.03,
    )
