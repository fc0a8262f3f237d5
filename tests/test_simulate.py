"""Training with virtual workers: it is what processes do, and what it says is so."""

import json
import math
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import wire_bytes
from planted_faults import OneScalePerBucket, RoundedTwice
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import terncomm
from terncomm import Ternary
from terncomm.cli import main
from terncomm.simulator.buckets import first_buckets, rebuilt_buckets
from terncomm.simulator.links import Link
from terncomm.simulator.profile import profile
from terncomm.simulator.records import read
from terncomm.simulator.reductions import Coded, reduction_for
from terncomm.simulator.simulate import Experiment, simulate
from terncomm.simulator.sweep import sole_writer, sweep
from terncomm.simulator.virtual import VirtualWorkers
from terncomm.simulator.workloads import Options, Workload, load

STEPS, BATCH = 4, 8


def workload(seed=0, batch_norm=False):
    """A network with layers that are coded and layers that are not, several buckets of them, and random data."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(96, 40, generator=generator)
    labels = (inputs[:, :4].argmax(1) + (inputs[:, 5] > 0)) % 5
    norm = [nn.BatchNorm1d(64)] if batch_norm else []
    network = nn.Sequential(nn.Linear(40, 64), *norm, nn.Tanh(), nn.Linear(64, 300), nn.Tanh(), nn.Linear(300, 5))
    data = TensorDataset(inputs, labels)
    return Workload(network=network, train=data, test=TensorDataset(inputs[:32], labels[:32]), lr=0.1)


def experiment(**options):
    return Experiment(
        **{"batch_size": BATCH, "epochs": 2, "steps_per_epoch": STEPS // 2, "bucket_cap_mb": 0.02} | options
    )


def simulated(codec, workers, *, batch_norm=False, **options):
    made = workload(batch_norm=batch_norm)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        record = simulate(experiment(codec=codec, workers=workers, **options), workload=made)
    finally:
        torch.set_num_threads(threads)
    return record, {name: tensor.clone() for name, tensor in made.network.state_dict().items()}


def ddp(codec, batch_norm):
    """The same on ranks; what it sent, and the network at the end."""
    made = workload(batch_norm=batch_norm)
    model = DistributedDataParallel(made.network, bucket_cap_mb=0.02)
    state = None
    if codec != "none":
        state = terncomm.register(model, codec, seed=0)
        state.reset_stats()  # registering compares configurations
    sampler = DistributedSampler(made.train, seed=0)
    loader = DataLoader(made.train, batch_size=BATCH, sampler=sampler)
    optimizer = made.optimizer(model.parameters(), made.lr)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for group in optimizer.param_groups:
            group["lr"] = made.lr * (1 + math.cos(math.pi * epoch / 2)) / 2
        for (inputs, labels), _ in zip(loader, range(STEPS // 2), strict=False):
            optimizer.zero_grad()
            made.loss(model(inputs), labels).backward()
            optimizer.step()
    sent = state.stats()["wire_bytes"] if state else None
    return sent, {name: tensor.clone() for name, tensor in made.network.state_dict().items()}


@pytest.mark.parametrize(
    ("codec", "workers", "batch_norm"),
    [("none", 2, False), ("int8", 2, True), ("int8", 4, False), ("terngrad", 2, False), ("terngrad", 4, True)],
)
def test_it_is_the_ddp_run_bit_for_bit(on_ranks, codec, workers, batch_norm):
    """The same weights, buffers of rank 0 too, and to the byte what the hook counts."""
    record, found = simulated(codec, workers, batch_norm=batch_norm)
    sent, wanted = on_ranks(workers, ddp, codec, batch_norm)[0]
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    if sent is not None:
        assert record["history"][-1]["sent_bytes"] == sent


def buckets_of_ddp(cap_mb):
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(200, 200) for _ in range(14)))
    model = DistributedDataParallel(network, **({} if cap_mb is None else {"bucket_cap_mb": cap_mb}))
    numbers = {parameter: number for number, parameter in enumerate(network.parameters())}
    seen = []

    def hook(_, bucket):
        seen.append([numbers[parameter] for parameter in bucket.parameters()])
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, hook)
    for _ in range(2):
        model(torch.ones(2, 200)).sum().backward()
    dist.barrier()
    return seen


@pytest.mark.parametrize("cap_mb", [None, 0.5])
def test_buckets_are_those_of_ddp(on_ranks, cap_mb):
    seen = on_ranks(2, buckets_of_ddp, cap_mb)[0]
    network = nn.Sequential(*(nn.Linear(200, 200) for _ in range(14)))
    numbers = {parameter: number for number, parameter in enumerate(network.parameters())}
    parameters = list(network.parameters())
    ready = [p for layer in reversed(network) for p in (layer.bias, layer.weight)]
    # The order within a layer is autograd's; it is looked up here, and recorded by the simulation.
    order = [parameters[number] for bucket in seen[1:] for number in bucket]
    assert {numbers[p] for p in order[:2]} == {numbers[p] for p in ready[:2]}
    made = first_buckets(parameters) + rebuilt_buckets(order, cap_mb)
    assert [[numbers[p] for p in bucket] for bucket in made] == seen


@pytest.mark.parametrize("codec", ["none", "fp16", "int8", "terngrad"])
def test_many_workers(codec):
    """64 of them, each with a sample or two; every codec learns, and none and fp16 send what a ring does."""
    record, _ = simulated(codec, 64, batch_size=1, epochs=1, bucket_cap_mb=None)
    first, last = record["history"][0], record["history"][-1]
    assert last["test_loss"] < first["test_loss"]
    assert record["mode"] == "simulate"
    if codec in ("none", "fp16"):
        ring = 2 * 63 / 64 * record["parameters"] * (4 if codec == "none" else 2) * last["step"]
        assert last["sent_bytes"] == pytest.approx(ring, rel=0.05)


def test_a_frozen_parameter_has_no_gradient():
    made = workload()
    frozen = next(made.network.parameters()).requires_grad_(False)
    workers = VirtualWorkers(made.network, 2, reduction_for("terngrad"))
    inputs, labels = made.train[:8]
    for _ in range(2):
        workers.step(lambda rank: [lambda: made.loss(made.network(inputs), labels)])
    assert frozen.grad is None
    assert all(each.grad is not None for each in made.network.parameters() if each.requires_grad)


def test_accumulation_is_one_large_batch():
    """Two steps of 4 samples and one update are a step of 8, but for rounding."""
    data = workload().train
    ours, one = ([torch.zeros(0)], [torch.zeros(0)])
    for into, batch, accumulate in ((ours, 4, 2), (one, 8, 1)):
        made = workload()
        workers = VirtualWorkers(made.network, 2, reduction_for("none"))

        def losses(rank, made=made, batch=batch, accumulate=accumulate):
            parts = [data[8 * rank + batch * k : 8 * rank + batch * (k + 1)] for k in range(accumulate)]
            return [lambda part=part: made.loss(made.network(part[0]), part[1]) for part in parts]

        workers.step(losses)
        into[:] = [parameter.grad for parameter in made.network.parameters()]
    for a, b in zip(ours, one, strict=True):
        torch.testing.assert_close(a, b)


def test_accumulation_sends_less_often():
    often, _ = simulated("none", 4)
    seldom, _ = simulated("none", 4, accumulate=2)
    assert seldom["history"][-1]["sent_bytes"] * 2 == often["history"][-1]["sent_bytes"]
    assert seldom["history"][-1]["step"] == often["history"][-1]["step"]


def test_warmup_sends_exactly():
    record, _ = simulated("terngrad", 4, epochs=1, warmup_steps=STEPS // 2)
    assert record["history"][-1]["gradient_error"] < 1e-12
    assert simulated("terngrad", 4, epochs=1)[0]["history"][-1]["gradient_error"] > 1e-3


def test_a_worker_that_raises_ends_all():
    class Stumbles(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(40, 5), 0

        def forward(self, x):
            self.calls += self.training
            if self.calls == 7:  # worker 2 in its second step, of 4
                raise ValueError("boom")
            return self.layer(x)

    torch.manual_seed(0)
    data = workload().train
    made = Workload(network=Stumbles(), train=data, test=data, lr=0.1)
    with pytest.raises(ValueError, match="boom") as caught:
        simulate(experiment(workers=4), workload=made)
    if sys.version_info >= (3, 11):
        assert "virtual worker 2 of 4, exchange 1" in "".join(caught.value.__notes__)


def test_a_worker_that_raises_in_the_exchange_ends_all():
    class Breaks(Coded):
        def path(self, flat, coded, exact, ctx):
            if ctx.rank == 1:
                raise ZeroDivisionError("boom")
            yield from super().path(flat, coded, exact, ctx)

    with pytest.raises(ZeroDivisionError, match="boom"):
        simulate(experiment(), workload=workload(), reduction=Breaks(Ternary()))


def test_planted_faults_stand_out():
    """The error of the averaged gradient, over three seeds, lies clear of what TernGrad's own seeds spread over."""
    found = {}
    for kind in (Coded, OneScalePerBucket, RoundedTwice):
        runs = []
        for seed in range(3):
            made = workload(seed)
            scaled = made.network[0]  # layers whose gradients differ in size, as those of deep networks do
            scaled.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.1,))
            with torch.no_grad():
                scaled.weight *= 10
            record = simulate(
                experiment(seed=seed, workers=8, bucket_cap_mb=None), workload=made, reduction=kind(Ternary())
            )
            runs.append(record["history"][-1]["gradient_error"])
        found[kind] = runs
    spread = max(found[Coded]) - min(found[Coded])
    for fault in (OneScalePerBucket, RoundedTwice):
        assert min(found[fault]) > max(found[Coded]) + 2 * spread, found


