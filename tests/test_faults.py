"""Ranks that die, fail, stay away or differ: every other one says why, in time. Functions up to the tests run there."""

import inspect
import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta
from itertools import product

import pytest
import torch
import torch.distributed as dist
from forked import run_job
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm import ops, transports
from terncomm.codecs import codec_for
from terncomm.hooks import connection
from terncomm.path import reduce
from terncomm.path.header import Header
from terncomm.path.parts import Codes

TIMEOUT_S = 10.0
VICTIM = 1


def network(layers=6):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(128, 128) for _ in range(layers)])


def backward(model):
    model(torch.randn(4, 128)).square().mean().backward()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise ValueError("boom")


def soon(act):
    """Act in a moment, while what was called goes on."""
    threading.Timer(0.0005, act).start()


STAGES = {  # where the steps of the path are looked up
    "measure": (type(codec_for("terngrad")), "measure"),
    "header": (Header, "prologue"),  # the first message is made
    "share": (reduce, "agree"),  # a generator: from the first message to the shared statistics
    "check": (reduce, "check"),  # the headers of all ranks have come
    "encode": (ops, "encode_pack"),
    "exchange": (transports.ProcessGroupTransport, "begin"),  # on the thread that owns the wire
    "wait": (transports.process_group, "_wait"),  # there, too
    "add": (Codes, "combine"),
    "decode": (Codes, "unpack"),
}
PHASES = {"measure": "encode", "encode": "encode", "decode": "decode"}  # of the others: "exchange"


def disturb(stage, when, act):
    """From now on, `act` before, during or after the next call of a stage."""
    owner, name = STAGES[stage]
    original = getattr(owner, name)

    def begins():
        if when == "before":
            act()
        if when == "during":
            soon(act)

    def ends():
        if when == "after":
            act()

    def disturbed(*args, **kwargs):
        begins()
        result = original(*args, **kwargs)
        ends()
        return result

    def disturbed_path(*args, **kwargs):
        begins()
        result = yield from original(*args, **kwargs)
        ends()
        return result

    setattr(owner, name, disturbed_path if inspect.isgeneratorfunction(original) else disturbed)


def train(stage, when, act, victim=VICTIM, codec="terngrad"):
    """Three good steps; in the fourth the victim acts. In two phases every stage is run."""
    model = DistributedDataParallel(network(), bucket_cap_mb=0.1)
    terncomm.register(model, codec, exchange="two_phase")
    for step in range(6):
        if step == 3 and dist.get_rank() == victim:
            if stage == "forward":
                act()
            else:
                disturb(stage, when, act)
        backward(model)


def goes_on_living(stage):
    """The victim survives its own error and does something else."""
    try:
        train(stage, "before", fail)
    except RuntimeError:
        if dist.get_rank() != VICTIM:
            raise
        time.sleep(4)
        sys.exit(7)


def never_registers(kind):
    """The victim trains without a hook, or has died before."""
    model = DistributedDataParallel(network())
    if dist.get_rank() == VICTIM:
        if kind == "killed":
            kill()
    elif kind == "pair":
        model.register_comm_hook(terncomm.CommState("int8"), terncomm.comm_hook)
    else:
        terncomm.register(model, "int8")
    backward(model)


def killed_while_connecting(stage):
    if dist.get_rank() == VICTIM:
        setattr(connection, stage, lambda *args, **kwargs: kill())
    terncomm.register(DistributedDataParallel(network()), "int8")


def another_bucket_size(how):
    """DDP itself takes rank 0's buckets once it has rebuilt them, which it does not where parameters may be unused."""
    cap = 0.1 if dist.get_rank() == VICTIM else 25
    model = DistributedDataParallel(network(layers=40), bucket_cap_mb=cap, find_unused_parameters=True)
    if how == "register":
        terncomm.register(model, "int8")
    else:
        model.register_comm_hook(terncomm.CommState("int8"), terncomm.comm_hook)
    for _ in range(3):
        backward(model)


