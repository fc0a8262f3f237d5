"""Prediction without training: the timeline, the formulas, the planner, and the command line in front of them."""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from terncomm.cli import main
from terncomm.path.drivers import Call
from terncomm.segments import Segments
from terncomm.simulator.codec_costs import FREE, Cost, Echo, measure
from terncomm.simulator.fabric import KINDS, Measured, Software, Switched
from terncomm.simulator.links import Link
from terncomm.simulator.networks import NETWORKS, of_module, of_size, parse_count
from terncomm.simulator.plan import DEVICES, WORTH, Device, Job, advice, plan
from terncomm.simulator.predict import Load, load_of, predict
from terncomm.simulator.reductions import reduction_for
from terncomm.simulator.timeline import DECODE, ENCODE, WIRE, Compute, Stage, step_time

QUICK = Software("quick", round_s=0.0, message_s=0.0)
MBYTE = Link("1 MB/s", 8e6, efficiency=1.0)


def wire(seconds, busy=0.0):
    return [Stage(WIRE, seconds, busy)]


@pytest.mark.parametrize(
    ("compute", "buckets", "cores", "wanted"),
    [
        # Forward 1, backward 4; a bucket of 2 that is there in the middle is hidden, one at the end is not.
        (Compute(1, (2.0,), 4), [wire(2)], 2, (5, 0, 0, 0)),
        (Compute(1, (4.0,), 4), [wire(2)], 2, (5, 0, 2, 0)),
        (Compute(1, (2.0, 4.0), 4), [wire(3), wire(1)], 2, (5, 0, 2, 0)),  # the second waits for the first
        (Compute(1, (4.0,), 4, after_s=0.5), [wire(2)], 2, (5.5, 0, 2, 0)),
        # Encoding beside computing: free on a core of its own, half as fast for both on a shared one.
        (Compute(1, (2.0,), 4), [[Stage(ENCODE, 1.0)]], 2, (5, 0, 0, 0)),
        (Compute(1, (2.0,), 4), [[Stage(ENCODE, 1.0)]], 1, (5, 1, 0, 0)),
        (Compute(1, (4.0,), 4), [[Stage(ENCODE, 1.0), *wire(2), Stage(DECODE, 0.5)]], 1, (5, 1, 2, 0.5)),
        (Compute(1, (3.0,), 4), [[Stage(ENCODE, 4.0)]], 1, (5, 4, 0, 0)),  # work is conserved
        # Sending keeps a fifth of the one core busy: computing takes longer by that.
        (Compute(1, (0.0,), 4), [wire(2, busy=0.2)], 1, (5, 0, 0.4, 0)),
        (Compute(1, (0.0,), 4), [wire(2, busy=0.2)], 2, (5, 0, 0, 0)),
        (Compute(1, (0.0,), 4), [wire(2, busy=0.8)], 1.5, (5, 0, 2 / 0.9375 * 0.25, 0)),
    ],
)
def test_timeline(compute, buckets, cores, wanted):
    found = step_time(compute, buckets, cores=cores)
    assert [found.compute_s, found.encode_s, found.exchange_s, found.decode_s] == pytest.approx(wanted)
    assert found.step_s == pytest.approx(sum(wanted))


def test_pieces_overlap_and_buckets_keep_their_order():
    at_end = Compute(1, (4.0, 4.0), 4)
    piece = [Stage(ENCODE, 1.0), *wire(2), Stage(DECODE, 1.0)]
    # Encode 1, send 2 and 2, decode 1: the second piece is encoded and the first decoded meanwhile.
    assert step_time(Compute(1, (4.0,), 4), [piece, piece], bucket_of=[0, 0]).step_s == pytest.approx(5 + 6)
    assert step_time(at_end, [piece, piece]).step_s == pytest.approx(5 + 6)
    # A bucket sends all its messages before the next sends its first; pieces of one do not wait.
    long = [*wire(1), Stage(DECODE, 5.0), *wire(1)]
    assert step_time(at_end, [long, wire(1)]).step_s == pytest.approx(5 + 8)
    assert step_time(Compute(1, (4.0,), 4), [long, wire(1)], bucket_of=[0, 0]).step_s == pytest.approx(5 + 7)


