"""Data in their published formats, written here in small, and training on them through launch/train.py."""

import gzip
import re
import struct

import pytest
import torch
from compare import parse_arguments
from jobs import ROOT, stop, torchrun
from torch.nn import functional

from terncomm.simulator import workloads
from terncomm.simulator.workloads import DataError, Options
from terncomm.simulator.workloads.cifar10 import MEAN, STD, Images
from terncomm.simulator.workloads.text import vocabulary_of
from terncomm.structure import structural

MNIST = {
    "train-images-idx3-ubyte": (60, 28, 28),
    "train-labels-idx1-ubyte": (60,),
    "t10k-images-idx3-ubyte": (20, 28, 28),
    "t10k-labels-idx1-ubyte": (20,),
}
CIFAR = {"data_batch_1": 8, "data_batch_2": 8, "data_batch_3": 8, "data_batch_4": 8, "data_batch_5": 7, "test_batch": 5}


def load(data, **given):
    return workloads.load(data, Options(**given))


def random_bytes(shape, classes=256):
    return torch.randint(classes, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(len(shape)))


def idx(values):
    return struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape) + values.numpy().tobytes()


def everything(dataset):
    """(inputs, labels) of all samples, stacked."""
    return [torch.stack(parts) for parts in zip(*(dataset[i] for i in range(len(dataset))), strict=True)]


@pytest.fixture
def mnist_dir(tmp_path):
    for name, shape in MNIST.items():
        (tmp_path / name).write_bytes(idx(random_bytes(shape, classes=10 if "labels" in name else 256)))
    return tmp_path


@pytest.fixture
def cifar_dir(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name, records in CIFAR.items():
        content = torch.randint(256, (records, 3073), dtype=torch.uint8, generator=generator)
        content[:, 0] %= 10
        (folder / f"{name}.bin").write_bytes(content.numpy().tobytes())
    return folder


@pytest.mark.parametrize("compressed", [False, True])
def test_mnist_is_read(mnist_dir, compressed):
    expected = {name: random_bytes(shape, classes=10 if "labels" in name else 256) for name, shape in MNIST.items()}
    if compressed:
        for path in list(mnist_dir.iterdir()):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    workload = load("mnist", data_dir=mnist_dir)
    for dataset, part in ((workload.train, "train"), (workload.test, "t10k")):
        images, labels = everything(dataset)
        assert torch.equal((images * 0.3081 + 0.1307).mul(255).round()[:, 0], expected[f"{part}-images-idx3-ubyte"])
        assert torch.equal(labels, expected[f"{part}-labels-idx1-ubyte"].long())
    assert workload.network(images).shape == (20, 10)


def replaced(values, name="train-images-idx3-ubyte"):
    return lambda folder: (folder / name).write_bytes(idx(values))


def cut(nbytes, name="train-images-idx3-ubyte"):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:nbytes])


def compressed_and_cut(folder):
    path = folder / "t10k-images-idx3-ubyte"
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes())[:-100])
    path.unlink()


def longer(folder):
    with (folder / "t10k-labels-idx1-ubyte").open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(), "lacks t10k-labels-idx1-ubyte; it holds t10k-im"),
        (cut(0), "train-images-idx3-ubyte begins with nothing, not with idx's 00000803"),
        (cut(11), "train-images-idx3-ubyte is cut off: an idx header of 16 bytes is wanted, it has 11"),
        (cut(1000), "train-images-idx3-ubyte has 1000 bytes, its header says 47056"),
        (longer, "t10k-labels-idx1-ubyte has 29 bytes, its header says 28"),
        (compressed_and_cut, "t10k-images-idx3-ubyte.gz cannot be read: Compressed file ended"),
        (replaced(random_bytes((60,))), "begins with 00000801, not with idx's 00000803"),
        (replaced(random_bytes((60, 28, 27))), "is of 60 x 28 x 27 elements, wanted N x 28 x 28"),
        (replaced(random_bytes((0, 28, 28))), "is of 0 x 28 x 28 elements, wanted N x 28 x 28"),
        (replaced(random_bytes((59, 28, 28))), "59 images in train-images-idx3-ubyte, 60 labels"),
        (replaced(torch.full((60,), 10).byte(), "train-labels-idx1-ubyte"), "labels go from 0 to 9, found 10"),
    ],
)
def test_damaged_mnist_is_refused(mnist_dir, damage, complaint):
    damage(mnist_dir)
    with pytest.raises(DataError, match=re.escape(complaint)):
        load("mnist", data_dir=mnist_dir)


@pytest.mark.parametrize("parent", [False, True])
def test_cifar10_is_read(cifar_dir, parent):
    workload = load("cifar10", data_dir=cifar_dir.parent if parent else cifar_dir)
    for dataset, names in ((workload.train, list(CIFAR)[:5]), (workload.test, ["test_batch"])):
        content = b"".join((cifar_dir / f"{name}.bin").read_bytes() for name in names)
        expected = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 3073)
        assert len(dataset) == len(expected)
        assert torch.equal(dataset.labels, expected[:, 0].long())
        assert torch.equal(dataset.images.flatten(1), expected[:, 1:])
    images, _ = everything(workload.test)
    assert torch.equal((images * STD + MEAN).mul(255).round(), workload.test.images)
    assert workload.network(images).shape == (5, 10)
    assert sum(p.numel() for p in workload.network.parameters()) == 269722  # 0.27 M, table 6 of the paper


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "test_batch.bin").unlink(), "lacks test_batch.bin; it holds data_batch_1.bin, data_"),
        (cut(0, "data_batch_2.bin"), "data_batch_2.bin has 0 bytes, which is no whole number of records of 3073"),
        (cut(3074, "test_batch.bin"), "test_batch.bin has 3074 bytes, which is no whole number of records of 3073"),
        (
            lambda folder: (folder / "data_batch_3.bin").write_bytes(b"\x0a" * 3073),
            "data_batch_3.bin: labels go from 0 to 9, found 10",
        ),
    ],
)
def test_damaged_cifar10_is_refused(cifar_dir, damage, complaint):
    damage(cifar_dir)
    with pytest.raises(DataError, match=re.escape(complaint)):
        load("cifar10", data_dir=cifar_dir)


