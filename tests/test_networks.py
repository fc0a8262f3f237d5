"""Known networks against published totals; a user's module against hand-computed ones."""

import pytest
import torch
from torch import nn

from terncomm.simulator import networks
from terncomm.simulator.networks import NETWORKS, Network, Parameter, of_module
from terncomm.structure import GROUPS, structural

# Parameters and operations of the forward pass per sample. Images: torchvision's documentation of its weights
# (num_params; GFLOPS, which count a multiplication and an addition as one). GPT-2: 124M, and nanoGPT's
# transformer_sizing.ipynb, forward_total at 1024 tokens. BERT: 110M and 340M in the paper; the exact counts are those
# of Hugging Face's BertModel.
PUBLISHED = {
    "alexnet": (61_100_840, 2 * 0.714e9),
    "vgg-a": (132_863_336, 2 * 7.609e9),
    "vgg16": (138_357_544, 2 * 15.470e9),
    "googlenet": (6_624_904, 2 * 1.498e9),
    "resnet50": (25_557_032, 2 * 4.089e9),
    "vit-b16": (86_567_656, 2 * 17.564e9),
    "gpt2": (124_439_808, 291_648_307_200),
    "bert-base": (109_482_240, None),
    "bert-large": (335_141_888, None),
}


def find(network: Network, name: str) -> Parameter:
    (parameter,) = [p for p in network.parameters if p.name == name]
    return parameter


def test_every_network_has_a_published_total():
    assert NETWORKS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name):
    numel, flops = PUBLISHED[name]
    assert NETWORKS[name].numel == numel
    if flops:
        assert NETWORKS[name].flops == pytest.approx(flops, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("alexnet", 0.72e9 * 2),  # Sze and others, Efficient processing of deep neural networks, 2017, table II
        ("vgg16", 15.5e9 * 2),  # the same
        ("resnet50", 4.1e9 * 2),  # Xie and others, Aggregated residual transformations, 2017, table 1
        ("googlenet", 1.5e9 * 2),  # Szegedy and others, Going deeper with convolutions, 2015, section 1
    ],
)
def test_operations_within_three_percent_of_papers(name, published):
    assert NETWORKS[name].flops == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(("name", "layers", "width"), [("bert-base", 12, 768), ("bert-large", 24, 1024)])
def test_operations_of_bert(name, layers, width):
    """Narayanan and others, Efficient large-scale language model training, SC 2021, appendix: 24 s h^2 + 4 s^2 h."""
    layer = 24 * 512 * width**2 + 4 * 512**2 * width
    assert NETWORKS[name].flops == layers * layer + 2 * width**2  # and the pooler, on one token


def test_operations_of_bert_at_128_tokens():
    """Sun and others, MobileBERT, ACL 2020, table 4: BERT-base has 22.5 G operations at 128 tokens."""
    assert networks._bert("short", "", 12, 768, tokens=128).flops == pytest.approx(22.5e9, rel=0.03)


@pytest.mark.parametrize(
    ("network", "name", "shape", "flops"),
    [
        ("alexnet", "features.3.weight", (192, 64, 5, 5), 2 * 192 * 64 * 25 * 27 * 27),
        ("vgg-a", "classifier.0.weight", (4096, 25088), 2 * 4096 * 25088),
        ("vgg-a", "features.8.weight", (256, 256, 3, 3), 2 * 256 * 256 * 9 * 56 * 56),
        ("vgg16", "features.28.weight", (512, 512, 3, 3), 2 * 512 * 512 * 9 * 14 * 14),
        ("googlenet", "inception4e.branch2.1.conv.weight", (320, 160, 3, 3), 2 * 320 * 160 * 9 * 14 * 14),
        ("resnet50", "layer2.0.conv1.weight", (128, 256, 1, 1), 2 * 128 * 256 * 56 * 56),  # before the stride
        ("resnet50", "layer4.2.bn3.bias", (2048,), 0),
        ("bert-base", "encoder.layer.11.intermediate.dense.weight", (3072, 768), 2 * 512 * 768 * 3072),
        ("gpt2", "transformer.wte.weight", (50257, 768), 2 * 1024 * 50257 * 768),
        ("gpt2", "transformer.h.0.attn.c_proj.weight", (768, 768), 2 * 1024 * 768**2 + 4 * 1024**2 * 768),
        ("vit-b16", "conv_proj.weight", (768, 3, 16, 16), 2 * 768 * 768 * 196),
    ],
)
def test_single_layers(network, name, shape, flops):
    parameter = find(NETWORKS[network], name)
    assert (parameter.shape, parameter.flops) == (shape, flops)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_kinds_and_names(network):
    names = [p.name for p in network.parameters]
    assert len(set(names)) == len(names)
    kinds = {p.name: p.kind for p in network.parameters if p.kind}
    if network.name == "gpt2":  # its head is its embedding
        assert kinds == {"transformer.wte.weight": "embedding", "transformer.wpe.weight": "embedding"}
        return
    assert [p.kind for p in network.parameters[-2:]] == ["head", "head"]
    assert list(kinds.values()).count("head") == 2
    assert list(kinds.values()).count("embedding") == (3 if network.name.startswith("bert") else 0)