def test_predicted_times_are_the_links(tmp_path):
    """The bytes at the link's rate, and what is computed; a tenth of the rate takes ten times as long."""
    told = profile(Experiment(codec="none", workers=4, epochs=1, steps_per_epoch=2))
    slow, fast = (told.on(Link.parse(text)) for text in ("10mbit", "100mbit"))
    nbytes = sum(6 * load.elements for load in told.loads)  # 2 (W - 1) / W of 4 bytes
    assert slow["exchange_s"] == pytest.approx(nbytes / (10e6 / 8 * 0.94), rel=0.02)
    assert slow["exchange_s"] == pytest.approx(10 * fast["exchange_s"], rel=0.1)
    for time_s in (slow, fast):
        parts = [time_s[f"{part}_s"] for part in ("compute", "encode", "exchange", "decode")]
        assert sum(parts) == pytest.approx(time_s["step_s"])
    shared = told.on(Link.parse("10mbit"), per_node=2)
    assert shared["exchange_s"] == pytest.approx(slow["exchange_s"], rel=0.02)  # a ring enters each node once


def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    path, told = tmp_path / "runs.jsonl", []
    wanted = [Experiment(codec=codec, workers=2, epochs=1, steps_per_epoch=1) for codec in ("none", "fp16", "int8")]
    first = sweep(wanted[:2], path, tell=told.append)
    lines = path.read_text().splitlines()
    again = sweep(wanted, path, tell=told.append)
    assert [record["history"] for record in again[:2]] == [record["history"] for record in first]
    assert path.read_text().splitlines()[:2] == lines
    assert len(path.read_text().splitlines()) == 3
    assert "2 of 3 runs are in" in "".join(told)
    path.write_text(path.read_text() + "{half a li")  # killed while it wrote
    assert [record["history"] for record in sweep(wanted, path, tell=told.append)] == [r["history"] for r in again]
    path.write_text(path.read_text() + "no record\n")
    with pytest.raises(ValueError, match="jsonl:4"):
        sweep(wanted, path)


