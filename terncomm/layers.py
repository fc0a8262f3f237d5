"""Which parameters of a model go through a codec, which do not, and where both lie in a bucket."""

import re
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import nn

from terncomm.codecs import Codec, IntegerCodec, Rules
from terncomm.codecs.rules import DEFAULT, matches
from terncomm.segments import Segments
from terncomm.structure import GROUPS, Own, holders, own_parameters, structural_of
from terncomm.torch_internals import WRAPPERS

_WRAPPERS = re.compile(rf"\b({'|'.join(WRAPPERS)})(\.|$)")


class Layers:
    """The number and the codec of each parameter of a model. The same for DDP, FSDP and training loops.

    Args:
        named_parameters: (name, parameter) pairs of the model. A tied parameter keeps its first name. Frozen parameters
            have a number, too, so freezing and thawing do not change the rounding noise of the others.
        rules: the codec of each parameter; by default "terngrad" for all.
        skip: parameters that are averaged without a codec: shell patterns for parameter names or module names.
        min_numel: parameters with fewer elements do not use integer codecs, nor do vectors, also in the shape (1, N) or
            (1, C, 1, 1).
        exempt: groups, out of GROUPS, that do not use integer codecs unless a rule other than "default" matches them.
            :meth:`adopt` finds the groups in the model's structure.

    Raises:
        ValueError: unknown group; `skip` or rules without `named_parameters`; or a pattern in `skip` without a match.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]] = (),
        *,
        rules: Rules | None = None,
        skip: Collection[str] = (),
        min_numel: int = 1024,
        exempt: Collection[str] = GROUPS,
    ) -> None:
        self.rules = rules or Rules.of("terngrad")
        self.skip = (skip,) if isinstance(skip, str) else tuple(skip)
        self.min_numel = min_numel
        self.exempt = (exempt,) if isinstance(exempt, str) else tuple(exempt)
        if unknown := set(self.exempt) - set(GROUPS):
            raise ValueError(f"exempt may name {', '.join(GROUPS)}; got {', '.join(sorted(unknown))}")
        found: dict[torch.Tensor, str] = {}
        for name, parameter in named_parameters:
            found.setdefault(parameter, clean(name))
        if all(name.startswith("module.") for name in found.values()):  # names of a DDP wrapper, most likely
            self.skip = tuple(pattern.removeprefix("module.") for pattern in self.skip)
            found = {parameter: name.removeprefix("module.") for parameter, name in found.items()}
        if self.skip and not found:
            raise ValueError("skip= needs names: give named_parameters=model.named_parameters(), or use register")
        if len(self.rules.pairs) > 1 and not found:
            raise ValueError("rules need names: give named_parameters=model.named_parameters(), or use register")
        self.names = list(found.values())
        self.numbers = {parameter: number for number, parameter in enumerate(found)}
        self._skipped = matching("skip", self.skip, self.names)
        self._kinds: dict[torch.Tensor, frozenset[str]] = {}  # group, "norm", module class names
        self._known: dict[torch.Tensor, tuple[Codec | None, str]] = {}
        self.adopted = False  # whether `adopt` was called: else no groups are known

    def adopt(self, model: nn.Module, own: Own = own_parameters) -> None:
        """Find the groups and module classes of the parameters of `model`.

        Args:
            model: the model.
            own: module -> its own parameters by name, without those of submodules.

        Raises:
            ValueError: the pattern of a rule matches no parameter.
        """
        kinds: dict[torch.Tensor, set[str]] = {}
        modules = holders(model, own)
        for each in modules:
            for parameter in each.parameters.values():
                kinds.setdefault(parameter, set()).add(each.kind)
                if "Norm" in each.kind:
                    kinds[parameter].add("norm")
        for parameter, group in structural_of(modules, GROUPS).items():
            kinds[parameter].add(group)
        self.adopted = True
        self._kinds = {parameter: frozenset(found) for parameter, found in kinds.items()}
        self._known.clear()
        classes = {name for found in self._kinds.values() for name in found}
        matching("rule", [pattern for pattern in self.rules.patterns if pattern not in classes], self.names)

    def codec_of(self, parameter: torch.Tensor) -> Codec | None:
        """The codec of this parameter's gradient after warm-up; None: averaged without a codec."""
        return self._decide(parameter)[0]

    def why_exact(self, parameter: torch.Tensor) -> str:
        """Why this parameter uses no codec: "skip", "rule", "dtype", "small" or its group; "" if it uses one."""
        return self._decide(parameter)[1]

    def _decide(self, parameter: torch.Tensor) -> tuple[Codec | None, str]:
        if parameter not in self._known:
            self._known[parameter] = self._find(parameter)
        return self._known[parameter]

    def _find(self, parameter: torch.Tensor) -> tuple[Codec | None, str]:
        number = self.numbers.get(parameter, len(self.names))
        name = self.names[number] if number < len(self.names) else ""
        if name in self._skipped:
            return None, "skip"
        if not parameter.is_floating_point():
            return None, "dtype"
        kinds = self._kinds.get(parameter, frozenset())
        pattern, codec = self.rules.match(name, kinds)
        if isinstance(codec, IntegerCodec):
            if _is_vector(parameter) or parameter.numel() < self.min_numel:
                return None, "small"
            if pattern == DEFAULT and (exempt := sorted(kinds.intersection(self.exempt))):
                return None, exempt[0]
        return codec, "" if codec is not None else "rule"

    def codes(self, parameter: torch.Tensor) -> bool:
        """Whether this parameter's gradient goes through a codec after warm-up."""
        return self.codec_of(parameter) is not None

    @property
    def trainable(self) -> list[torch.Tensor]:
        """The parameters with a number that require a gradient now, in the order of their numbers."""
        return [parameter for parameter in self.numbers if parameter.requires_grad]

    @property
    def coded_names(self) -> dict[str, str]:
        """Trainable parameters with a name that go through a codec: name -> repr of the codec."""
        named = [parameter for parameter in self.trainable if self.numbers[parameter] < len(self.names)]
        codecs = {self.name(self.numbers[parameter]): self.codec_of(parameter) for parameter in named}
        return {name: repr(codec) for name, codec in codecs.items() if codec is not None}

    def number(self, parameter: torch.Tensor) -> int:
        """The layer number of a parameter, which keys its rounding noise; one without a name gets the next number."""
        return self.numbers.setdefault(parameter, len(self.numbers))

    def name(self, number: int) -> str:
        """The name of the parameter with this number; "parameter N" if it has none."""
        return self.names[number] if number < len(self.names) else f"parameter {number}"

    def name_of(self, parameter: torch.Tensor) -> str:
        """The name of a parameter; "parameter N" if it has none."""
        return self.name(self.number(parameter))

    def number_of(self, name: str) -> int:
        """Inverse of :meth:`name`: the number of the parameter with this name.

        Raises:
            ValueError: there is no such parameter.
        """
        if name in self.names:
            return self.names.index(name)
        kind, _, number = name.partition(" ")
        if kind != "parameter" or not number.isdecimal():
            raise ValueError(f"the checkpoint has state of parameter {name}, but this model has no such parameter")
        return int(number)

    def forget_unnamed(self) -> None:
        """Forget the numbers of parameters without a name; :meth:`number` then gives them new ones."""
        self.numbers = {p: number for p, number in self.numbers.items() if number < len(self.names)}
        self._known.clear()

    def groups_of(self, parameters: Sequence[torch.Tensor]) -> list[tuple[Segments, Codec | None]]:
        """The layers of a bucket, grouped by codec; None: averaged without a codec.

        parameters: those whose gradients the bucket holds, in its order and without gaps.
        """
        groups: dict[Codec | None, list[tuple[int, int, int]]] = {}
        offset = 0
        for parameter in parameters:
            size = parameter.numel() * (2 if parameter.is_complex() else 1)  # DDP flattens complex to real
            groups.setdefault(self.codec_of(parameter), []).append((size, offset, self.number(parameter)))
            offset += size
        return [(_segments(rows), codec) for codec, rows in groups.items()]

    def of_bucket(self, parameters: Sequence[torch.Tensor]) -> tuple[Segments, Segments]:
        """(coded layers, layers without a codec) of such a bucket. Only for rules with a single codec."""
        groups = {codec is None: layers for layers, codec in self.groups_of(parameters)}
        return groups.get(False, Segments(())), groups.get(True, Segments(()))


