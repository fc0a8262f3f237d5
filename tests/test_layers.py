"""Names of parameters: what wrappers add is left out, what is the user's stays."""

import pytest
import torch
from torch import nn

from terncomm.layers import Layers, clean


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