def test_a_bucket_is_predicted_in_the_pieces_in_which_it_travels():
    fabric, layers = Switched(MBYTE, software=QUICK), Segments([4 << 20])
    load = load_of(layers, Segments(()), reduction_for("int8"), 4)
    assert load.rows == (True,) * 4
    compute = Compute(0, (0.0,), 0.0)
    wires = sum(fabric.seconds(call, 4) for call in load.calls)
    assert predict(compute, [load], 4, fabric, FREE).step_s == pytest.approx(wires)
    cost = load._replace(cost_s=(wires / 2, 0.0, wires / 2))
    ahead = wires + (wires / 2 + wires / 2) / 4  # only the first piece's encoding and the last one's decoding add time
    assert predict(compute, [cost], 4, fabric, FREE, cores=3).step_s == pytest.approx(ahead, rel=0.05)


def test_more_load_and_fewer_cores_never_make_a_step_shorter():
    def step(busy, cores):
        return step_time(Compute(1, (1.0,), 4), [[Stage(ENCODE, 1.0), *wire(2, busy)]], cores=cores).step_s

    grid = [k / 20 for k in range(1, 41)]
    for cores in grid:
        times = [step(busy, cores) for busy in grid if busy <= 1]
        assert times == sorted(times), cores
    for busy in grid[:20]:
        # Seconds are those that a stage takes on these cores alone: what is compared is the same work.
        times = [step(busy, cores) for cores in grid if cores >= 1]
        assert all(a >= b - 1e-9 for a, b in pairwise(times)), busy


def test_timeline_refuses():
    with pytest.raises(ValueError, match="2 buckets, but 1 times"):
        step_time(Compute(1, (1.0,), 1), [[], []])
    with pytest.raises(ValueError, match="cores must be positive"):
        step_time(Compute(1, (1.0,), 1), [[]], cores=0)


@pytest.mark.parametrize(
    ("kind", "per_node", "wanted"),
    [
        # 8 ranks, a million bytes to each other one, 1 MB/s: 7 s, whatever the algorithm.
        ("all_reduce", 1, 7.0),
        ("all_to_all", 1, 7.0),
        ("all_gather", 1, 7.0),
        # Four on a node share its link: a ring crosses it once, but all to all sends 4 x 4 million bytes through it.
        ("all_reduce", 4, 7.0),
        ("all_gather", 4, 7.0),
        ("all_to_all", 4, 16.0),
        ("all_to_all", 8, 0.0),  # one node, and nothing said of the inside
    ],
)
def test_bytes_through_a_node(kind, per_node, wanted):
    fabric = Switched(MBYTE, per_node, software=QUICK)
    assert fabric.seconds(Call(kind, 1_000_000), 8) == pytest.approx(wanted)


def test_delays_and_rounds():
    slow = Switched(Link("", 8e15, delay_s=0.01, efficiency=1.0), software=QUICK)
    assert slow.seconds(Call("all_reduce", 1000), 4) == pytest.approx(6 * 0.01)  # 2 (W - 1) rounds
    assert slow.seconds(Call("all_gather", 2**18), 4) == pytest.approx(0.01)  # on its way for longer than it takes
    assert slow.seconds(Call("all_gather", 2**18 + 1), 4) == pytest.approx(3 * 0.01)
    in_turn = Switched(slow.link, software=Software("", 0.0, 0.0, incast=1.5, steps=True))
    assert in_turn.seconds(Call("all_gather", 2**18 + 1), 4) == pytest.approx(0.01)  # all chunks are under way
    tree = Switched(slow.link, software=Software("", 0.0, 0.0, tree=True))
    assert tree.seconds(Call("all_reduce", 1000), 1024) == pytest.approx(2 * 10 * 0.01)
    incast = Switched(MBYTE, software=Software("", 0.0, 0.0, incast=1.5))
    assert incast.seconds(Call("all_to_all", 1000), 4) == pytest.approx(1.5 * 3e-3)
    assert incast.seconds(Call("all_to_all", 1000), 2) == pytest.approx(1e-3)
    assert slow.seconds(Call("all_to_all", 1000), 1) == 0


