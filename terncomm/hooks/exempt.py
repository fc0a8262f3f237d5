"""Which parameters travel exactly."""

import fnmatch
from collections.abc import Collection, Iterable
from typing import TypeVar

import torch
from torch import nn

GROUPS = ("embedding", "head")

M = TypeVar("M", bound=nn.Module)


def clean(name: str) -> str:
    """A parameter's name without what DDP and torch.compile put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def structural(model: nn.Module, groups: Collection[str]) -> dict[torch.Tensor, str]:
    """Parameters of embeddings and of the output head, found by structure, each with its group.

    An embedding is the weight of an `nn.Embedding` or `nn.EmbeddingBag`, tied uses included. The output head is the
    last linear layer in the order of registration, provided that it is not the only weight matrix; so is, of the layers
    that widen to one output per row of an embedding, the last (a language model's head, wherever it is registered).
    """
    found: dict[torch.Tensor, str] = {}
    vocabularies = set()
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            vocabularies.add(module.num_embeddings)
            if "embedding" in groups:
                found[module.weight] = "embedding"
    if "head" in groups:
        matrices = [m for m in model.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))]
        linear = [m for m in matrices if isinstance(m, nn.Linear)]
        widening = {m.out_features: m for m in linear if m.out_features > m.in_features}  # the last of each width
        heads = [m for width, m in widening.items() if width in vocabularies]
        if linear and len(matrices) > 1:
            heads.append(linear[-1])
        for head in heads:
            found.update((p, "head") for p in head.parameters(recurse=False) if p not in found)
    return found


def matching(skip: Collection[str], names: Iterable[str]) -> set[str]:
    """The names that a pattern of `skip` matches: a name, the name of a module that holds it, or a shell pattern.

    Raises:
        ValueError: a pattern matches nothing.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in skip:
        hits = [n for n in names if n.startswith(pattern + ".") or fnmatch.fnmatchcase(n, pattern)]
        if not hits:
            known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise ValueError(f"skip={pattern!r} matches no parameter that requires a gradient; there are: {known}")
        found.update(hits)
    return found