def another_version():
    from terncomm.hooks import reducer

    if dist.get_rank() == VICTIM:
        reducer.__version__ = "0.0.9"
    terncomm.register(DistributedDataParallel(network()), "int8")


def disabled_on_one(codec):
    model = DistributedDataParallel(network(), bucket_cap_mb=0.1)
    state = terncomm.register(model, codec)
    for step in range(4):
        if step == 2 and dist.get_rank() == VICTIM:
            state.disable()
        backward(model)


def one_step_more():
    """The victim ends its loop early and leaves."""
    model = DistributedDataParallel(network(), bucket_cap_mb=0.1)
    terncomm.register(model, "terngrad")
    for _ in range(3 if dist.get_rank() == VICTIM else 5):
        backward(model)
    if dist.get_rank() == VICTIM:
        os._exit(0)


def chunks():
    """The victim is killed at the beginning of a large all-gather, which is sent in chunks."""
    model = DistributedDataParallel(nn.Linear(1536, 1536, bias=False))
    terncomm.register(model, "int8", exchange="gather")
    for step in range(4):
        if step == 2 and dist.get_rank() == VICTIM:
            transports.ProcessGroupTransport._chunks = lambda *args: kill()
        model(torch.randn(1, 1536)).sum().backward()


def stopped(victim):
    """The victim's process stops, and so does all that it serves."""
    model = DistributedDataParallel(network(), bucket_cap_mb=0.1)
    terncomm.register(model, "terngrad")
    for step in range(4):
        if step == 2 and dist.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGSTOP)
        backward(model)


def late(seconds):
    """The victim comes after the others have given up, and they try again with it."""
    model = DistributedDataParallel(network())
    if dist.get_rank() == VICTIM:
        time.sleep(seconds)
    else:
        try:
            terncomm.register(model, "int8")
        except terncomm.transports.RankFailed as error:
            print("gave up:", error)
    terncomm.register(model, "int8")
    backward(model)
    print("trained")


def stuck():
    """The victim is busy for longer than the group waits."""
    model = DistributedDataParallel(network(), bucket_cap_mb=0.1)
    terncomm.register(model, "terngrad")
    for step in range(3):
        if step == 2 and dist.get_rank() == VICTIM:
            time.sleep(TIMEOUT_S + 2)
            os._exit(0)
        backward(model)


def late_after_a_change(after_s, late_s):
    """The timeout of the default group is changed after two steps, and the victim comes late to the fourth."""
    model = DistributedDataParallel(network(), bucket_cap_mb=0.1)
    terncomm.register(model, "terngrad")
    for step in range(5):
        if step == 2:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=after_s))
        if step == 3 and dist.get_rank() == VICTIM:
            time.sleep(late_s)
        backward(model)


def store_gone():
    """Rank 0, which serves the store, ends before the others register."""
    model = DistributedDataParallel(network())
    if dist.get_rank() == 0:
        os._exit(0)
    time.sleep(1)
    terncomm.register(model, "terngrad")


def interrupted():
    """Ctrl-C reaches every rank of a terminal's job."""
    model = DistributedDataParallel(network(), bucket_cap_mb=0.1)
    terncomm.register(model, "terngrad")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for step in range(10_000):
        if step == 5:
            threading.Timer(0.05 + 0.01 * dist.get_rank(), os.kill, (os.getpid(), signal.SIGINT)).start()
        backward(model)


# ---- tests -----------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.conformance
SURVIVORS = (0, 2)


@pytest.mark.parametrize(
    ("stage", "when"),
    [*((stage, "during") for stage in STAGES), *product(("share", "encode", "exchange"), ("before", "after"))],
)
def test_a_rank_killed_in_a_stage_is_named(tmp_path, stage, when):
    job = run_job(3, train, stage, when, kill, directory=tmp_path, timeout_s=TIMEOUT_S)
    assert job[VICTIM].status == -signal.SIGKILL
    for rank in SURVIVORS:
        assert job[rank].status == 1, job[rank].text
        assert f"No word from rank {VICTIM}: killed, ended or stuck" in job[rank].text
        assert f"rank {2 - rank}:" not in job[rank].text, "a survivor is not accused"
        assert "terminate called" not in job[rank].text
        assert job[rank].seconds - job[VICTIM].seconds < TIMEOUT_S


