"""Codecs by their names."""

import difflib

from terncomm.codecs.base import Codec, Half, check_frozen
from terncomm.codecs.int8 import Int8
from terncomm.codecs.ternary import Ternary
from terncomm.from_file import attribute

_ELSEWHERE = {"none": " (for none, register no hook)"}
_NAMED: dict[str, Codec] = {
    "bf16": Half("bf16"),
    "fp16": Half("fp16"),
    "int8": Int8(block=2048),
    "terngrad": Ternary(clip=2.5),
}


def codec_for(codec: "str | Codec") -> Codec:
    """A codec from its name: "terngrad" is `Ternary(clip=2.5)` as published, "int8" is `Int8(block=2048)`.

    "bf16" and "fp16" are :class:`Half`: floats of 16 bits. "FILE.py:NAME" is a codec of one's own, or its class;
    it can be pickled, but only this process can unpickle it.

    Raises:
        ValueError: the name is unknown, or what has it in a file is no codec.
        TypeError: `codec` is neither a name nor a codec, or a codec that is no frozen dataclass.

    >>> codec_for("int8")
    Int8(block=2048, returned='int8')
    """
    if isinstance(codec, Codec):
        check_frozen("codec", codec, "its fields are its configuration, which ranks compare by its repr")
        return codec
    if not isinstance(codec, str):
        raise TypeError(f"codec must be a name or a terncomm codec, got {codec!r}{_hint(codec)}")
    if ":" in codec:
        found = attribute(codec)
        try:
            return codec_for(found() if isinstance(found, type) and issubclass(found, Codec) else found)
        except TypeError as error:
            raise ValueError(f"{codec}: {error}") from error
    if codec not in _NAMED:
        meant = difflib.get_close_matches(codec.lower(), _NAMED, n=1, cutoff=0.8)
        advice = f" (did you mean {meant[0]!r}?)" if meant else _ELSEWHERE.get(codec, "")
        known = ", ".join(sorted(_NAMED))
        raise ValueError(
            f"unknown codec {codec!r}{advice}; known: {known}, or a codec such as Ternary(), or one of yours as "
            "FILE.py:CLASS"
        )
    return _NAMED[codec]


def _hint(codec: object) -> str:
    return f": a class; write {codec.__name__}()" if isinstance(codec, type) and issubclass(codec, Codec) else ""
