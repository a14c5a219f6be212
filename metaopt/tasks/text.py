"""Text that ships with Python: an alphabet, the sources of the library, its topics of help."""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Alphabet:
    """The symbols that a model tells apart: some characters, and one symbol for all the others.

    Args:
        characters: those with a symbol of their own, without repetition. Character i has number i,
            and all the others have number `len(characters)`.

    Raises:
        ValueError: a character stands there twice.
    """

    characters: str

    def __post_init__(self) -> None:
        if len(set(self.characters)) < len(self.characters):
            raise ValueError(
                f"Alphabet: `characters` must be different, got {self.characters!r}. Leave out the "
                "second ones."
            )

    @classmethod
    def most_frequent(cls, texts: Iterable[str], symbols: int) -> Alphabet:
        """Return the `symbols - 1` most frequent characters; of equally many the smaller code."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        ranked = sorted(counts, key=lambda character: (-counts[character], character))
        return cls("".join(ranked[: symbols - 1]))

    @property
    def size(self) -> int:
        """Number of symbols, that for the others included."""
        return len(self.characters) + 1

    def encode(self, text: str) -> Tensor:
        """Return the number of each character's symbol, [len(text)], int64."""
        number = {character: place for place, character in enumerate(self.characters)}
        other = len(self.characters)
        return torch.tensor([number.get(character, other) for character in text], dtype=torch.int64)


def source(module: str) -> str:
    """Return the source of a Python module, which is not imported.

    Raises:
        ValueError: there is no such module, or no source of it.
    """
    spec = importlib.util.find_spec(module)
    get_source = getattr(getattr(spec, "loader", None), "get_source", None)
    found = get_source(module) if get_source else None
    if not found:
        raise ValueError(
            f"There must be Python source of the module, got {module!r}. Name one that is written "
            "in Python, such as 'argparse'."
        )
    return str(found)


@functools.cache
def encoded_sources(modules: tuple[str, ...], symbols: int) -> tuple[Alphabet, Tensor]:
    """Return (the most frequent symbols, the modules' sources one after the other, [n], int64).

    Do not change the tensor in place. The text is that of the running version of Python.
    """
    texts = [source(module) for module in modules]
    alphabet = Alphabet.most_frequent(texts, symbols)
    return alphabet, alphabet.encode("".join(texts))
