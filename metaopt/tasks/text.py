"""Text that ships with Python: an alphabet, the sources of the library, its topics of help."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import pydoc_data.topics
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Folders of the standard library that are not read.
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


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


def topics() -> dict[str, str]:
    """Return the topics of Python's interactive help: name -> text."""
    return dict(pydoc_data.topics.topics)


def library() -> dict[str, str]:
    """Return the sources of the standard library: path of the file -> text.

    Left out are tests, what is installed beside it, the tables in `encodings`, and the topics of
    help, which are documents of their own.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not LEFT_OUT.intersection(name.parts):
            found[name.as_posix()] = path.read_text(encoding="utf-8", errors="replace")
    return found


def split_by_name(
    documents: dict[str, str], shares: tuple[float, float]
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Return (training, validation, test): where a document goes depends on its name alone.

    Args:
        documents: name -> text.
        shares: of training and of validation, about; the rest is for the test.
    """
    parts: tuple[dict[str, str], dict[str, str], dict[str, str]] = ({}, {}, {})
    for name, text in documents.items():
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32
        parts[(place >= shares[0]) + (place >= sum(shares))][name] = text
    return parts
