"""What each step sent and took: JSON lines, TensorBoard, log lines, ranges in profiles."""

import contextlib
import json
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import terncomm
from terncomm.codecs import codec_for
from terncomm.keys import Key
from terncomm.path import reduce as path
from terncomm.path.account import Account, Clock, Context
from terncomm.path.pipeline import Pipeline
from terncomm.reduce import RanksDiffer, all_reduce_mean, bucket_of
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
            for steps in (2, 1, 2):
                train(averager, parameter, steps)
                averager.reset_stats()
            averager.reset_stats()
            train(averager, parameter, 1)
        return averager.stats()["wire_bytes"]

    sent = LocalTransport.run(2, work)[0]
    assert [each["wire_bytes"] for each in lines(tmp_path / "steps")] == [sent] * 6
    assert sent > 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_ends_watching_and_not_training(caplog):
    def work(transport):
        averager, parameter = averagers(transport)
        watch = terncomm.Watch(averager, jsonl="/dev/full", log_every=0)
        train(averager, parameter, 4)
        watch.close()
        with terncomm.Watch(averager, jsonl="/dev/full", log_every=0):
            train(averager, parameter, 1)  # told on closing
        return averager.stats()["steps"]

    assert LocalTransport.run(2, work) == [5, 5]
    assert [each for each in caplog.messages if "Watch stops" in each] == [
        f"Watch stops: cannot write the record of step {step}: OSError: [Errno 28] No space left on device"
        for step in (0, 4)
    ]


def test_a_watch_takes_no_error_away():
    """Headers that come late from a device are looked at by statistics, too."""

    class Late:
        def arrived(self):
            return True

        def check(self):
            raise RanksDiffer("not in step")

    def work(transport):
        averager, parameter = averagers(transport)
        with contextlib.suppress(RanksDiffer), terncomm.Watch(averager, log_every=1):
            train(averager, parameter, 1)
            averager._unchecked.append(Late())
            for _ in range(2):
                with pytest.raises(RanksDiffer, match="not in step"):
                    averager.stats()
            with pytest.raises((RanksDiffer, RuntimeError), match="not in step"):
                train(averager, parameter, 1)
        return "told"

    assert LocalTransport.run(1, work) == ["told"]


def in_halves(folder):
    """Two models of two ranks each: rank 0 of the job watches, and files by rank are the job's ranks."""
    half = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    parameter = nn.Parameter(torch.zeros(64, 64))
    averager = terncomm.GradientAverager([parameter], "int8", half)
    with (
        terncomm.Watch(averager, jsonl=f"{folder}/one", log_every=0),
        terncomm.Watch(averager, jsonl=f"{folder}/of-{{rank}}", log_every=0),
    ):
        train(averager, parameter, 3)
    return averager.rank


def test_ranks_are_the_jobs(on_ranks, tmp_path):
    assert on_ranks(4, in_halves, str(tmp_path)) == [0, 1, 2, 3]
    assert {path.name: len(lines(path)) for path in tmp_path.iterdir()} == {
        "one": 3, "of-0": 3, "of-1": 3, "of-2": 3, "of-3": 3
    }  # fmt: skip


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


def test_a_directory_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: tests/engines.sh")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def work(transport):
        averager, parameter = averagers(transport)
        with terncomm.Watch(averager, tensorboard=tmp_path / "runs"):
            train(averager, parameter, 3)

    LocalTransport.run(2, work)
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [(each.step, each.value) for each in events.Scalars("terncomm/raw_bytes")] == [(n, 16384) for n in range(3)]


def test_refused():
    with pytest.raises(TypeError, match=r"wanted what terncomm\.register returned"):
        terncomm.Watch(nn.Linear(1, 1))
    averager = LocalTransport.run(1, lambda transport: averagers(transport)[0])[0]
    with pytest.raises(ValueError, match="log_every must not be negative, got -1"):
        terncomm.Watch(averager, log_every=-1)


@pytest.mark.parametrize("driver", ["blocking", "pipelined"])
@pytest.mark.parametrize("codec", ["terngrad", "int8"])
def test_phases_have_names_in_a_profile(codec, driver):
    """On the hook's own threads, too."""
    layers, key, transport = Segments([64]), Key(0, 1, bucket=3), Echo(2)
    pipeline = Pipeline()

    def work():
        if driver == "blocking":
            return all_reduce_mean(torch.ones(64), layers, codec_for(codec), transport, key=key)
        ctx = Context(key, transport.rank, transport.world_size, Account(clock := Clock()))
        steps = path.all_reduce_mean(torch.ones(64), bucket_of(layers, codec_for(codec)), ctx)
        return pipeline.submit(steps, {"all": transport}, clock, lambda error, phase: error, bucket=3).wait()

    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(experimental_config=every_thread) as profile:
        work()
    found = {each.name for each in profile.events()}
    parts = ["measure", "share", "encode", "decode", "all_gather"]
    assert {f"terncomm {part}, bucket 3" for part in parts} <= found
