import math

import laws
import pytest
import torch
from laws import gaussian

from terncomm import Int8, Ternary
from terncomm.codecs import Half, codec_for
from terncomm.keys import Key
from terncomm.segments import Segments

CODECS = [
    Ternary(clip=2.5),
    Ternary(clip=None),
    Ternary(clip=1.0),
    Int8(block=2048),
    Int8(block=None),
    Int8(block=100, returned="exact"),
]
FLAT, LAYERS = gaussian(9000), Segments([4000, 3000, 2000])
every_codec = pytest.mark.parametrize("codec", CODECS, ids=repr)


@every_codec
def test_codes_lie_within_the_alphabet(codec):
    laws.codes_lie_within_the_alphabet(codec, FLAT, LAYERS)


@every_codec
def test_codes_are_a_function_of_input_and_key(codec):
    laws.codes_are_a_function_of_input_and_key(codec, FLAT, LAYERS)


@every_codec
@pytest.mark.parametrize("spread", ["gaussian", "laplace", "heavy tail", "shifted", "tiny"])
def test_unbiased_inside_the_clip(codec, spread):
    flat = {
        "gaussian": FLAT,
        "laplace": FLAT.sign() * FLAT.abs() * gaussian(9000, seed=1).abs(),
        "heavy tail": FLAT / gaussian(9000, seed=2).abs().clamp(min=0.05),
        "shifted": FLAT + 0.5,
        "tiny": FLAT * 1e-30,
    }[spread]
    laws.unbiased_inside_the_clip(codec, flat, LAYERS)


@every_codec
def test_error_is_at_most_one_step(codec):
    laws.error_is_at_most_one_step(codec, FLAT, LAYERS)


@every_codec
def test_decoding_is_linear(codec):
    laws.decoding_is_linear(codec, LAYERS)


@every_codec
def test_zero_layers_stay_zero(codec):
    laws.zero_layers_stay_zero(codec, 3)


@every_codec
def test_nonzero_layers_have_a_limit(codec):
    laws.nonzero_layers_have_a_limit(codec)


@every_codec
def test_nonfinite_poisons_its_layer_and_no_other(codec):
    laws.nonfinite_poisons_its_layer_and_no_other(codec, 3)


@pytest.mark.parametrize("codec", [Ternary(clip=2.5), Int8(block=2048, returned="exact")], ids=repr)
def test_variance_falls_as_one_over_world_size(codec):
    laws.variance_falls_as_one_over_world_size(codec)


@every_codec
def test_repr_evaluates_back(codec):
    assert eval(repr(codec)) == codec


def test_layers_have_scales_of_their_own():
    """One scale per layer, never per buffer: a layer 1000 times smaller keeps its own resolution."""
    flat = FLAT.clone()
    flat[:4000] *= 1e-3
    for codec in (Ternary(), Int8(block=None)):
        scales = codec.measure(flat, codec.scaled(LAYERS))
        assert scales.shape == (3,)
        assert scales[0] < scales[1] / 100
        error = (laws.decoded(codec, flat, LAYERS, Key(0)) - flat)[:4000]
        assert error.abs().max() < 0.01


def test_published_sparsity_and_clipping():
    """FACTS: zeros 68.2 % (Gauss) and 72.6 % (Laplace) at c = 2.5; clipping turns 2.76 degrees and shortens 1.14 %."""
    n = 1 << 20
    layers = Segments([n])
    normal = gaussian(n)
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
    laplace = (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()
    for flat, zeros in ((normal, 0.682), (laplace, 0.726)):
        codes, _, _ = laws.encoded(Ternary(clip=2.5), flat, layers, Key(0))
        assert (codes == 0).double().mean() == pytest.approx(zeros, abs=0.002)
    limit = Ternary(clip=2.5).measure(normal, layers)
    clipped = normal.clamp(-limit, limit)
    cosine = torch.nn.functional.cosine_similarity(clipped.double(), normal.double(), dim=0)
    assert math.degrees(math.acos(cosine)) == pytest.approx(2.76, abs=0.03)
    shortened = 1 - clipped.double().norm() / normal.double().norm()
    assert shortened == pytest.approx(0.0114, abs=0.0003)
    assert Ternary(clip=2.5).norm_lost(normal, layers).item() == pytest.approx(float(shortened), abs=1e-5)
    assert Ternary(clip=None).norm_lost(normal, layers) is None
    error = (laws.decoded(Ternary(clip=2.5), normal, layers, Key(0)) - normal).square().sum() / normal.square().sum()
    assert error == pytest.approx(1.01, abs=0.01), "vNMSE at c = 2.5"


def test_codecs_of_more_than_8_bits_are_refused():
    class Wide(Int8):
        levels = 1000

    with pytest.raises(ValueError, match=r"levels must be in 1\.\.127, got 1000"):
        laws.encoded(Wide(), FLAT, LAYERS, Key(0))


def test_norm_lost_names_the_layer():
    sparse = torch.zeros(10_000)
    sparse[:10] = 1.0
    lost = Ternary().norm_lost(torch.cat([gaussian(5000), sparse, torch.zeros(100)]), Segments([5000, 10_000, 100]))
    assert lost[0] < 0.02
    assert lost[1] > 0.9
    assert lost[2] == 0


def test_codec_names():
    assert codec_for("terngrad") == Ternary(clip=2.5)
    assert codec_for("int8") == Int8(block=2048)
    mine = Ternary(clip=1.5)
    assert codec_for(mine) is mine
    with pytest.raises(ValueError, match="unknown codec 'int4'; known: bf16, fp16, int8, terngrad"):
        codec_for("int4")
    with pytest.raises(ValueError, match=r"unknown codec 'TernGard' \(did you mean 'terngrad'\?\); known: bf16"):
        codec_for("TernGard")
    assert (codec_for("bf16"), codec_for("fp16")) == (Half("bf16"), Half("fp16"))
    with pytest.raises(ValueError, match=r"unknown codec 'none' \(for none, register no hook\)"):
        codec_for("none")
    with pytest.raises(TypeError, match=r"a class; write Ternary\(\)"):
        codec_for(Ternary)
    with pytest.raises(TypeError, match="a name or a terncomm codec, got 8"):
        codec_for(8)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Ternary(clip=0), ValueError, "clip must be positive"),
        (lambda: Ternary(clip=-1), ValueError, "clip must be positive"),
        (lambda: Ternary(clip=math.nan), ValueError, "clip must be positive"),
        (lambda: Ternary(clip=math.inf), ValueError, "clip must be positive"),
        (lambda: Ternary(clip="2.5"), TypeError, "clip must be a number"),
        (lambda: Ternary(clip=True), TypeError, "clip must be a number"),
        (lambda: Ternary(2.5), TypeError, "positional"),
        (lambda: Int8(block=0), ValueError, "block must be at least 1"),
        (lambda: Int8(block=2.0), TypeError, "block, if it is not None, must be an int, got 2.0"),
        (lambda: Int8(returned="fp16"), ValueError, "returned must be"),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
