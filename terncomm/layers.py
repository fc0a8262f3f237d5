"""Which parameters of a model are coded, which travel exactly, and how both lie in a bucket."""

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from terncomm.segments import Segments

GROUPS = ("embedding", "head")
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(\.|$)")
Own = Callable[[nn.Module], Mapping[str, torch.Tensor]]


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters(recurse=False))


class Layers:
    """The parameters of a model, numbered, each coded or exact; the same wherever its gradients are reduced.

    Args:
        named_parameters: of the model; those that need no gradient are left out, a tied one goes by its first name.
        skip: parameters that travel exactly: names, names of modules, shell patterns.
        min_numel: parameters with fewer elements, or with one dimension, travel exactly.
        exempt: groups of GROUPS that :meth:`adopt` finds by the model's structure, and that then travel exactly.

    Raises:
        ValueError: an unknown group, or `skip` without names or with a pattern that matches none.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]] = (),
        *,
        skip: Collection[str] = (),
        min_numel: int = 1024,
        exempt: Collection[str] = GROUPS,
    ) -> None:
        self.skip = (skip,) if isinstance(skip, str) else tuple(skip)
        self.min_numel = min_numel
        self.exempt = (exempt,) if isinstance(exempt, str) else tuple(exempt)
        if unknown := set(self.exempt) - set(GROUPS):
            raise ValueError(f"exempt may name {', '.join(GROUPS)}; got {', '.join(sorted(unknown))}")
        named: dict[torch.Tensor, str] = {}
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                named.setdefault(parameter, clean(name))
        if all(name.startswith("module.") for name in named.values()):  # of a DDP model itself, most likely
            self.skip = tuple(pattern.removeprefix("module.") for pattern in self.skip)
            named = {parameter: name.removeprefix("module.") for parameter, name in named.items()}
        if self.skip and not named:
            raise ValueError("skip= needs names: give named_parameters=model.named_parameters(), or use register")
        skipped = matching(self.skip, named.values())
        self.names = list(named.values())
        self.numbers = {parameter: number for number, parameter in enumerate(named)}
        self._exact = {parameter for parameter, name in named.items() if name in skipped}

    def adopt(self, model: nn.Module, own: Own = _own) -> None:
        """Exempt what the structure of `model` says; `own` gives a module's own parameters."""
        self._exact.update(structural(model, self.exempt, own))

    def codes(self, parameter: torch.Tensor) -> bool:
        """Whether this parameter's gradient is coded, or travels exactly."""
        large = parameter.dim() > 1 and parameter.numel() >= self.min_numel
        return large and parameter.is_floating_point() and parameter not in self._exact

    @property
    def coded_names(self) -> list[str]:
        """Names of the parameters that are coded."""
        return [name for name, parameter in zip(self.names, self.numbers, strict=False) if self.codes(parameter)]

    def number(self, parameter: torch.Tensor) -> int:
        """The number by which noise is drawn; one that was not named gets the next."""
        return self.numbers.setdefault(parameter, len(self.numbers))

    def name(self, number: int) -> str:
        """A name for statistics."""
        return self.names[number] if number < len(self.names) else f"parameter {number}"

    def forget_unnamed(self) -> None:
        """Number the parameters that have no name anew."""
        self.numbers = {p: number for p, number in self.numbers.items() if number < len(self.names)}

    def of_bucket(self, parameters: Sequence[torch.Tensor]) -> tuple[Segments, Segments]:
        """The coded and the exact layers of a bucket that holds these parameters' gradients one after another."""
        coded: list[tuple[int, int, int]] = []
        exact: list[tuple[int, int, int]] = []
        offset = 0
        for parameter in parameters:
            size = parameter.numel() * (2 if parameter.is_complex() else 1)  # DDP flattens complex to real
            (coded if self.codes(parameter) else exact).append((size, offset, self.number(parameter)))
            offset += size
        return _segments(coded), _segments(exact)


def _segments(rows: list[tuple[int, int, int]]) -> Segments:
    sizes, offsets, layers = zip(*rows, strict=True) if rows else ((), (), ())
    return Segments(sizes, offsets=offsets, layers=layers)


def clean(name: str) -> str:
    """A parameter's name without what FSDP1, torch.compile and checkpointing put into it."""
    return _WRAPPERS.sub("", name).rstrip(".")


def structural(model: nn.Module, groups: Collection[str], own: Own = _own) -> dict[torch.Tensor, str]:
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
                found.update((p, "embedding") for p in own(module).values())
    if "head" in groups:
        matrices = [m for m in model.modules() if any(p.dim() > 1 for p in own(m).values())]
        linear = [m for m in matrices if isinstance(m, nn.Linear)]
        widening = {m.out_features: m for m in linear if m.out_features > m.in_features}  # the last of each width
        heads = [m for width, m in widening.items() if width in vocabularies]
        if linear and len(matrices) > 1:
            heads.append(linear[-1])
        for head in heads:
            found.update((p, "head") for p in own(head).values() if p not in found)
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


def in_memory_order(flat: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`flat` in the shape of the parameter, elements in the order in which it holds them, as in DDP's buckets."""
    if _is_dense(parameter):
        return flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset())
    return flat.view(parameter.shape)


def _is_dense(parameter: torch.Tensor) -> bool:
    """Whether its elements fill a piece of memory, in whatever order of the dimensions."""
    filled = 1
    for stride, size in sorted(zip(parameter.stride(), parameter.shape, strict=True)):
        if size > 1:
            if stride != filled:
                return False
            filled *= size
    return True
