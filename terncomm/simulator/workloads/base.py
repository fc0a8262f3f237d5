"""What all data sets have in common."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset


class DataError(ValueError):
    """Data that are not as wanted: one line that says what was wanted, what was found and where to get it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user may say about the data.

    Args:
        data_dir: folder with the files of cifar10 or mnist; nothing is downloaded.
        text: text file; None for Python's own documentation.
        tokens: what is predicted of a text, "words" or "bytes".
        seed: of whatever is drawn at random in the data.
    """

    data_dir: Path | None = None
    text: Path | None = None
    tokens: str = "words"
    seed: int = 0


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over all labels, whatever their shape; `outputs` have one dimension more, of classes."""
    return functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the share of labels that are the likeliest class."""
    return (outputs.argmax(-1) == labels).double().mean()


def cosine(optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule by which the learning rate falls to zero, once an epoch, along half a cosine."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: (1 + math.cos(math.pi * done / epochs)) / 2)


def sgd(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return SGD with momentum, as convolutional networks are usually trained."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A network, its data, and how to train it.

    Args:
        network: maps a batch of inputs to outputs, by default logits over classes, which are the last dimension.
        train, test: pairs (inputs, labels). For the default loss and accuracy the labels have the shape of the outputs
            without their last dimension.
        lr: learning rate at the start, where none is given.
        optimizer: made of (parameters, lr).
        loss: of (outputs, labels), the mean over the batch.
        accuracy: of (outputs, labels), the mean over the batch; None where there is no such thing.
        set_epoch: called with the number of each epoch before it begins, for data that differ between epochs.
        steps_per_epoch: at most so many steps make an epoch, where no number is given; None for all data.
        test_batch: samples per rank that are tested at once.
        fingerprint: of what a checkpoint depends on beside the name of the data, such as a vocabulary.
    """

    network: nn.Module
    train: Dataset[tuple[Tensor, ...]]
    test: Dataset[tuple[Tensor, ...]]
    lr: float
    optimizer: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer] = sgd
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    accuracy: Callable[[Tensor, Tensor], Tensor] | None = accuracy
    set_epoch: Callable[[int], None] = lambda epoch: None
    steps_per_epoch: int | None = None
    test_batch: int = 256
    fingerprint: str = ""


def folder_with(names: Iterable[str], data_dir: Path | None, inside: str, what: str) -> Path:
    """Return the folder that holds files of these names, be they compressed or not: `data_dir`, or `inside` it.

    Args:
        names: of all files that are wanted.
        data_dir: the folder that the user named, if any.
        inside: the folder that the published archive unpacks to.
        what: the data set, and where to get it.

    Raises:
        DataError: there is no such folder.
    """
    if data_dir is None:
        raise DataError(f"--data-dir is missing, the folder with {what}")
    if not data_dir.is_dir():
        raise DataError(f"--data-dir {data_dir} is not a folder; wanted: the folder with {what}")
    folder = data_dir / inside if (data_dir / inside).is_dir() else data_dir
    found = sorted(path.name for path in folder.iterdir())
    missing = [name for name in names if name not in found and f"{name}.gz" not in found]
    if missing:
        some = ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")
        raise DataError(f"{folder} lacks {', '.join(missing)}; it holds {some or 'nothing'}; wanted: {what}")
    return folder


def check_labels(labels: Tensor, path: Path) -> None:
    """Raise DataError if a label is not one of ten classes."""
    if labels.max() > 9:
        raise DataError(f"{path}: labels go from 0 to 9, found {labels.max()}; this is another format")
