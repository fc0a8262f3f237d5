"""launch/train.py and a script of a user's own, started by torchrun as people start them."""

import re

import pytest
from jobs import ROOT, ended, ended_but_copied, read, torchrun

EPOCHS = 3
STEPS = 23  # ceil(ceil(1437 images / 2 ranks) / 32)
SECONDS = ("seconds", "step_s", "encode_s", "exchange_s", "decode_s")


def train(*options):
    return torchrun(ROOT / "launch" / "train.py", "--codec=terngrad", "--batch-size=32", f"--epochs={EPOCHS}", *options)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """(what it printed, its metrics, a copy of its checkpoint taken on the way) of a run from beginning to end."""
    path = tmp_path_factory.mktemp("train")
    metrics, checkpoint, copy = path / "a folder" / "metrics.jsonl", path / "checkpoint.pt", path / "copy.pt"
    job = train("--metrics", metrics, "--checkpoint", checkpoint)
    printed = ended_but_copied(job, checkpoint, copy)
    return printed, read(metrics), copy


def test_metrics(whole_run):
    printed, records, _ = whole_run
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert [record["step"] for record in records] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert records[0]["train_loss"] > records[1]["train_loss"] > records[2]["train_loss"] > 0
    assert 0.7 < records[2]["test_accuracy"] <= 1
    for epoch, record in enumerate(records, 1):
        assert (record["data"], record["codec"], record["world_size"]) == ("digits", "terngrad", 2)
        assert record["raw_bytes"] == 4 * record["parameters"] * STEPS * epoch
        assert record["wire_bytes"] > record["exact_bytes"] > 0
        assert record["bytes_source"] == "counted by transport"
        assert all(record[name] > 0 for name in SECONDS)
    # With two ranks a ring sends as many bytes as the gradients have.
    assert records[2]["raw_bytes"] > 10 * records[2]["wire_bytes"]
    assert printed.count("epoch ") == EPOCHS
    assert f"epoch   3/{EPOCHS}" in printed


def test_resumed_run_is_the_whole_run_bit_for_bit(whole_run, tmp_path):
    _, expected, checkpoint = whole_run
    metrics = tmp_path / "metrics.jsonl"
    printed = ended(train("--metrics", metrics, "--checkpoint", checkpoint))
    found = re.search(rf"resumed from {re.escape(str(checkpoint))} after epoch (\d)", printed)
    assert found, printed
    before = int(found[1])
    assert 1 <= before < EPOCHS, "the checkpoint was copied too late"
    assert printed.count("test accuracy") == EPOCHS - before
    resumed = read(metrics)
    assert len(resumed) == EPOCHS
    for epoch, (record, other) in enumerate(zip(resumed, expected, strict=True), 1):
        apart = (*SECONDS, "wire_bytes", "sent_bytes", "exact_bytes")
        assert [record[key] for key in record if key not in apart] == [other[key] for key in other if key not in apart]
        # A process that starts compares configurations and takes a step in other buckets: some bytes more or less.
        assert abs(record["wire_bytes"] - other["wire_bytes"]) <= (4096 if epoch > before else 0)
        assert abs(record["exact_bytes"] - other["exact_bytes"]) <= (4096 if epoch > before else 0)


SCRIPT = """\
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
model = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

torch.manual_seed(1 + dist.get_rank())
losses = []
for _ in range(40):
    inputs = torch.randn(32, 32)
    optimizer.zero_grad()
    loss = (model(inputs) - inputs[:, :8]).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

mine = torch.cat([p.detach().flatten() for p in model.parameters()])
everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
dist.all_gather(everyones, mine)
if dist.get_rank() == 0:
    print("equal", all(torch.equal(mine, other) for other in everyones))
    print("values", model.module[2].weight.grad.unique().numel())
    print("losses", losses[0], losses[-1])
dist.barrier()
del model
dist.destroy_process_group()
"""


def test_two_lines_in_a_script_of_ones_own(tmp_path):
    wrap = "model = DistributedDataParallel(model)\n"
    assert SCRIPT.count(wrap) == 1
    script = tmp_path / "job.py"
    script.write_text(
        "import terncomm\n" + SCRIPT.replace(wrap, wrap + 'state = terncomm.register(model, "terngrad")\n')
    )
    told = dict(
        line.split(" ", 1) for line in ended(torchrun(script)).splitlines() if line[:5] in ("equal", "value", "losse")
    )
    assert told["equal"] == "True"
    assert 2 <= int(told["values"]) <= 5  # the sums of two ternary gradients have five levels
    first, last = map(float, told["losses"].split())
    assert last < 0.8 * first
