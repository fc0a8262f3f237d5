"""What each step sent and took: JSON lines, TensorBoard, log lines, ranges in profiles."""

import json
import logging

import pytest
import torch
from torch import nn

import terncomm
from terncomm.codecs import codec_for
from terncomm.hooks.runner import OrderedWorker
from terncomm.keys import Key
from terncomm.reduce import all_reduce_mean
from terncomm.segments import Segments
from terncomm.simulator.codec_costs import Echo
from terncomm.transports import LocalTransport


def train(averager, parameter, steps):
    for step in range(steps):
        parameter.grad = torch.full_like(parameter, float(step))
        averager.reduce()


def averagers(transport, codec="int8"):
    parameter = nn.Parameter(torch.zeros(64, 64))
    return terncomm.GradientAverager([parameter], codec, transport), parameter


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_for_each_step_of_rank_0(tmp_path):
    def work(transport):
        averager, parameter = averagers(transport)
        with terncomm.Watch(averager, jsonl=tmp_path / "new" / "steps.jsonl"):
            train(averager, parameter, 5)
        train(averager, parameter, 1)
        return averager.stats()

    stats = LocalTransport.run(2, work)[0]
    records = lines(tmp_path / "new" / "steps.jsonl")
    assert [each["step"] for each in records] == [0, 1, 2, 3, 4]
    for each in records:
        assert each["raw_bytes"] == 4 * 64 * 64
        assert each["wire_bytes"] == stats["wire_bytes"] / 6
        assert each["coded_numel"] == 64 * 64
        assert 0 < each["encode_s"] + each["exchange_s"] + each["decode_s"] < each["seconds"]


def test_files_of_all_ranks_and_a_second_run_that_goes_on(tmp_path):
    def work(transport):
        averager, parameter = averagers(transport)
        for _ in range(2):
            watch = terncomm.Watch(averager, jsonl=f"{tmp_path}/{{rank}}.jsonl")
            train(averager, parameter, 2)
            watch.close()
            watch.close()

    LocalTransport.run(3, work)
    for rank in range(3):
        assert [each["step"] for each in lines(tmp_path / f"{rank}.jsonl")] == [0, 1, 2, 3]


def test_statistics_that_are_reset_meanwhile(tmp_path):
    def work(transport):
        averager, parameter = averagers(transport)
        with terncomm.Watch(averager, jsonl=tmp_path / "steps"):
            train(averager, parameter, 2)
            averager.reset_stats()
            train(averager, parameter, 2)

    LocalTransport.run(2, work)
    sent = {each["wire_bytes"] for each in lines(tmp_path / "steps")[2:]}
    assert len(sent) == 1
    assert min(sent) > 0


def test_clipping_is_told_when_it_was_looked_at(tmp_path):
    def work(transport):
        averager, parameter = averagers(transport, "terngrad")
        with terncomm.Watch(averager, jsonl=tmp_path / "steps"):
            train(averager, parameter, 5)

    LocalTransport.run(2, work)
    told = ["clip_norm_lost/parameter 0" in each for each in lines(tmp_path / "steps")]
    assert told == [True, True, True, False, False]


def test_a_log_line_in_so_many_steps(caplog):
    def work(transport):
        averager, parameter = averagers(transport)
        with terncomm.Watch(averager, log_every=3):
            train(averager, parameter, 7)

    with caplog.at_level(logging.INFO, "terncomm"):
        LocalTransport.run(2, work)
    told = [each for each in caplog.messages if each.startswith("step ")]
    assert [each.split(":")[0] for each in told] == ["step 2", "step 5"]
    assert "0.02 MB of gradients as 0.00 MB sent per rank and step" in told[0]


class Writer:
    def __init__(self):
        self.told = []

    def add_scalar(self, name, value, step):
        self.told.append((name, value, step))


def test_a_summary_writer():
    writer = Writer()

    def work(transport):
        averager, parameter = averagers(transport)
        with terncomm.Watch(averager, tensorboard=writer):
            train(averager, parameter, 2)

    LocalTransport.run(2, work)
    assert ("terncomm/raw_bytes", 4 * 64 * 64, 1) in writer.told
    assert {name for name, _, _ in writer.told} >= {"terncomm/wire_bytes", "terncomm/encode_s", "terncomm/seconds"}


def test_refused():
    with pytest.raises(TypeError, match=r"wanted what terncomm\.register returned"):
        terncomm.Watch(nn.Linear(1, 1))
    averager = LocalTransport.run(1, lambda transport: averagers(transport)[0])[0]
    with pytest.raises(ValueError, match="log_every must not be negative, got -1"):
        terncomm.Watch(averager, log_every=-1)


@pytest.mark.parametrize("codec", ["terngrad", "int8"])
def test_phases_have_names_in_a_profile(codec):
    """On the hook's own thread, too."""

    def work():
        return all_reduce_mean(torch.ones(64), Segments([64]), codec_for(codec), Echo(2), key=Key(0, 1, bucket=3))

    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    worker = OrderedWorker()
    with torch.profiler.profile(experimental_config=every_thread) as profile:
        worker.submit(work).wait()
    found = {each.name for each in profile.events()}
    assert {f"terncomm {part}, bucket 3" for part in ("measure", "share", "encode", "exchange", "decode")} <= found