def test_measured_lines():
    points = [(100.0, 1.0), (200.0, 3.0), (400.0, 4.0)]
    slower = [(n, 2 * s) for n, s in points]
    fabric = Measured(
        4,
        dict.fromkeys(KINDS, points) | {"all_reduce_half": slower},
        {kind: 0.1 * i for i, kind in enumerate(KINDS)},
        dict.fromkeys(KINDS, 0.0),
    )
    (halves,) = reduction_for("fp16").calls(Segments([300]), Segments([]), 4)  # 2 / 4 of 600 bytes
    assert fabric.seconds(halves, 4) == pytest.approx(2 * 3.5)
    assert fabric.busy(halves) == pytest.approx(0.1)
    (floats,) = reduction_for("none").calls(Segments([150]), Segments([]), 4)
    assert fabric.seconds(floats, 4) == pytest.approx(3.5)
    assert fabric.busy(floats) == 0
    assert fabric.busy(Call("all_gather", 200)) == pytest.approx(0.2)  # a small one goes all to all
    for nbytes, wanted in [(100, 1.0), (150, 2.0), (300, 3.5), (800, 6.0)]:
        assert fabric.seconds(Call("all_to_all", nbytes), 4) == pytest.approx(wanted)
    assert fabric.seconds(Call("all_gather", 0), 4) == 0
    with pytest.raises(ValueError, match="measured were 4 ranks, not 8"):
        fabric.seconds(Call("all_to_all", 1), 8)


def test_prediction_adds_up():
    cost = Cost((1.0, 2.0, 3.0), (0.0, 0.0, 0.001))
    load = Load((Call("all_gather", 1_000_000), Call("all_to_all", 1_000_000)), 1000)
    found = predict(Compute(1, (1.0,), 1), [load], 2, Switched(MBYTE, software=QUICK), cost)
    assert (found.encode_s, found.exchange_s, found.decode_s) == pytest.approx((1.0, 2.0, 2.0 + 4.0))
    assert predict(Compute(1, (1.0,), 1), [load], 1, Switched(MBYTE), cost).step_s == 2
    waits = replace(cost, waiting=(0.5, 0.001))
    later = predict(Compute(1, (1.0,), 1), [load], 2, Switched(MBYTE, software=QUICK), waits)
    assert (later.encode_s, later.exchange_s, later.decode_s) == pytest.approx((1.0, 2.0 + 1.5, 2.0 + 4.0))


def test_codec_costs_grow_with_the_bucket():
    found = measure(reduction_for("terngrad").codec, 4)
    assert sum(found.per_element_s) > 0
    assert sum(found.seconds(10**7)) > 2 * sum(found.seconds(10**6))
    assert Echo(3).all_gather(torch.arange(2)).tolist() == [[0, 1]] * 3


def job(name="resnet50", device="gpu", **options):
    return Job(NETWORKS[name], NETWORKS[name].batch_size, DEVICES[device], **options)


def test_a_plan_without_overlap_is_arithmetic():
    """VGG-16 by the layers, nothing computed: bytes of a ring over the rate."""
    found = next(plan(job("vgg16", compute_s=0.0), workers=[4], links=[MBYTE], codecs=["none"], software=QUICK))
    wanted = 2 * 3 / 4 * 4 * NETWORKS["vgg16"].numel
    assert found["sent_bytes"] == pytest.approx(wanted, rel=1e-6)
    assert found["step_s"] == pytest.approx(wanted / 1e6, rel=1e-6)


def test_a_plan_with_much_to_compute_hides_all_but_the_last_bucket():
    link = Link.parse("10gbit")
    found = next(plan(job(compute_s=100.0), workers=[4], links=[link], codecs=["none"], software=QUICK))
    first_layers = 25 * 2**20 * 1.5 / link.payload_bytes_per_s  # at most a bucket, 2 (W - 1) / W times
    assert 100 < found["step_s"] < 100 + 2 * first_layers


