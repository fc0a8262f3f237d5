"""Rules: which parameters go through which codec, and several codecs in one bucket. Functions run on ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm import Int8, Ternary
from terncomm.codecs import Half, Rules
from terncomm.codecs.rules import matches
from terncomm.layers import Layers


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(100, 48)
        self.body = nn.Sequential(nn.Linear(48, 64), nn.LayerNorm(64), nn.Linear(64, 48))
        self.lm_head = nn.Linear(48, 100)

    def forward(self, tokens):
        return self.lm_head(self.body(self.tokens(tokens))) * 1  # FSDP2 warns of views


def layers_of(rules, **options):
    model = Model()
    layers = Layers(model.named_parameters(), rules=Rules.of(rules), **options)
    layers.adopt(model)
    return {name: layers.codec_of(p) for name, p in model.named_parameters() if layers.codec_of(p) is not None}


def test_the_first_rule_that_matches_wins():
    found = layers_of({"body.0": "int8", "Linear": "terngrad", "embedding": "bf16", "default": None})
    assert found == {
        "tokens.weight": Half("bf16"),
        "body.0.weight": Int8(),
        "body.2.weight": Ternary(),
        "lm_head.weight": Ternary(),  # a rule that names its class, so it is not exempt
    }
    assert layers_of({"Linear": None, "*.weight": "int8", "default": "terngrad"}) == {"tokens.weight": Int8()}
    assert layers_of({"body.*": "terngrad", "default": None}).keys() == {"body.0.weight", "body.2.weight"}


def test_exemptions_hold_where_no_rule_names_the_layer():
    assert layers_of("terngrad").keys() == {"body.0.weight", "body.2.weight"}
    assert layers_of({"head": "int8", "default": "terngrad"})["lm_head.weight"] == Int8()
    assert "tokens.weight" not in layers_of({"head": "int8", "default": "terngrad"})


def test_halves_take_what_codecs_of_integers_leave():
    assert len(layers_of("bf16")) == len(list(Model().named_parameters()))
    assert "body.1.weight" in layers_of({"norm": "bf16", "default": "terngrad"})
    assert "lm_head.bias" not in layers_of("bf16", skip=["lm_head"])


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"embedding": "int8"}, "rules end with 'default'"),
        ({"default": "int8", "head": None}, "rules end with 'default'"),
        ({"nothing.*": None, "default": "int8"}, "rule='nothing.*' matches no parameter"),
        ({"default": "gzip"}, "unknown codec 'gzip'"),
    ],
)
def test_bad_rules_are_refused(rules, words):
    with pytest.raises(ValueError, match=words.replace("*", r"\*")):
        layers_of(rules)


def test_rules_need_names():
    with pytest.raises(ValueError, match="rules need names"):
        terncomm.CommState({"head": "int8", "default": "terngrad"})


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("*.lm_head", ["lm_head.weight", "decoder.lm_head.bias"]),
        ("lm_head", ["lm_head.weight"]),
        ("[!l]*", ["decoder.lm_head.bias", "user[0].weight", "user0.weight"]),
        ("?lm_head", []),
        ("user[0]", ["user[0].weight", "user0.weight"]),
    ],
)
def test_what_a_pattern_fits(pattern, fits):
    names = ["lm_head.weight", "decoder.lm_head.bias", "user[0].weight", "user0.weight"]
    assert [name for name in names if matches(pattern, name)] == fits


MIXED = {"embedding": "int8", "*.lm_head": "bf16", "default": "terngrad"}


def gradients(model):
    generator = torch.Generator().manual_seed(dist.get_rank())
    model(torch.randint(100, (8, 5), generator=generator)).square().mean().backward()
    found = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    model.zero_grad()
    return found


def mixed_beside_single():
    """One model under rules, and one for each codec alone: the gradient of each layer is that of its codec."""
    model = DistributedDataParallel(Model())
    state = terncomm.register(model, MIXED)
    mixed = gradients(model)
    stats = state.stats()
    alone = {}
    for codec in ("int8", "terngrad", "bf16"):
        single = DistributedDataParallel(Model())
        terncomm.register(single, codec, exempt=())
        alone[codec] = gradients(single)
    names = [name for name, _ in model.module.named_parameters()]
    for name, found, *each in zip(names, mixed, alone["int8"], alone["terngrad"], alone["bf16"], strict=True):
        codec = state.layers.codec_of(dict(model.module.named_parameters())[name])
        wanted = dict(zip(("int8", "terngrad", "bf16"), each, strict=True))
        if codec is not None:
            assert torch.equal(found, wanted[codec.name]), name
    return {name: value for name, value in stats.items() if name.startswith("wire_bytes")}, [g.sum() for g in mixed]


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_layer_has_the_bits_of_its_codec(on_ranks, world_size):
    told = on_ranks(world_size, mixed_beside_single)
    for stats, sums in told:
        assert sums == told[0][1], "the same bits on all ranks"
        parts = {name: n for name, n in stats.items() if "/" in name}
        assert parts.keys() == {"wire_bytes/int8", "wire_bytes/bf16", "wire_bytes/terngrad"}
        assert all(n > 0 for n in parts.values())
        assert sum(parts.values()) < stats["wire_bytes"]
        head = 2 * (48 * 100 + 100)
        assert stats["wire_bytes/bf16"] == pytest.approx(2 * (world_size - 1) / world_size * head, rel=0.01)


def sharded_like_ddp():
    model, sharded = DistributedDataParallel(Model()), Model()
    fully_shard(sharded)
    rules = {"embedding": Int8(returned="exact"), "*.lm_head": "bf16", "default": "terngrad"}
    terncomm.register(model, rules)
    terncomm.register(sharded, rules)
    for wanted, found in zip(gradients(model), gradients(sharded), strict=True):
        assert torch.equal(wanted, found)


def test_sharded_models_take_rules(on_ranks):
    on_ranks(3, sharded_like_ddp)


def overlapping():
    """A loop that overlaps with backward has the gradients of one that does not."""
    plain, model = Model(), Model()
    one = terncomm.GradientAverager(plain, "terngrad", bucket_cap_mb=0.02)
    two = terncomm.GradientAverager(model, "terngrad", bucket_cap_mb=0.02, overlap=True)
    for _ in range(3):
        for each, averager in ((plain, one), (model, two)):
            each.zero_grad()
            tokens = torch.randint(100, (8, 5), generator=torch.Generator().manual_seed(dist.get_rank()))
            each(tokens).square().mean().backward()
            averager.reduce()
        for wanted, found in zip(plain.parameters(), model.parameters(), strict=True):
            assert torch.equal(wanted.grad, found.grad)
    assert one.stats()["wire_bytes"] == two.stats()["wire_bytes"]
    return two.stats()["steps"]


def test_a_loop_overlaps_with_backward(on_ranks):
    assert on_ranks(2, overlapping) == [3, 3]


def overlapping_fails():
    model = Model()
    averager = terncomm.GradientAverager(model, "int8", overlap=True)
    if dist.get_rank() == 1:
        averager.clip_watch = None  # so that the path of the next bucket raises
    model(torch.randint(100, (8, 5))).square().mean().backward()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each rank has its own
        averager.reduce()
    return str(caught.value)


def test_a_rank_that_fails_while_it_overlaps_is_named(on_ranks):
    told = on_ranks(2, overlapping_fails)
    assert "rank 1 failed in bucket 0 of step 0, encode: AttributeError" in told[0]
