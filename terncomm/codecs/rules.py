"""Which parameters go through which codec: the first rule that matches."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from terncomm.codecs.base import Codec
from terncomm.codecs.named import codec_for

DEFAULT = "default"
KINDS = ("embedding", "head", "norm")

CodecLike = str | Codec | Mapping[str, "str | Codec | None"]


@dataclass(frozen=True)
class Rules:
    """Patterns and codecs, the first match wins; None averages exactly.

    A pattern is a shell pattern for the name of a parameter or of a module that holds it, the class of such a module,
    one of KINDS, or "default", which stands last and matches everything.
    """

    pairs: tuple[tuple[str, Codec | None], ...]

    @classmethod
    def of(cls, codec: CodecLike) -> "Rules":
        """From a codec, its name, or a mapping of patterns to codecs.

        Raises:
            ValueError: an unknown name; a mapping without "default", or with rules after it.
            TypeError: none of these.

        >>> Rules.of({"embedding": "int8", "default": "terngrad"})
        {'embedding': Int8(block=2048, returned='int8'), 'default': Ternary(clip=2.5)}
        """
        if not isinstance(codec, Mapping):
            return cls(((DEFAULT, codec_for(codec)),))
        names = list(codec)
        if not names or names[-1] != DEFAULT:
            raise ValueError(f"rules end with {DEFAULT!r}, which says how all other layers travel; got {names}")
        return cls(tuple((name, None if each is None else codec_for(each)) for name, each in codec.items()))

    @property
    def default(self) -> Codec | None:
        """Of what no other rule matches."""
        return self.pairs[-1][1]

    def match(self, name: str, kinds: frozenset[str]) -> tuple[str, Codec | None]:
        """The rule for a parameter of this name; kinds: its kinds, and the classes of the modules that hold it."""
        for pattern, codec in self.pairs:
            if pattern == DEFAULT or pattern in kinds or named(pattern, name):
                return pattern, codec
        raise AssertionError("the last rule matches everything")

    @property
    def patterns(self) -> list[str]:
        """Those that must match something: neither a kind nor the default."""
        return [pattern for pattern, _ in self.pairs if pattern != DEFAULT and pattern not in KINDS]

    def __repr__(self) -> str:
        return repr(self.default if len(self.pairs) == 1 else dict(self.pairs))


def named(pattern: str, name: str) -> bool:
    """Whether a shell pattern fits the name of a parameter, or of a module that holds it.

    "*.head" fits the module "head" of the model itself, too.

    >>> named("*.head", "decoder.head.weight"), named("*.head", "head.weight"), named("body", "bodyguard.weight")
    (True, True, False)
    """
    parts = name.split(".")
    holders = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any(fnmatch.fnmatchcase(f"{dot}{holder}", pattern) for holder in holders for dot in ("", "."))