def _segments(rows: list[tuple[int, int, int]]) -> Segments:
    sizes, offsets, layers = zip(*rows, strict=True) if rows else ((), (), ())
    return Segments(sizes, offsets=offsets, layers=layers)


def _is_vector(parameter: torch.Tensor) -> bool:
    """Whether it has one dimension, or others that are all 1 and begin with the first: scales, biases, tokens."""
    shape = parameter.shape
    return len(shape) < 2 or (shape[0] == 1 and sum(size > 1 for size in shape) < 2)


def clean(name: str) -> str:
    """A parameter's name without the names that FSDP1, torch.compile and activation checkpointing add to it."""
    return _WRAPPERS.sub("", name).rstrip(".")


def matching(what: str, patterns: Collection[str], names: Iterable[str]) -> set[str]:
    """The names that at least one pattern matches; see :func:`terncomm.codecs.rules.matches`.

    Args:
        what: the option that the error message names.
        patterns: shell patterns for parameter names or module names.
        names: of all parameters.

    Raises:
        ValueError: a pattern matches no name.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if matches(pattern, name)]
        if not hits:
            known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise ValueError(f"{what}={pattern!r} matches no parameter; there are: {known}")
        found.update(hits)
    return found


def in_memory_order(flat: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """View `flat`, (n,), in the shape and memory order of `parameter`, as DDP's buckets store its gradient."""
    if _is_dense(parameter):
        return flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset())
    return flat.view(parameter.shape)


def _is_dense(parameter: torch.Tensor) -> bool:
    """Whether its elements fill one block of memory without gaps, in any order of the dimensions."""
    filled = 1
    for stride, size in sorted(zip(parameter.stride(), parameter.shape, strict=True)):
        if size > 1:
            if stride != filled:
                return False
            filled *= size
    return True
