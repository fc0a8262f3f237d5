"""What the structure of a model tells of its parameters: embeddings, the output head, norms, and classes of modules."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

GROUPS = ("embedding", "head")
Own = Callable[[nn.Module], Mapping[str, torch.Tensor]]  # module -> its own parameters, by name


def own_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters of a module by name, without those of its submodules."""
    return dict(module.named_parameters(recurse=False))


class Holder(NamedTuple):
    """A module and its own parameters by name. Those of its parametrizations are its own, too."""

    name: str
    module: nn.Module
    parameters: dict[str, torch.Tensor]

    @property
    def kind(self) -> str:
        """The class of the module before it was parametrized."""
        return parametrize.type_before_parametrizations(self.module).__name__

    @property
    def has_matrix(self) -> bool:
        """Whether it has a trainable weight matrix."""
        return any(each.requires_grad and each.dim() > 1 for each in self.parameters.values())


def holders(model: nn.Module, own: Own = own_parameters) -> list[Holder]:
    """The modules of a model, in the order of registration.

    Modules of `torch.nn.utils.parametrize` are left out: their parameters are those of the layer that they change.
    """
    parts: dict[nn.Module, list[nn.Module]] = {}
    for module in model.modules():
        if parametrize.is_parametrized(module):
            parts[module] = list(cast(nn.ModuleDict, module.parametrizations).modules())
    inside = {part for found in parts.values() for part in found}
    found = []
    for name, module in model.named_modules():
        if module not in inside:
            parameters = dict(own(module))
            for number, part in enumerate(parts.get(module, ())):
                parameters.update({f"parametrizations.{number}.{key}": each for key, each in own(part).items()})
            found.append(Holder(name, module, parameters))
    return found


def structural(model: nn.Module, groups: Collection[str], own: Own = own_parameters) -> dict[torch.Tensor, str]:
    """Find the parameters of embeddings and of the output head by the model's structure: parameter -> group.

    "embedding": the weight of an `nn.Embedding` or `nn.EmbeddingBag`, also if it is tied to another layer. Also a
    parameter whose own name has "embed" or "position" in it: a table of positions, an adapter of an embedding.

    "head": for each embedding size, the last `nn.Linear` that has as many outputs as the embedding has rows, and fewer
    inputs than outputs (a language model's head, wherever it is registered). Also the last `nn.Linear` in the order of
    registration, if it looks like the end of the model. It is not the only module with a weight matrix, and holds at
    most half of the weights. Its outputs are not as many as the inputs of the first linear layer, as in an autoencoder.
    Nor have they a width that other modules take and make, as in a bare encoder or in a U-Net's time embedding. Layers
    without a trainable weight matrix do not count.

    own: module -> its own parameters by name, without those of submodules.
    """
    return structural_of(holders(model, own), groups)


def structural_of(modules: Sequence[Holder], groups: Collection[str]) -> dict[torch.Tensor, str]:
    """As :func:`structural`, with the modules of the model given."""
    found: dict[torch.Tensor, str] = {}
    vocabularies = set()
    for each in modules:
        if isinstance(each.module, (nn.Embedding, nn.EmbeddingBag)):
            vocabularies.add(each.module.num_embeddings)
            if "embedding" in groups:
                found.update((p, "embedding") for p in each.parameters.values())
        elif "embedding" in groups:
            found.update((p, "embedding") for name, p in each.parameters.items() if _names_embedding(each, name))
    if "head" in groups:
        matrices = [each for each in modules if each.has_matrix]
        linear = [(each, each.module) for each in matrices if isinstance(each.module, nn.Linear)]
        widening = {m.out_features: each for each, m in linear if m.out_features > m.in_features}  # the last of a width
        heads = [each for width, each in widening.items() if width in vocabularies]
        if linear and _ends(*linear[-1], matrices):
            heads.append(linear[-1][0])
        for head in heads:
            found.update((p, "head") for p in head.parameters.values() if p not in found)
    return found


def _names_embedding(holder: Holder, name: str) -> bool:
    """Whether the own name of a parameter says that it is an embedding. A module `embed` may hold any layer."""
    if isinstance(holder.module, (nn.ParameterDict, nn.ParameterList)):
        name = f"{holder.name.rpartition('.')[2]}.{name}"
    return "embed" in name.lower() or "position" in name.lower()


def _ends(head: Holder, last: nn.Linear, matrices: Sequence[Holder]) -> bool:
    """Whether the last linear layer looks like the end of the model, see :func:`structural`."""
    others = [each.module for each in matrices if each is not head]
    if not others:
        return False
    width, first = last.out_features, matrices[0].module
    if isinstance(first, nn.Linear) and first.in_features == width:
        return False
    if any(_width(each, "in") == width for each in others) and any(_width(each, "out") == width for each in others):
        return False
    sizes = [sum(p.numel() for p in each.parameters.values() if p.requires_grad) for each in (head, *matrices)]
    return 2 * sizes[0] <= sum(sizes[1:])


def _width(module: nn.Module, side: str) -> int | None:
    """Features or channels that a module takes (side "in") or makes ("out"); None if it does not say."""
    found = getattr(module, f"{side}_features", getattr(module, f"{side}_channels", None))
    return found if isinstance(found, int) else None
