"""Rules that choose the codec of each parameter; the first rule that matches wins."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from terncomm.codecs.base import Codec
from terncomm.codecs.by_name import codec_for

DEFAULT = "default"
KINDS = ("embedding", "head", "norm")

CodecLike = str | Codec | Mapping[str, "str | Codec | None"]


@dataclass(frozen=True)
class Rules:
    """(pattern, codec) pairs; the first match wins. Codec None: averaged without a codec.

    A pattern is a shell pattern for the name of a parameter or of a module that holds it, the class name of such a
    module, one of KINDS, or "default", which matches everything and must be last.
    """

    pairs: tuple[tuple[str, Codec | None], ...]

    @classmethod
    def of(cls, codec: CodecLike) -> "Rules":
        """From a codec, its name, or a mapping of patterns to codecs.

        Raises:
            ValueError: a codec's name is unknown, or "default" is not the last pattern of the mapping.
            TypeError: `codec` is neither a name, a codec nor a mapping.

        >>> Rules.of({"embedding": "int8", "default": "terngrad"})
        {'embedding': Int8(block=2048, returned='int8'), 'default': Ternary(clip=2.5)}
        """
        if not isinstance(codec, Mapping):
            return cls(((DEFAULT, codec_for(codec)),))
        names = list(codec)
        if not names or names[-1] != DEFAULT:
            raise ValueError(f"rules end with {DEFAULT!r}, the codec of all other layers; got the patterns {names}")
        return cls(tuple((name, None if each is None else codec_for(each)) for name, each in codec.items()))

    @property
    def default(self) -> Codec | None:
        """The codec of parameters that no other rule matches."""
        return self.pairs[-1][1]

    def match(self, name: str, kinds: frozenset[str]) -> tuple[str, Codec | None]:
        """The first rule that matches a parameter. kinds: its KINDS, and class names of modules that hold it."""
        for pattern, codec in self.pairs:
            if pattern == DEFAULT or pattern in kinds or matches(pattern, name):
                return pattern, codec
        raise AssertionError("the last rule matches everything")

    @property
    def patterns(self) -> list[str]:
        """The patterns that must match a parameter: all but "default" and KINDS."""
        return [pattern for pattern, _ in self.pairs if pattern != DEFAULT and pattern not in KINDS]

    def __repr__(self) -> str:
        return repr(self.default if len(self.pairs) == 1 else dict(self.pairs))


def matches(pattern: str, name: str) -> bool:
    """Whether a shell pattern matches the parameter name `name`, or the name of a module that holds the parameter.

    "*.head" also matches a module "head" at the top level of the model.

    >>> matches("*.head", "decoder.head.weight"), matches("*.head", "head.weight"), matches("body", "bodyguard.weight")
    (True, True, False)
    """
    parts = name.split(".")
    holders = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    patterns = [pattern, pattern[2:]] if pattern.startswith("*.") else [pattern]
    return pattern in holders or any(fnmatch.fnmatchcase(holder, each) for holder in holders for each in patterns)