def test_share_of_the_output_layer():
    """AlexNet's last layer holds 6.7 % of its parameters: Wen and others, TernGrad, NIPS 2017."""
    head = sum(p.numel for p in NETWORKS["alexnet"].parameters if p.kind == "head")
    assert head / NETWORKS["alexnet"].numel == pytest.approx(0.067, abs=0.0005)


def alexnet() -> nn.Module:
    def conv(*numbers: int, **more: int) -> list[nn.Module]:
        return [nn.Conv2d(*numbers, **more), nn.ReLU()]

    features = [*conv(3, 64, 11, 4, 2), nn.MaxPool2d(3, 2), *conv(64, 192, 5, padding=2), nn.MaxPool2d(3, 2)]
    features += [*conv(192, 384, 3, padding=1), *conv(384, 256, 3, padding=1), *conv(256, 256, 3, padding=1)]
    classifier = [nn.Dropout(), nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU()]
    classifier += [nn.Linear(4096, 1000)]
    model = nn.Sequential()
    model.features = nn.Sequential(*features, nn.MaxPool2d(3, 2))
    model.flatten = nn.Flatten()
    model.classifier = nn.Sequential(*classifier)
    return model


def test_a_module_and_a_builder_agree():
    with torch.device("meta"):
        model = alexnet()
    made = of_module(model, "alexnet", example=torch.empty(3, 3, 224, 224), exempt=structural(model, GROUPS))
    assert made.parameters == NETWORKS["alexnet"].parameters
    assert made.sample == "3 x 224 x 224"


def test_of_module_without_an_example():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2, bias=False))
    model[1].bias.requires_grad_(False)
    network = of_module(model, "small", exempt=structural(model, GROUPS), batch_size=16)
    assert network.parameters == (
        Parameter("0.weight", (10, 4), 0, "embedding"),
        Parameter("1.weight", (8, 4), 64),
        Parameter("2.weight", (8,)),
        Parameter("2.bias", (8,)),
        Parameter("3.weight", (2, 8), 32, "head"),
    )
    assert (network.batch_size, network.numel, network.flops) == (16, 104, 96)


def test_of_module_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    network = of_module(model, "small", example=torch.ones(2, 3, 8, 8))
    assert network.flops == find(network, "0.weight").flops == 2 * 4 * 27 * 36
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


class Attention(nn.Module):
    """Queries, keys and values in layers of their own; the products between them in a module without parameters."""

    class Products(nn.Module):
        def forward(self, q, k, v):
            return (q @ k.transpose(1, 2)).softmax(-1) @ v

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out, self.products = nn.Linear(width, 3 * width), nn.Linear(width, width), self.Products()

    def forward(self, x):
        return self.out(self.products(*self.qkv(x).chunk(3, -1)))


def test_of_module_counts_a_transformer():
    """Attention on its projection, and a tied head on the embedding: as the builders count."""
    words, width, tokens = 50, 8, 6

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(words, width)
            self.norm = nn.LayerNorm(width)
            self.attention = Attention(width)
            self.head = nn.Linear(width, words, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.attention(self.norm(self.embedding(x))))

    model = Model()
    network = of_module(
        model, "small", example=torch.zeros(3, tokens, dtype=torch.long), exempt=structural(model, GROUPS)
    )
    assert {p.name: p.flops for p in network.parameters if p.flops} == {
        "embedding.weight": 2 * tokens * width * words,
        "attention.qkv.weight": 2 * tokens * width * 3 * width,
        "attention.out.weight": 2 * tokens * width * width + 4 * tokens**2 * width,
    }
    assert [p.kind for p in network.parameters[:2]] == ["embedding", ""]


@pytest.mark.parametrize("training", [True, False])
def test_of_module_loses_no_operation_of_torch_s_own_layer(training):
    """A fused kernel would not be counted; what F.multi_head_attention_forward does stands on in_proj_weight."""
    width, tokens = 16, 10
    model = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True).train(training)
    network = of_module(model, "layer", example=torch.ones(2, tokens, width))
    assert network.flops == 24 * tokens * width**2 + 4 * tokens**2 * width
    assert find(network, "linear1.weight").flops == 8 * tokens * width**2


def test_of_module_needs_a_parameter_that_requires_grad():
    with pytest.raises(ValueError, match="frozen: no parameter requires grad"):
        of_module(nn.Linear(2, 2).requires_grad_(False), "frozen")