@pytest.mark.parametrize("codec", ["terngrad", "int8"])
def test_a_rank_killed_between_steps_is_named(tmp_path, codec):
    job = run_job(3, train, "forward", "", kill, VICTIM, codec, directory=tmp_path, timeout_s=TIMEOUT_S)
    for rank in SURVIVORS:
        assert job[rank].status == 1
        assert f"No word from rank {VICTIM}" in job[rank].text
        assert job[rank].seconds - job[VICTIM].seconds < TIMEOUT_S


def test_the_rank_that_serves_the_store_is_killed(tmp_path):
    job = run_job(3, train, "exchange", "before", kill, 0, directory=tmp_path, timeout_s=TIMEOUT_S)
    for rank in (1, 2):
        assert job[rank].status == 1
        assert "store does not answer: the rank that serves it, often rank 0, has ended or is stuck" in job[rank].text
        assert job[rank].seconds - job[0].seconds < TIMEOUT_S


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "share"])
def test_an_error_on_one_rank_reaches_all_in_its_own_words(tmp_path, stage):
    job = run_job(3, train, stage, "before", fail, directory=tmp_path, timeout_s=TIMEOUT_S)
    phase = PHASES.get(stage, "exchange")
    assert "ValueError: boom" in job[VICTIM].text
    for rank in SURVIVORS:
        assert job[rank].status == 1
        assert f"rank {VICTIM} failed in bucket 0 of step 3, {phase}: ValueError: boom." in job[rank].text
        assert job[rank].seconds - job[VICTIM].seconds < TIMEOUT_S


def test_others_need_not_wait_for_a_failed_rank_to_end(tmp_path):
    job = run_job(3, goes_on_living, "encode", directory=tmp_path, timeout_s=60)
    assert job[VICTIM].status == 7
    for rank in SURVIVORS:
        assert f"rank {VICTIM} failed in bucket 0 of step 3, encode: ValueError: boom." in job[rank].text
        assert job[rank].seconds < job[VICTIM].seconds - 2


@pytest.mark.parametrize("kind", ["killed", "register", "pair"])
def test_a_rank_that_never_registers_is_named(tmp_path, kind):
    job = run_job(3, never_registers, kind, directory=tmp_path, timeout_s=5)
    for rank in SURVIVORS:
        assert job[rank].status == 1
        assert re.search(rf"rank {VICTIM} has not come within [45] s. Every rank must call terncomm", job[rank].text)
        assert job[rank].seconds < 5 + 3


@pytest.mark.parametrize("stage", ["_backend_like", "agree_on"])
def test_a_rank_killed_while_it_registers_is_named(tmp_path, stage):
    job = run_job(3, killed_while_connecting, stage, directory=tmp_path, timeout_s=6)
    for rank in SURVIVORS:
        assert job[rank].status == 1
        assert f"No word from rank {VICTIM}: killed, ended or stuck" in job[rank].text
        assert job[rank].seconds - job[VICTIM].seconds < 6 + 3


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("register", "bucket_cap_mb: 25.0 on rank 0, 2; 0.1 on rank 1"),
        ("pair", "bucket_cap_mb and the model must be equal on all ranks"),
    ],
)
def test_another_bucket_size_on_one_rank(tmp_path, how, words):
    for end in run_job(3, another_bucket_size, how, directory=tmp_path, timeout_s=TIMEOUT_S):
        assert end.status == 1
        assert words in end.text
        assert end.seconds < 2 * TIMEOUT_S


