"""Names of parameters, the groups that are found by structure, and what the log says of them."""

import pytest
import torch
from torch import nn

from terncomm.codecs.rules import Rules
from terncomm.hooks import coverage
from terncomm.layers import Layers, clean
from terncomm.structure import structural


def layers_of(*names, **options):
    return Layers([(name, nn.Parameter(torch.zeros(40, 40))) for name in names], **options)


@pytest.mark.parametrize(
    ("given", "known"),
    [
        (["module.a.weight", "module.b"], ["a.weight", "b"]),  # of a DDP model
        (["_orig_mod.module.a", "_orig_mod.module.b"], ["a", "b"]),  # of a compiled one
        (["module._orig_mod.a"], ["a"]),
        (["_fsdp_wrapped_module.a._fsdp_wrapped_module._checkpoint_wrapped_module.weight"], ["a.weight"]),
        (["0._fsdp_wrapped_module.fc._fsdp_wrapped_module.weight"], ["0.fc.weight"]),
        (["module.a.weight", "a.weight"], ["module.a.weight", "a.weight"]),  # the user's own attribute
        (["my_orig_mod.a"], ["my_orig_mod.a"]),
    ],
)
def test_names(given, known):
    assert layers_of(*given).names == known


def test_a_module_of_the_users_can_be_skipped():
    layers = layers_of("module.a", "other.b", skip=["module"])
    assert list(layers.coded_names) == ["other.b"]
    assert layers_of("module.a", "module.b", skip=["module.a"]).coded_names.keys() == {"b"}
    assert layers_of("module.a", "module.b", skip=["a"]).coded_names.keys() == {"b"}


@pytest.mark.parametrize("name", ["_fsdp_wrapped_module", "2._fsdp_wrapped_module", "_orig_mod.2"])
def test_names_of_modules(name):
    assert clean(name) == name.replace("_fsdp_wrapped_module", "").replace("_orig_mod.", "").strip(".")


class Position(nn.Module):
    """A context as long as the model is wide: the projections of its blocks are no heads."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(100, 32)
        self.places = nn.Embedding(32, 32)
        self.lm = nn.Linear(32, 100)
        self.body = nn.Sequential(nn.Linear(32, 128), nn.Linear(128, 32), nn.Linear(32, 32))
        self.last = nn.Linear(32, 8)


class Tied(nn.Module):
    """A head that is the embedding, and a projection registered after it."""

    def __init__(self):
        super().__init__()
        self.words = nn.EmbeddingBag(100, 16)
        self.head = nn.Linear(16, 100)
        self.head.weight = self.words.weight
        self.last = nn.Linear(16, 8)


@pytest.mark.parametrize(
    ("shape", "coded"),
    [((1, 2000), False), ((1, 2000, 1, 1), False), ((1, 1, 2000), False), ((2000, 1), True), ((2, 1000), True)],
)
def test_vectors_of_more_dimensions_are_vectors(shape, coded):
    weight = nn.Parameter(torch.zeros(shape))
    assert Layers([("weight", weight)]).codes(weight) == coded


def frozen():
    return nn.Linear(4, 4).requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "groups", "found"),
    [
        (Tied(), ("embedding", "head"), {"words.weight": "embedding", "head.bias": "head", "last": "head"}),
        (Position(), ("head",), {"lm": "head", "last": "head"}),
        (Tied(), ("head",), {"words.weight": "head", "head.bias": "head", "last": "head"}),
        (Tied(), ("embedding",), {"words.weight": "embedding"}),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 3), nn.ReLU()), ("head",), {"1": "head"}),
        (nn.Sequential(nn.Linear(4, 2), nn.Conv2d(1, 4, 3)), ("head",), {"0": "head"}),
        (nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), ("head",), {}),
        (nn.Sequential(frozen(), nn.Linear(4, 3)), ("head",), {}),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 2).requires_grad_(False)),
            ("head",),
            {"2": "head"},
        ),
        (nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16), nn.Linear(16, 64)), ("head",), {}),  # an autoencoder
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False), ("head",), {}),
        (nn.Sequential(nn.Linear(13, 8), nn.Linear(8, 512)), ("head",), {}),  # a tower, mostly its last layer
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(4, 8), nn.Conv2d(8, 8, 3)), ("head",), {}),  # a U-Net's time
        (nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)), ("head", "embedding"), {}),
    ],
    ids=lambda value: value._get_name() if isinstance(value, nn.Module) else str(value),
)
def test_embeddings_and_heads_are_found_by_structure(model, groups, found):
    names = {p: name for name, p in model.named_parameters()}
    wanted = {}
    for name, group in found.items():
        wanted.update({n: group for n in names.values() if n == name or n.startswith(name + ".")})
    assert {names[p]: group for p, group in structural(model, groups).items()} == wanted


class Patches(nn.Module):
    """Positions as a bare parameter, adapters of an embedding, and a module whose name alone says "embed"."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 49, 16))
        self.lora_embedding_a = nn.ParameterDict({"default": nn.Parameter(torch.zeros(4, 16))})
        self.scale = nn.Parameter(torch.zeros(16, 16))
        self.head = nn.Linear(16, 10)