def test_two_sweeps_into_one_folder(tmp_path, capsys):
    """The second is refused in one line while the first runs, and goes on from there after it."""
    words = ["simulate", "--codecs", "none", "--workers", "2", "--epochs", "1", "--steps-per-epoch", "1"]
    words += ["--out", str(tmp_path)]
    with sole_writer(tmp_path):
        assert main(words) == 2
    assert f"another simulation is writing into {tmp_path}" in capsys.readouterr().err
    assert main(words) == 0
    assert [len(record["links"]) for record in read(tmp_path / "runs.jsonl")] == [4]


def test_runs_side_by_side_are_the_runs_alone(tmp_path):
    wanted = [Experiment(codec=codec, workers=2, epochs=1, steps_per_epoch=2) for codec in ("int8", "terngrad")]
    together = sweep(wanted, tmp_path / "a.jsonl", jobs=2, tell=lambda line: None)
    alone = sweep(wanted, tmp_path / "b.jsonl", tell=lambda line: None)
    assert [record["history"] for record in together] == [record["history"] for record in alone]
    for line in (tmp_path / "a.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["config"]["data"] == "digits"
        assert record["provenance"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"codec": "ternary"}, "unknown codec 'ternary'; known: none"),
        ({"codec": "Ternary(2.0)"}, "unknown codec"),
        ({"codec": "Int8(block=0)"}, "block must be at least 1"),
        ({"codec": "Int8(size=3)"}, "Int8"),
        ({"lr": -1.0}, "lr must be positive, got -1.0"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
    ],
)
def test_bad_experiments(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Experiment(**options)


def test_accumulating_more_than_an_epoch_has():
    with pytest.raises(ValueError, match="accumulate=5, but an epoch has 2 steps"):
        simulate(experiment(accumulate=5), workload=workload())


MINE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from terncomm.simulator import Workload

def regression(options):
    inputs = torch.randn(64, 30, generator=torch.Generator().manual_seed(options.seed))
    data = TensorDataset(inputs, inputs[:, :1] * 2)
    return Workload(network=nn.Sequential(nn.Linear(30, 50), nn.Tanh(), nn.Linear(50, 1)), train=data, test=data,
                    lr=0.05, loss=nn.functional.mse_loss, accuracy=None)

def nothing(options):
    return 3
"""


def test_a_workload_of_ones_own(tmp_path):
    """Another loss, no accuracy, named by file and function."""
    file = tmp_path / "my_workload.py"
    file.write_text(MINE)
    record = simulate(Experiment(data=f"{file}:regression", workers=2, epochs=6, batch_size=8))
    history = record["history"]
    assert history[-1]["test_loss"] < 0.5 * history[0]["test_loss"]
    assert all(point["test_accuracy"] is None for point in history)
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    with pytest.raises(ValueError, match="ZeroDivisionError: division by zero"):
        load(f"{broken}:regression", Options())
    raising = tmp_path / "raising.py"
    raising.write_text("def regression(options):\n    raise ValueError('bad shape')\n")
    with pytest.raises(ValueError, match=r"raising\.py:regression: ValueError: bad shape"):
        load(f"{raising}:regression", Options())
    for name, message in [("nothing", "returned int, wanted"), ("gone", "has no 'gone'")]:
        with pytest.raises(ValueError, match=message):
            load(f"{file}:{name}", Options())
    with pytest.raises(ValueError, match="is not a file"):
        load(f"{tmp_path}/no.py:x", Options())


def test_an_interrupted_sweep_leaves_no_process(tmp_path):
    code = (
        "from pathlib import Path; from terncomm.simulator.sweep import sweep; "
        "from terncomm.simulator.simulate import Experiment\n"
        "if __name__ == '__main__':\n"
        f"    runs = [Experiment(seed=seed, epochs=50, workers=2) for seed in range(4)]\n"
        f"    sweep(runs, Path({str(tmp_path)!r}) / 'runs.jsonl', jobs=2)"
    )
    script = tmp_path / "long.py"
    script.write_text(code)
    job = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while len(children := _children(job.pid)) < 3 and time.monotonic() < deadline:  # two, and a resource tracker
            time.sleep(0.1)
        assert len(children) >= 3
        time.sleep(1)
        job.terminate()
        _, said = job.communicate(timeout=30)
    finally:
        job.kill()
    assert "KeyboardInterrupt" in said
    deadline = time.monotonic() + 10
    while (left := [child for child in children if _alive(child)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def _children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def _alive(pid):
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(found) and not found.startswith("Z")


def test_bytes_of_none_are_the_rings():
    record, _ = simulated("none", 3, epochs=1)
    exact = wire_bytes.float_bytes(record["parameters"], 4, 3)
    assert record["history"][-1]["sent_bytes"] == pytest.approx(exact * STEPS // 2, rel=0.02)


def test_networks_as_they_are():
    """Channels-last weights, a layer without gradient at first, a parameter that is never used, a sparse one."""
    data = TensorDataset(torch.randn(32, 3, 8, 8), torch.arange(32) % 4)
    layers = [nn.Conv2d(3, 40, 3), nn.Conv2d(40, 40, 3), nn.Flatten(), nn.Linear(640, 4)]
    torch.manual_seed(0)
    network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    nn.init.zeros_(network[3].weight)
    made = Workload(network=network, train=data, test=data, lr=0.1)
    record = simulate(experiment(workers=2, batch_size=4), workload=made)
    assert all(point["gradient_error"] is not None for point in record["history"][1:])
    assert record["history"][-1]["test_loss"] < record["history"][0]["test_loss"]

    idle = workload()
    with pytest.raises(ValueError, match="no parameters without gradients; got none for idle"):
        simulate(
            experiment(), workload=Workload(network=Ignoring(idle.network), train=idle.train, test=idle.test, lr=1.0)
        )
    empty = workload()
    nothing = TensorDataset(torch.zeros(0, 40), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="the test set is empty"):
        simulate(experiment(), workload=Workload(network=empty.network, train=empty.train, test=nothing, lr=1.0))


class Ignoring(nn.Sequential):
    """Runs what it holds, and has a parameter that it does not use."""

    def __init__(self, inner):
        super().__init__(*inner)
        self.idle = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x