def test_slow_links_and_many_workers_favour_codecs():
    times = {
        (p["config"]["workers"], p["config"]["link"], p["config"]["codec"]): p["step_s"]
        for p in plan(job(), workers=[4, 64], links=[Link.parse("1gbit"), Link.parse("100gbit")])
    }
    for workers in (4, 64):
        order = [times[workers, "1gbit", codec] for codec in ("none", "fp16", "int8", "terngrad")]
        assert order == sorted(order, reverse=True)
        gain = [times[workers, link, "none"] / times[workers, link, "terngrad"] for link in ("1gbit", "100gbit")]
        assert gain[0] > 1.5 * gain[1]


def test_embeddings_and_heads_travel_exactly():
    """GPT-2's table is a third of it, so no codec sends less than that third."""
    mine = job("gpt2")
    table = sum(p.numel for p in mine.network.parameters if p.kind)
    assert mine.sent_bytes("terngrad", 4) > 1.5 * 4 * table
    assert mine.sent_bytes("terngrad", 4) < mine.sent_bytes("int8", 4) < mine.sent_bytes("none", 4)


def test_gradients_of_two_bytes_are_planned_as_such():
    """Plain and exact parts are half of float32's, float16 saves nothing, codes stay as they are."""
    layers = [nn.Linear(512, 512), nn.LayerNorm(512), nn.Linear(512, 512)]
    sent = {}
    for dtype in (torch.float32, torch.bfloat16):
        network = of_module(nn.Sequential(*layers).to(dtype), "mine")
        mine = Job(network, 8, DEVICES["cpu-core"], bucket_cap_mb=100)  # one bucket, whatever its type
        sent[dtype] = {codec: mine.sent_bytes(codec, 4) for codec in ("none", "fp16", "int8")}
    whole, half = sent.values()
    assert half["none"] == half["fp16"] == whole["fp16"] == whole["none"] / 2
    exact = 2 * 1.5 * sum(p.numel for p in network.parameters if len(p.shape) < 2)
    assert whole["int8"] - half["int8"] == pytest.approx(exact, rel=0.01)


def test_break_even_is_where_steps_are_just_worth_it():
    mine, fabric = job(), Switched(Link.parse("1gbit"))
    rate = mine.break_even("int8", 8, fabric)
    at = Switched(Link("", rate))
    assert mine.point("none", 8, at).step_s == pytest.approx(WORTH * mine.point("int8", 8, at).step_s, rel=0.01)
    dear = Device(name="dear", flops_per_s=1e15, costs={"int8": Cost((1e5,) * 3, (0.0,) * 3)}, cores=2, source="")
    assert Job(of_size(1000), 1, dear).break_even("int8", 2, fabric) is None
    free = Device(name="free", flops_per_s=1e15, costs={"fp16": FREE}, cores=2, source="")
    assert (
        Job(of_size(10**6), 1, free, compute_s=0.0).break_even("fp16", 2, Switched(MBYTE, software=QUICK)) == math.inf
    )


def test_a_thousand_workers_in_seconds():
    for name in ("resnet50", "bert-base", "vgg16"):
        began = time.process_time()
        points = list(plan(job(name), workers=[1024], links=[Link.parse("10gbit")]))
        assert time.process_time() - began < 5.0, name
        assert len(points) == 4


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        ({"none": 1.0, "int8": 0.97, "terngrad": 0.99}, "none"),
        ({"none": 1.0, "fp16": 0.6, "int8": 0.4, "terngrad": 0.1}, "terngrad"),
        ({"none": 1.0, "fp16": 0.6, "int8": 0.105, "terngrad": 0.1}, "int8"),
        ({"none": 1.0, "fp16": 1.3, "int8": 1.2, "terngrad": 1.1}, "none"),
    ],
)
def test_advice_is_the_gentlest_that_is_nearly_quickest(steps, wanted):
    chosen, reason = advice(steps)
    assert chosen == wanted
    assert reason.startswith("keep none" if wanted == "none" else f"{wanted}: steps")


