"""The warning about clipping: when it comes, and which layers it names."""

import torch

from terncomm.hooks.statistics import ClipWatch
from terncomm.segments import Segments


class Shares:
    """Stands for a codec: says that clipping takes these shares of its layers."""

    def __init__(self, *shares):
        self.shares = shares

    def norm_lost(self, flat, layers):
        return torch.tensor(self.shares)


def steps(watch, *shares):
    """What is complained of in a step with these shares for each of its buckets, at the next step's beginning."""
    told = []
    for step, buckets in enumerate(shares):
        for index, bucket in enumerate(buckets):
            told.append(watch.complaint(step))
            layers = Segments([1] * len(bucket), layers=range(10 * index, 10 * index + len(bucket)))
            watch.measure(torch.zeros(len(bucket)), [(Shares(*bucket), layers)], step)
    return told


def watch():
    return ClipWatch("layer{}".format, 0)


def test_the_worst_layer_of_all_buckets_comes_first():
    told = steps(watch(), [(0.35, 0.1), (0.57,)], [(0.1, 0.1), (0.1,)])
    assert told[:2] == [None, None]
    assert "some layers: 57% of layer10, 35% of layer0. Their" in told[2]
    assert told[3] is None


def test_it_comes_again_when_it_gets_worse():
    told = steps(watch(), [(0.31,)], [(0.40,)], [(0.42,)])
    assert "31% of layer0" in told[1]
    assert told[2] is None
    late = watch()
    told = steps(late, [(0.31,)], [(0.45,)], [(0.45,)])
    assert "45% of layer0" in told[2]


def test_many_layers_are_counted_and_a_nonfinite_one_is_not():
    (_, told) = steps(watch(), [(0.4, 0.5, 0.6, 0.7, 0.8, 0.9, float("nan"))], [(0.0,)])
    assert "90% of layer5, 80% of layer4, 70% of layer3, 60% of layer2, 50% of layer1 and over 30% of 1 more" in told


def test_nothing_is_said_of_small_shares():
    assert steps(watch(), [(0.29,)], [(0.299,)], [(0.2,)]) == [None] * 3


def test_steps_without_a_measurement_tell_of_earlier_ones():
    late = watch()
    steps(late, [(0.0,)], [(0.0,)], [(0.9,)])
    assert late.measures_at(3) is False
    assert "90% of layer0" in late.complaint(3)
