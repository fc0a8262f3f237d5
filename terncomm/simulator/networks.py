"""Known networks as a planner sees them: which tensors in which order, and what a forward pass through them costs.

Operations are those of matrix products and convolutions, a multiplication and an addition counted as two; norms,
activations, pooling and softmax are left out, as `torch.utils.flop_counter` leaves them out. A layer's operations stand
on its weight, those of attention between the tokens on the projection that follows it.

The networks for images are torchvision's: single-tower AlexNet (Krizhevsky, "One weird trick for parallelizing
convolutional neural networks", 2014; the two towers of 2012 have 60,965,224 parameters, 0.2 % fewer), and GoogLeNet
with batch norm and with 3 x 3 convolutions where the paper has 5 x 5. Those for text are of Hugging Face transformers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Parameter:
    """One parameter tensor.

    Args:
        name: as the usual implementation names it.
        shape: of the tensor.
        flops: of the forward pass through its layer, per sample; a layer's weight carries all of it.
        kind: "embedding" or "head" for what terncomm sends exactly by default, else "".
        dtype: of the tensor, and so of its gradient.
    """

    name: str
    shape: tuple[int, ...]
    flops: float = 0.0
    kind: str = ""
    dtype: torch.dtype = torch.float32

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Network:
    """A network's parameter tensors in the order of their registration, and its usual batch.

    Args:
        name: short, as a command line has it.
        title: as a paper has it.
        source: where the layers come from.
        batch_size: usual samples per worker and step.
        parameters: every tensor once, tied ones too.
        sample: what one sample is.
    """

    name: str
    title: str
    source: str
    batch_size: int
    parameters: tuple[Parameter, ...]
    sample: str

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(p.numel for p in self.parameters)

    @property
    def flops(self) -> float:
        """Of the forward pass, per sample."""
        return math.fsum(p.flops for p in self.parameters)


def parse_count(text: str) -> int:
    """Return a number that may end with k, M or G (or B), as 25.6M.

    Raises:
        ValueError: it is none, or not positive.
    """
    units = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
    number, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1.0)
    try:
        count = round(float(number) * unit)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no number of parameters; wanted one such as 25.6M") from None
    if count < 1:
        raise ValueError(f"a number of parameters must be positive, got {text}")
    return count


def of_size(numel: int) -> Network:
    """A network of so many parameters, as square layers of at most 1024 x 1024 used once per sample."""
    width = min(1024, max(1, math.isqrt(numel)))
    whole, rest = divmod(numel, width * width)
    layers = [Parameter(f"{number}.weight", (width, width), 2.0 * width * width) for number in range(whole)]
    if rest:
        layers.append(Parameter(f"{whole}.weight", (1, rest), 2.0 * rest))
    title = f"{numel / 1e6:g} M parameters"
    return Network(title.replace(" ", "-"), title, "given by its size alone", 1, tuple(layers), "a sample")


def of_module(
    model: nn.Module,
    name: str,
    *,
    example: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    exempt: Mapping[torch.Tensor, str] | None = None,
    batch_size: int = 1,
) -> Network:
    """A module's parameters that require grad, in the order of registration.

    Operations are counted in one forward pass of `example` without data (on the meta device; `model` is not modified).
    Those that a module does outside its children stand on the first weight of its own; if it has none, on the last of
    its children's; if they have none, they count with the module around it, so that none is lost.

    Args:
        model: on any device.
        name: of the network in results.
        example: what `model` is called with, its first dimension the samples; only shapes and dtypes are used. Without
            it, every weight is taken to be used once per sample, 2 operations per element: true of a linear layer that
            sees one vector, far too little for convolutions and for layers that see many tokens, too much for
            embeddings that are not in `exempt`.
        exempt: parameters that travel exactly, each with its kind.
        batch_size: samples per worker and step.

    Raises:
        ValueError: no parameter requires grad.
    """
    kinds = exempt or {}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(f"{name}: no parameter requires grad; wanted at least one")
    if example is None:
        used = [p for _, p in named if p.dim() > 1 and kinds.get(p) != "embedding"]
        flops: dict[torch.Tensor, float] = {p: 2.0 * p.numel() for p in used}
        sample = "unknown"
    else:
        inputs = (example,) if isinstance(example, torch.Tensor) else example
        flops = {p: count / len(inputs[0]) for p, count in _count(model, inputs).items()}
        sample = " and ".join(" x ".join(map(str, x.shape[1:])) or "scalar" for x in inputs)
    parameters = tuple(Parameter(n, tuple(p.shape), flops.get(p, 0.0), kinds.get(p, ""), p.dtype) for n, p in named)
    return Network(name, name, f"{type(model).__name__}, given as a module", batch_size, parameters, sample)


def _count(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[torch.Tensor, float]:
    """Operations of one forward pass, by the parameter that carries them."""
    carriers: dict[nn.Module, torch.Tensor] = {}
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if inside := own or [p for p in module.parameters() if p.requires_grad][::-1]:
            carriers[module] = next((p for p in inside if p.dim() > 1), inside[0])
    found: dict[torch.Tensor, float] = {}
    children = [0]  # of each module under way: operations that its children have accounted for
    counter = FlopCounterMode(display=False)
    starts: list[int] = []

    def enter(module: nn.Module, args: object) -> None:
        starts.append(counter.get_total_flops())
        children.append(0)

    def leave(module: nn.Module, args: object, output: object) -> None:
        total, inner = counter.get_total_flops() - starts.pop(), children.pop()
        if module in carriers:
            found[carriers[module]] = found.get(carriers[module], 0.0) + total - inner
            inner = total
        children[-1] += inner

    modules = list(model.modules())
    hooks = [m.register_forward_pre_hook(enter, prepend=True) for m in modules]
    hooks += [m.register_forward_hook(leave) for m in modules]
    tensors = {n: torch.empty_like(b, device="meta") for n, b in model.named_buffers()}
    for name, p in model.named_parameters():  # requiring grad: without it, attention may run as one uncounted kernel
        tensors[name] = torch.empty_like(p, device="meta").requires_grad_(p.is_floating_point())
    try:
        with counter:
            torch.func.functional_call(model, tensors, tuple(x.to("meta") for x in inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _conv(name: str, i: int, o: int, kernel: int, out: int, *, bias: bool = False) -> list[Parameter]:
    """A convolution of `i` to `o` channels whose output has out x out places."""
    shape = (o, i, kernel, kernel)
    weight = Parameter(f"{name}.weight", shape, 2.0 * math.prod(shape) * out * out)
    return [weight, Parameter(f"{name}.bias", (o,))] if bias else [weight]


def _linear(name: str, i: int, o: int, tokens: int = 1, *, more: float = 0.0, kind: str = "") -> list[Parameter]:
    """A linear layer with a bias, applied to each of `tokens`; `more` operations are counted with it."""
    flops = 2.0 * i * o * tokens + more
    return [Parameter(f"{name}.weight", (o, i), flops, kind), Parameter(f"{name}.bias", (o,), kind=kind)]


def _norm(name: str, width: int) -> list[Parameter]:
    return [Parameter(f"{name}.weight", (width,)), Parameter(f"{name}.bias", (width,))]


def _embedding(name: str, rows: int, width: int, flops: float = 0.0) -> list[Parameter]:
    return [Parameter(f"{name}.weight", (rows, width), flops, "embedding")]


def _attention(tokens: int, width: int) -> float:
    """Operations of queries times keys, and of the weights times values, over all heads."""
    return 2 * 2.0 * tokens * tokens * width


def _alexnet() -> Network:
    parameters = [
        *_conv("features.0", 3, 64, 11, 55, bias=True),
        *_conv("features.3", 64, 192, 5, 27, bias=True),
        *_conv("features.6", 192, 384, 3, 13, bias=True),
        *_conv("features.8", 384, 256, 3, 13, bias=True),
        *_conv("features.10", 256, 256, 3, 13, bias=True),
        *_linear("classifier.1", 256 * 6 * 6, 4096),
        *_linear("classifier.4", 4096, 4096),
        *_linear("classifier.6", 4096, 1000, kind="head"),
    ]
    source = "Krizhevsky, One weird trick for parallelizing convolutional neural networks, 2014, as torchvision has it"
    return Network("alexnet", "AlexNet", source, 128, tuple(parameters), "image 3 x 224 x 224")


def _vgg(name: str, title: str, stages: tuple[int, ...]) -> Network:
    """`stages`: convolutions before each of the five poolings."""
    parameters: list[Parameter] = []
    index, channels, size = 0, 3, 224
    for convolutions, width in zip(stages, (64, 128, 256, 512, 512), strict=True):
        for _ in range(convolutions):
            parameters += _conv(f"features.{index}", channels, width, 3, size, bias=True)
            index, channels = index + 2, width  # a ReLU follows
        index, size = index + 1, size // 2
    parameters += _linear("classifier.0", 512 * 7 * 7, 4096)
    parameters += _linear("classifier.3", 4096, 4096)
    parameters += _linear("classifier.6", 4096, 1000, kind="head")
    source = "Simonyan and Zisserman, Very deep convolutional networks, ICLR 2015, table 1, as torchvision has it"
    return Network(name, title, source, 32, tuple(parameters), "image 3 x 224 x 224")


def _conv_norm(name: str, i: int, o: int, kernel: int, out: int) -> list[Parameter]:
    return _conv(f"{name}.conv", i, o, kernel, out) + _norm(f"{name}.bn", o)


def _googlenet() -> Network:
    parameters = [
        *_conv_norm("conv1", 3, 64, 7, 112),
        *_conv_norm("conv2", 64, 64, 1, 56),
        *_conv_norm("conv3", 64, 192, 3, 56),
    ]
    # Output size; channels of 1 x 1, before and of the first and the second 3 x 3, and after pooling.
    table = {
        "3a": (28, 64, 96, 128, 16, 32, 32),
        "3b": (28, 128, 128, 192, 32, 96, 64),
        "4a": (14, 192, 96, 208, 16, 48, 64),
        "4b": (14, 160, 112, 224, 24, 64, 64),
        "4c": (14, 128, 128, 256, 24, 64, 64),
        "4d": (14, 112, 144, 288, 32, 64, 64),
        "4e": (14, 256, 160, 320, 32, 128, 128),
        "5a": (7, 256, 160, 320, 32, 128, 128),
        "5b": (7, 384, 192, 384, 48, 128, 128),
    }
    channels = 192
    for block, (out, one, before3, three, before5, five, pooled) in table.items():
        parameters += _conv_norm(f"inception{block}.branch1", channels, one, 1, out)
        parameters += _conv_norm(f"inception{block}.branch2.0", channels, before3, 1, out)
        parameters += _conv_norm(f"inception{block}.branch2.1", before3, three, 3, out)
        parameters += _conv_norm(f"inception{block}.branch3.0", channels, before5, 1, out)
        parameters += _conv_norm(f"inception{block}.branch3.1", before5, five, 3, out)
        parameters += _conv_norm(f"inception{block}.branch4.1", channels, pooled, 1, out)
        channels = one + three + five + pooled
    parameters += _linear("fc", channels, 1000, kind="head")
    source = (
        "Szegedy and others, Going deeper with convolutions, CVPR 2015, table 1, without the auxiliary heads, "
        "as torchvision has it: batch norm, and 3 x 3 for 5 x 5"
    )
    return Network("googlenet", "GoogLeNet", source, 64, tuple(parameters), "image 3 x 224 x 224")


def _resnet50() -> Network:
    parameters = [*_conv("conv1", 3, 64, 7, 112), *_norm("bn1", 64)]
    channels, before = 64, 56
    for stage, (blocks, width, size) in enumerate(((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7)), 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            parameters += _conv(f"{name}.conv1", channels, width, 1, before) + _norm(f"{name}.bn1", width)
            parameters += _conv(f"{name}.conv2", width, width, 3, size) + _norm(f"{name}.bn2", width)
            parameters += _conv(f"{name}.conv3", width, 4 * width, 1, size) + _norm(f"{name}.bn3", 4 * width)
            if block == 0:
                parameters += _conv(f"{name}.downsample.0", channels, 4 * width, 1, size)
                parameters += _norm(f"{name}.downsample.1", 4 * width)
            channels, before = 4 * width, size
    parameters += _linear("fc", channels, 1000, kind="head")
    source = (
        "He and others, Deep residual learning for image recognition, CVPR 2016, table 1, "
        "as torchvision has it: the stride in the 3 x 3 convolution"
    )
    return Network("resnet50", "ResNet-50", source, 32, tuple(parameters), "image 3 x 224 x 224")


def _bert(name: str, title: str, layers: int, width: int, tokens: int = 512) -> Network:
    parameters = [
        *_embedding("embeddings.word_embeddings", 30522, width),
        *_embedding("embeddings.position_embeddings", 512, width),
        *_embedding("embeddings.token_type_embeddings", 2, width),
        *_norm("embeddings.LayerNorm", width),
    ]
    for layer in (f"encoder.layer.{k}" for k in range(layers)):
        for part in ("query", "key", "value"):
            parameters += _linear(f"{layer}.attention.self.{part}", width, width, tokens)
        between = _attention(tokens, width)
        parameters += _linear(f"{layer}.attention.output.dense", width, width, tokens, more=between)
        parameters += _norm(f"{layer}.attention.output.LayerNorm", width)
        parameters += _linear(f"{layer}.intermediate.dense", width, 4 * width, tokens)
        parameters += _linear(f"{layer}.output.dense", 4 * width, width, tokens)
        parameters += _norm(f"{layer}.output.LayerNorm", width)
    parameters += _linear("pooler.dense", width, width, kind="head")  # the last linear layer
    source = (
        "Devlin and others, BERT, NAACL 2019, section 3, uncased, as BertModel of Hugging Face transformers: "
        "with the pooler, without the head that predicts words"
    )
    return Network(name, title, source, 8, tuple(parameters), f"sequence of {tokens} tokens")


def _gpt2(tokens: int = 1024) -> Network:
    width, vocabulary = 768, 50257
    parameters = [
        # Also the output layer: its operations stand here, and its gradient is complete only when backward ends.
        *_embedding("transformer.wte", vocabulary, width, 2.0 * width * vocabulary * tokens),
        *_embedding("transformer.wpe", 1024, width),
    ]
    for layer in (f"transformer.h.{k}" for k in range(12)):
        parameters += _norm(f"{layer}.ln_1", width)
        parameters += _linear(f"{layer}.attn.c_attn", width, 3 * width, tokens)
        parameters += _linear(f"{layer}.attn.c_proj", width, width, tokens, more=_attention(tokens, width))
        parameters += _norm(f"{layer}.ln_2", width)
        parameters += _linear(f"{layer}.mlp.c_fc", width, 4 * width, tokens)
        parameters += _linear(f"{layer}.mlp.c_proj", 4 * width, width, tokens)
    parameters += _norm("transformer.ln_f", width)
    source = (
        "Radford and others, Language models are unsupervised multitask learners, 2019, table 2, the smallest, as "
        "GPT2LMHeadModel of Hugging Face transformers (its weights transposed); batch: Karpathy, nanoGPT, train.py"
    )
    return Network("gpt2", "GPT-2", source, 12, tuple(parameters), f"sequence of {tokens} tokens")


def _vit() -> Network:
    width, patches = 768, 14 * 14
    tokens = patches + 1
    parameters = [
        Parameter("class_token", (1, 1, width)),
        *_conv("conv_proj", 3, width, 16, 14, bias=True),
        Parameter("encoder.pos_embedding", (1, tokens, width)),
    ]
    for layer in (f"encoder.layers.encoder_layer_{k}" for k in range(12)):
        attention = f"{layer}.self_attention"
        parameters += _norm(f"{layer}.ln_1", width)
        parameters += [
            Parameter(f"{attention}.in_proj_weight", (3 * width, width), 2.0 * 3 * width * width * tokens),
            Parameter(f"{attention}.in_proj_bias", (3 * width,)),
        ]
        parameters += _linear(f"{attention}.out_proj", width, width, tokens, more=_attention(tokens, width))
        parameters += _norm(f"{layer}.ln_2", width)
        parameters += _linear(f"{layer}.mlp.0", width, 4 * width, tokens)
        parameters += _linear(f"{layer}.mlp.3", 4 * width, width, tokens)
    parameters += _norm("encoder.ln", width)
    parameters += _linear("heads.head", width, 1000, kind="head")
    source = "Dosovitskiy and others, An image is worth 16 x 16 words, ICLR 2021, table 1, as torchvision has it"
    return Network("vit-b16", "ViT-B/16", source, 64, tuple(parameters), "image 3 x 224 x 224")


NETWORKS = {
    network.name: network
    for network in (
        _alexnet(),
        _vgg("vgg-a", "VGG-A", (1, 1, 2, 2, 2)),
        _vgg("vgg16", "VGG-16", (2, 2, 3, 3, 3)),
        _googlenet(),
        _resnet50(),
        _bert("bert-base", "BERT-base", 12, 768),
        _bert("bert-large", "BERT-large", 24, 1024),
        _gpt2(),
        _vit(),
    )
}
