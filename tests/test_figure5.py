"""The model behind benchmarks/figure5.py, against hand-computed steps and the published figure."""

import figure5
import pytest
from figure5 import Assumptions, Cluster, passes, step_s

from terncomm.simulator.links import Link
from terncomm.simulator.networks import Network, Parameter

TENSORS = (Parameter("first", (100, 10), 300.0), Parameter("head", (10, 10), 100.0, "head"))
NETWORK = Network("small", "small", "", 1, TENSORS, "")
# 1 s of computing; 1000 bytes a second inside the node and to the host, 100 between nodes.
CLUSTER = Cluster({"small": 1.0}, 2200.0, 1000.0, 1000.0, Link("slow", 800, delay_s=0.5, efficiency=1))


@pytest.mark.parametrize(
    ("gpus", "codec", "seconds"),
    [
        (1, "fp32", 1),
        (1, "terngrad", 1 + 0.5),  # 1100 elements are encoded
        (2, "fp32", 1 + 4.4),  # a ring of two sends 4400 bytes
        (4, "fp32", 1 + 1.5 * 4.4),
        (4, "terngrad", 1.5 + 1.5 * 0.65),  # 250 bytes of codes, 400 of the last layer
        (8, "fp32", 1 + 1.5 * 4.4 + 8.8 + 44 + 2 * 2 * 0.5),  # ring, host, link once, two tensors wait 2 x 0.5 s
        (16, "fp32", 1 + 1.5 * 4.4 + 8.8 + 88 + 2 * 4 * 0.5),
        (64, "fp32", 1 + 1.5 * 4.4 + 8.8 + 88 + 2 * 8 * 0.5),
    ],
)
def test_a_step_by_hand(gpus, codec, seconds):
    assert step_s(CLUSTER, NETWORK, gpus, codec, Assumptions()) == pytest.approx(seconds)


def test_overlap_by_hand():
    """Backward takes 2/3 s, the head a quarter of it: its 400 bytes go at 1/2 s, the first layer's at 1 s or after."""
    assert step_s(CLUSTER, NETWORK, 2, "fp32", Assumptions(overlap=True)) == pytest.approx(1 + 4.0)
    fast = Cluster({"small": 1.0}, 2200.0, 1e12, 1e12, Link("fast", 1e15))
    assert step_s(fast, NETWORK, 64, "fp32", Assumptions(overlap=True)) == pytest.approx(1)


def test_exact_sums_of_16_workers_need_6_bits():
    bytes_ = figure5.tensor_bytes(TENSORS[0], "terngrad", 16, Assumptions(exact_sum=True))
    assert bytes_ == 1000 * (2 + 6) / 2 / 8


def test_passes_over_a_link():
    assert [passes(n, True) for n in (2, 3, 4, 128)] == [1, 2, 2, 2]
    assert [passes(n, False) for n in (2, 4, 8)] == [1, 1.5, 1.75]


def test_published_bars():
    bars = figure5.published()
    assert len(bars) == 120
    ratio = bars["ethernet", "alexnet", 8, "terngrad"] / bars["ethernet", "alexnet", 8, "fp32"]
    assert round(ratio, 2) == 3.04  # as the paper says in words
    assert bars.keys() > figure5.CALIBRATION


def test_bars_that_are_calibrated_on_come_out_exact():
    predicted, bars = figure5.predict(Assumptions()), figure5.published()
    for bar in figure5.CALIBRATION:
        assert predicted[bar] == pytest.approx(bars[bar]), bar


@pytest.mark.parametrize("cluster", figure5.CLUSTERS)
def test_the_other_bars_come_out_near(cluster):
    told = figure5.summary(figure5.errors(figure5.predict(Assumptions()), cluster))
    assert told["median_error_percent"] < 5
    assert told["max_error_percent"] < 15
