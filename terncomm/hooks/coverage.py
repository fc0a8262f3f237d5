"""How much of a model is compressed, in words for the log and for warnings."""

from collections.abc import Sequence

import torch

from terncomm.codecs import IntegerCodec
from terncomm.layers import Layers
from terncomm.structure import GROUPS

_NAMED = 5  # tensors that a line names at most
_WORDS = {"small": "small or a vector", "dtype": "not of floating point"}


def summary(layers: Layers) -> str:
    """How many tensors and elements are coded, and which of them `exempt` leaves out."""
    sizes = {parameter: parameter.numel() for parameter in layers.trainable}
    coded = [numel for parameter, numel in sizes.items() if layers.codes(parameter)]
    exempt = [parameter for parameter in sizes if layers.why_exact(parameter) in GROUPS]
    total = sum(sizes.values())
    text = f"{len(coded)} of {len(sizes)} parameter tensors coded, {sum(coded) / max(total, 1):.1%} of {total} elements"
    return f"{text}, exempt: {_largest(layers, exempt, total)}" if exempt else text


def too_little(layers: Layers) -> str | None:
    """A warning if less than half of the elements is compressed. What the user leaves out by name does not count."""
    asked = [parameter for parameter in layers.trainable if layers.why_exact(parameter) not in ("skip", "rule")]
    exact = [parameter for parameter in asked if layers.why_exact(parameter)]
    total, left = sum(each.numel() for each in asked), sum(each.numel() for each in exact)
    if 2 * left <= total:
        return None
    advice = f"Layers with fewer than min_numel={layers.min_numel} elements, and vectors, are sent as they are."
    if any(layers.why_exact(parameter) in GROUPS for parameter in exact):
        advice = "With exempt=() embeddings and the output head are compressed, too."
    return (
        f"only {1 - left / total:.1%} of {total} elements are compressed. Not compressed: "
        f"{_largest(layers, exact, total)}. {advice}"
    )


def without_structure(layers: Layers) -> str | None:
    """A warning if `exempt` can find no layers, because only parameters were given. With `skip` the user has chosen."""
    if layers.adopted or layers.skip or not layers.exempt or not isinstance(layers.rules.default, IntegerCodec):
        return None
    return (
        "parameters without their module do not tell which of them are embeddings or the output head, so these are "
        "compressed, too. Name them in skip=, or say that this is wanted by exempt=()."
    )


def _largest(layers: Layers, parameters: Sequence[torch.Tensor], total: int) -> str:
    by_size = sorted(parameters, key=torch.Tensor.numel, reverse=True)
    named = []
    for each in by_size[:_NAMED]:
        why = layers.why_exact(each)
        named.append(f"{layers.name_of(each)} ({_WORDS.get(why, why)}, {each.numel() / total:.1%})")
    return ", ".join(named) + (f" and {len(by_size) - _NAMED} more" if len(by_size) > _NAMED else "")