def test_another_version_on_one_rank(tmp_path):
    for end in run_job(3, another_version, directory=tmp_path, timeout_s=TIMEOUT_S):
        assert end.status == 1
        assert f"terncomm version: {terncomm.__version__} on rank 0, 2; 0.0.9 on rank 1" in end.text


@pytest.mark.parametrize("codec", ["terngrad", "int8"])
def test_disabled_on_one_rank(tmp_path, codec):
    for end in run_job(3, disabled_on_one, codec, directory=tmp_path, timeout_s=TIMEOUT_S):
        assert end.status == 1
        assert "call enable() and disable() at the same step" in end.text
        assert end.seconds < 2 * TIMEOUT_S


def test_a_rank_that_leaves_early_is_named(tmp_path):
    job = run_job(3, one_step_more, directory=tmp_path, timeout_s=TIMEOUT_S)
    for rank in SURVIVORS:
        assert job[rank].status == 1
        assert f"No word from rank {VICTIM}" in job[rank].text


def test_a_rank_killed_in_a_large_all_gather_is_named_by_all(tmp_path):
    job = run_job(4, chunks, directory=tmp_path, timeout_s=TIMEOUT_S)
    for rank in (0, 2, 3):
        assert job[rank].status == 1
        assert f"No word from rank {VICTIM}: killed" in job[rank].text
        assert job[rank].seconds - job[VICTIM].seconds < TIMEOUT_S / 2


def test_a_rank_that_is_stopped_is_named_within_the_timeout(tmp_path):
    for victim, words in (
        (1, "No word from rank 1: killed, ended or stuck"),
        (0, "often rank 0, has ended or is stuck"),
    ):
        job = run_job(3, stopped, victim, directory=tmp_path, timeout_s=TIMEOUT_S, stopped=victim)
        for rank in {0, 1, 2} - {victim}:
            assert job[rank].status == 1, job[rank].text
            assert words in job[rank].text
            assert job[rank].seconds < TIMEOUT_S + 4


def test_ranks_that_gave_up_meet_when_they_try_again(tmp_path):
    job = run_job(2, late, 5, directory=tmp_path, timeout_s=5)
    assert [end.status for end in job] == [0, 0], job[0].text + job[1].text
    assert "gave up: rank 1 has not come" in job[0].text
    assert [end.text.count("trained") for end in job] == [1, 1]


def test_a_rank_that_is_stuck_is_named_within_the_timeout(tmp_path):
    job = run_job(3, stuck, directory=tmp_path, timeout_s=TIMEOUT_S)
    for rank in SURVIVORS:
        assert job[rank].status == 1
        assert f"No word from rank {VICTIM}" in job[rank].text
        assert job[rank].seconds < TIMEOUT_S + 2


def test_a_timeout_that_is_raised_later_holds(tmp_path):
    for end in run_job(3, late_after_a_change, 30.0, 5.0, directory=tmp_path, timeout_s=3.0):
        assert end.status == 0, end.text


def test_a_timeout_that_is_lowered_later_holds(tmp_path):
    job = run_job(3, late_after_a_change, 3.0, 15.0, directory=tmp_path, timeout_s=60.0)
    for rank in SURVIVORS:
        assert job[rank].status == 1
        assert f"No word from rank {VICTIM}" in job[rank].text
        assert job[rank].seconds < 12


def test_a_store_that_is_gone_is_told(tmp_path):
    for end in run_job(3, store_gone, directory=tmp_path, timeout_s=TIMEOUT_S)[1:]:
        assert end.status == 1
        assert "RankFailed: the job's store cannot be reached: the rank that serves it, often rank 0" in end.text
        assert end.seconds < TIMEOUT_S


def test_ctrl_c_ends_every_rank(tmp_path):
    for end in run_job(3, interrupted, directory=tmp_path, timeout_s=TIMEOUT_S, limit_s=TIMEOUT_S + 10):
        assert end.status != 0
        assert "KeyboardInterrupt" in end.text or "No word from rank" in end.text
        assert "terminate called" not in end.text
        assert end.seconds < 2 * TIMEOUT_S
