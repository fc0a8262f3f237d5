"""A language model: a small causal transformer that predicts the next word, or the next byte, of a text.

Reference: A. Vaswani, N. Shazeer, N. Parmar, J. Uszkoreit, L. Jones, A. N. Gomez, L. Kaiser, I. Polosukhin.
Attention Is All You Need. NIPS 2017.
"""

import ast
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, Subset

from terncomm.simulator.workloads.base import DataError, Options, Workload

VOCABULARY = 8192
CONTEXT = 64
TEST_SHARE = 0.1
TEST_WINDOWS = 512  # at most: 32 thousand labels tell losses apart well enough


def text(options: Options) -> Workload:
    """Return a transformer, and the windows of `options.text`, by default of :func:`pythons_own`; the end is the test.

    `options.tokens` is "words" (the commonest 8191, and one for all others) or "bytes".
    """
    content = pythons_own() if options.text is None else read(options.text)
    if options.tokens == "words":
        words = re.findall(r"\w+|[^\w\s]", content)
        vocabulary = vocabulary_of(words[: split(len(words))])
        tokens = torch.tensor([vocabulary.get(word, 0) for word in words])
        size = len(vocabulary)
    else:
        tokens = torch.tensor(list(content.encode()))
        size = 256
    train, test = (Windows(part) for part in tokens.tensor_split([split(len(tokens))]))
    if not len(train) or not len(test):
        wanted = round(CONTEXT / TEST_SHARE) + 2
        raise DataError(f"{options.text} has {len(tokens)} {options.tokens}; wanted: a text of {wanted} or more")
    return Workload(
        network=Transformer(size),
        train=train,
        test=Subset(test, range(min(TEST_WINDOWS, len(test)))),
        lr=2e-3,
        optimizer=lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr),
        steps_per_epoch=30,
        test_batch=16,
        fingerprint=f"{options.tokens} of a text with CRC {zlib.crc32(content.encode()):08x}",
    )


def split(length: int) -> int:
    """Return where the test set begins in `length` tokens."""
    return length - int(TEST_SHARE * length)


def read(path: Path) -> str:
    """Return the text at `path`."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise DataError(f"--text {path} cannot be read: {error.strerror}; wanted: a text file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--text {path} is not UTF-8 at byte {error.start}; wanted: a text file in UTF-8") from error


@cache
def pythons_own() -> str:
    """Return English that is on every Python installation: its language reference, then its modules' documentation.

    That is what `help()` prints: `pydoc_data.topics`, and the docstrings of the standard library's modules and of the
    packages' `__init__.py`, in order of name. Some 1.4 million characters, 300 thousand words, 10 thousand different
    ones; they depend on the version of Python, not on the machine.
    """
    from pydoc_data.topics import topics

    library = Path(os.__file__).parent
    paths = sorted([*library.glob("*.py"), *library.glob("*/__init__.py")])
    if not paths:
        raise DataError(f"{library} holds no sources to take documentation from; name a text file with --text")
    pieces = [topics[name] for name in sorted(topics)]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                pieces.append(ast.get_docstring(node) or "")
    return "\n\n".join(filter(None, pieces))


def vocabulary_of(words: Iterable[str]) -> dict[str, int]:
    """Number the commonest words from 1 on; 0 is for all others.

    >>> vocabulary_of(["a", "rose", "is", "a", "rose"])
    {'<unk>': 0, 'a': 1, 'rose': 2, 'is': 3}
    """
    common = (word for word, _ in Counter(words).most_common(VOCABULARY - 1))
    return {"<unk>": 0} | {word: number for number, word in enumerate(common, 1)}


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """A text cut into windows: inputs (T,), and labels (T,), the tokens that follow each of them.

    >>> [labels.tolist() for inputs, labels in Windows(torch.arange(9), context=4)]
    [[1, 2, 3, 4], [5, 6, 7, 8]]

    Args:
        tokens: (n,) int64.
        context: tokens per window, T.
    """

    def __init__(self, tokens: Tensor, context: int = CONTEXT) -> None:
        self.tokens, self.context = tokens, context

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs (T,) and labels (T,)."""
        if index >= len(self):
            raise IndexError(index)
        start = index * self.context
        window = self.tokens[start : start + self.context + 1]
        return window[:-1], window[1:]


class Block(nn.Module):
    """Causal self-attention and a network of two layers, each on normalized input and added to it: (B, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, width)."""
        parts = self.query_key_value(self.attention_norm(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.joined(attended.transpose(1, 2).flatten(-2))
        mixed: Tensor = x + self.mlp(self.mlp_norm(x))
        return mixed


class Transformer(nn.Module):
    """Tokens (B, T) to logits of the next one (B, T, vocabulary); no dropout, so no generator's state to save.

    The head is not tied to the embedding. terncomm finds both by structure and sends their gradients exactly; with
    words they are most of the parameters, with bytes next to none.
    """

    def __init__(self, vocabulary: int, width: int = 128, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, T, vocabulary)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens) + self.position(positions))))
        return logits