@pytest.mark.parametrize("data", ["cifar10", "mnist"])
def test_data_that_are_not_there(tmp_path, data):
    (tmp_path / "empty").mkdir()
    for data_dir, complaint in (
        (None, "--data-dir is missing, the folder with .* https://"),
        (tmp_path / "elsewhere", "elsewhere is not a folder; wanted: .* https://"),
        (tmp_path / "empty", "empty lacks .*; it holds nothing; wanted: .* https://"),
    ):
        with pytest.raises(DataError, match=complaint) as caught:
            load(data, data_dir=data_dir)
        assert "\n" not in str(caught.value)


def test_crops_follow_from_seed_epoch_and_image():
    pixels = random_bytes((300, 3, 32, 32))
    labels = torch.zeros(300, dtype=torch.uint8)

    def augmented(seed, *epochs):
        images = Images(pixels, labels, seed)
        for epoch in epochs:
            images.set_epoch(epoch)
        return everything(images)[0]

    assert torch.equal(augmented(1, 5), augmented(1, 2, 3, 5))
    assert not torch.equal(augmented(1, 5), augmented(1, 4))
    assert not torch.equal(augmented(1, 5), augmented(5, 1))
    assert not torch.equal(augmented(1, 5), augmented(2, 5))

    framed = functional.pad((pixels / 255 - MEAN) / STD, [4] * 4)
    seen = set()
    for image, frame in zip(augmented(1, 5), framed, strict=True):
        places = [(top, left, flip) for top in range(9) for left in range(9) for flip in (False, True)]
        crops = [
            (frame[:, t : t + 32, u : u + 32].flip(-1) if f else frame[:, t : t + 32, u : u + 32]) for t, u, f in places
        ]
        seen.add(next(place for place, crop in zip(places, crops, strict=True) if torch.equal(image, crop)))
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert {flip for _, _, flip in seen} == {False, True}


def test_default_text():
    workload = load("text")
    network = workload.network
    assert 8000 <= network.embedding.num_embeddings <= 8192
    found = structural(network, ("embedding", "head"))
    assert {found[network.embedding.weight], found[network.head.weight]} == {"embedding", "head"}
    assert len(found) == 3  # and the embedding of positions

    # Nothing is seen of what comes later.
    inputs, labels = workload.train[0]
    assert torch.equal(inputs[1:], labels[:-1])
    assert inputs.max() > 0
    other = inputs.clone()
    other[40] += 1
    before, after = network(torch.stack([inputs, other]))
    assert torch.equal(before[:40], after[:40])
    assert not torch.equal(before[40:], after[40:])


def test_text_is_cut_by_position(tmp_path):
    content = "".join(f"{number} naïve words, " for number in range(400)).encode()
    path = tmp_path / "text"
    path.write_bytes(content)
    workload = load("text", text=path, tokens="bytes")
    test_begins = len(content) - len(content) // 10
    for dataset, part in ((workload.train, content[:test_begins]), (workload.test, content[test_begins:])):
        inputs, labels = everything(dataset)
        assert bytes(inputs.flatten().tolist()) == part[: inputs.numel()]
        assert bytes(labels.flatten().tolist()) == part[1 : inputs.numel() + 1]
        assert len(part) - inputs.numel() <= 64
    assert workload.network.embedding.num_embeddings == 256

    workload = load("text", text=path)
    words = re.findall(r"\w+|,", content.decode())
    names = [
        word for word, _ in sorted(vocabulary_of(words[: len(words) - len(words) // 10]).items(), key=lambda x: x[1])
    ]
    inputs, _ = everything(workload.train)
    assert [names[token] for token in inputs.flatten()] == words[: inputs.numel()]
    assert (everything(workload.test)[0] == 0).any()  # numbers that the training text has not


def test_text_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="nowhere cannot be read: No such file or directory; wanted: a text file"):
        load("text", text=tmp_path / "nowhere")
    path = tmp_path / "text"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="text is not UTF-8 at byte 3"):
        load("text", text=path)
    path.write_text("too short")
    with pytest.raises(DataError, match="has 9 bytes; wanted: a text of 642 or more"):
        load("text", text=path, tokens="bytes")


def train(*options):
    return torchrun(ROOT / "launch" / "train.py", "--epochs=3", "--batch-size=4", *options)


@pytest.mark.slow
def test_training_without_data_ends_with_one_line(tmp_path):
    job = train("--data=cifar10", f"--data-dir={tmp_path}")
    try:
        printed, _ = job.communicate(timeout=100)
    finally:
        stop(job)
    assert job.returncode != 0
    (line,) = [line for line in printed.splitlines() if str(tmp_path) in line]
    assert line.startswith(f"train.py: {tmp_path} lacks data_batch_1.bin, ")
    assert line.endswith("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz (rank 0)")
    assert "terminate called" not in printed


def test_compare_passes_options_on():
    args = parse_arguments(["--data", "text", "--codecs", "none", "int8", "--", "--tokens", "bytes"])
    assert (args.data, args.codecs, args.passed_on) == ("text", ["none", "int8"], ["--tokens", "bytes"])
    assert parse_arguments([]).passed_on == []