def test_a_codec_written_out_costs_what_its_kind_costs():
    fabric = Switched(Link.parse("1gbit"))
    mine = job("resnet50", "cpu-core")
    assert mine.point("Ternary(clip=2.5)", 4, fabric) == mine.point("terngrad", 4, fabric)
    assert advice({"none": 1.0, "Int8(block=512)": 0.105, "terngrad": 0.1})[0] == "Int8(block=512)"


def test_counts():
    assert [parse_count(text) for text in ("25.6M", "7", "1.5k", "2G", "1b")] == [25_600_000, 7, 1500, 2 * 10**9, 10**9]
    assert of_size(25_600_000).numel == 25_600_000
    for text in ("", "M", "-3", "0", "1T", "nan", "inf"):
        with pytest.raises(ValueError, match="number of parameters"):
            parse_count(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("plan resnet50 --workers 0", "workers must be at least 1, got 0"),
        ("plan resnet50 --links=-5mbit", "positive"),
        ("plan resnet50 --links -5mbit", "positive"),
        ("plot nowhere", "no file or folder nowhere"),
        ("plan resnet50 --links 5parsec", "no link"),
        ("plan resnet50 --codecs gzip", "unknown codec 'gzip'; known: none"),
        ("plan resnet5", "unknown network 'resnet5'; known: alexnet"),
        ("plan /no/such.py:f", "is not a file"),
        ("plan resnet50 --tflops 0", "--tflops must be positive"),
        ("plan resnet50 --compute-ms=-1", "must not be negative"),
        ("plan resnet50 --workers x", "invalid int value: 'x'"),
        ("plan resnet50 --workers 1 --compute-ms 0", "takes no time"),
        ("plan resnet50 --bucket-cap-mb=-1", "bucket_cap_mb must be positive, got -1.0"),
        ("simulate --seeds 99999999999999999999", "seed must be from 0"),
        ("doctor --compute-ms nan", "--compute-ms must not be negative"),
        ("plan resnet50 --batch-size 0", "batch_size must be at least 1"),
        ("plan resnet50 --per-node 0", "per_node must be at least 1"),
        ("simulate --workers 0", "workers must be at least 1, got 0"),
        ("simulate --codecs gzip", "unknown codec 'gzip'"),
        ("simulate --codecs accumulate-x", "wanted a number of steps"),
        ("simulate --total-batch 10 --workers 4", "cannot be divided among 4 workers"),
        ("simulate --data nope", "unknown data 'nope'; known: digits"),
        ("simulate --jobs 0", "--jobs must be at least 1"),
        ("simulate --links 1megabit", "no link"),
        ("doctor --params many", "unknown network 'many'"),
        ("doctor", "start this under torchrun"),
        ("plot /no/such/folder", "/no/such/folder"),
    ],
)
def test_bad_words_get_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    try:
        status = main(words.split())
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_plan_command(capsys, tmp_path):
    out = tmp_path / "deep" / "plan.jsonl"
    assert (
        main(f"plan vgg-a --workers 2 16 --links 1gbit wan-50ms --per-node 4 --inside 10gbit --out {out}".split()) == 0
    )
    said = capsys.readouterr().out
    assert said.startswith("MODE: planned. ")
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 2 * 2 * 4
    assert {record["mode"] for record in records} == {"plan"}
    assert all(record["provenance"]["torch"] for record in records)


MODULE = """
import torch
from torch import nn
def model():
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.Linear(256, 4)), torch.randn(8, 64)
"""


def test_plan_of_a_module_of_ones_own(capsys, tmp_path):
    file = tmp_path / "my_model.py"
    file.write_text(MODULE)
    assert main(["plan", f"{file}:model", "--workers", "2", "--links", "100mbit"]) == 0
    assert "0.1 M parameters" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["plan", "resnet50", "--", "words"])
    assert ended.value.code == 2


def test_python_m_terncomm():
    done = subprocess.run([sys.executable, "-m", "terncomm", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for command in ("simulate", "plan", "cluster", "doctor", "plot"):
        assert command in done.stdout


def test_free_costs_nothing():
    assert FREE.seconds(10**9) == (0.0, 0.0, 0.0)