def test_an_embedding_is_found_by_its_own_name():
    model = Patches()
    found = structural(model, ("embedding", "head"))
    assert {name: found.get(p) for name, p in model.named_parameters()} == {
        "pos_embed": "embedding",
        "scale": None,
        "patch_embed.weight": None,
        "patch_embed.bias": None,
        "lora_embedding_a.default": "embedding",
        "head.weight": "head",
        "head.bias": "head",
    }


def test_reparametrized_layers_are_what_they_were():
    model = Tagger()
    nn.utils.parametrizations.weight_norm(model.tags)
    nn.utils.parametrizations.spectral_norm(model.words)
    found = structural(model, ("embedding", "head"))
    assert {found.get(p) for p in model.tags.parameters()} == {"head"}
    assert {found.get(p) for p in model.words.parameters()} == {"embedding"}
    assert not {p for p in found if p in set(model.rnn.parameters())}
    layers = adopted(model, rules=Rules.of({"Embedding": "int8", "default": "terngrad"}))
    assert repr(layers.codec_of(model.words.parametrizations.weight.original)).startswith("Int8")


def adopted(model, **options):
    layers = Layers(model.named_parameters(), **options)
    layers.adopt(model)
    return layers


class Tagger(nn.Module):
    """A real vocabulary, and a small network."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(3000, 32)
        self.rnn = nn.LSTM(32, 32)
        self.tags = nn.Linear(32, 40)


def test_the_log_names_what_is_exempt_and_its_share():
    text = coverage.summary(adopted(Tagger()))
    assert text == (
        "2 of 7 parameter tensors coded, 7.7% of 105768 elements, exempt: words.weight (embedding, 90.8%), "
        "tags.weight (head, 1.2%)"
    )


def test_little_compression_is_warned_of():
    assert coverage.too_little(adopted(Tagger())) == (
        "only 7.7% of 105768 elements are compressed. Not compressed: words.weight (embedding, 90.8%), tags.weight "
        "(head, 1.2%), rnn.bias_ih_l0 (small or a vector, 0.1%), rnn.bias_hh_l0 (small or a vector, "
        "0.1%), tags.bias (small or a vector, 0.0%). With exempt=() embeddings and the output head are compressed, too."
    )
    small = coverage.too_little(adopted(nn.Linear(10, 2)))
    assert "only 0.0% of 22 elements" in small
    assert "min_numel=1024" in small


@pytest.mark.parametrize("options", [{"exempt": ()}, {"skip": ["words"]}, {"rules": Rules.of("bf16")}])
def test_enough_compression_is_not_warned_of(options):
    assert coverage.too_little(adopted(Tagger(), **options)) is None


def test_what_a_rule_leaves_out_is_not_warned_of():
    rules = Rules.of({"embedding": None, "default": "int8"})
    assert coverage.too_little(adopted(Tagger(), rules=rules)) is None


def test_parameters_without_a_module_are_warned_of():
    named = list(Tagger().named_parameters())
    assert "Name them in skip=" in coverage.without_structure(Layers(named))
    for quiet in (Layers(named, exempt=()), Layers(named, skip=["words"]), Layers(named, rules=Rules.of("fp16"))):
        assert coverage.without_structure(quiet) is None
    assert coverage.without_structure(adopted(Tagger())) is None
