"""Optimizers that were trained here: weights with a card each, which says how and how good."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from metaopt.optimizer import Optimizer, with_steps
from metaopt.optimizer.horizon import asks_for_steps

__all__ = ["Card", "digest", "load_trained", "read_card", "trained_names"]

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Card:
    """What one should know of trained weights.

    Attributes:
        summary: what it is.
        trained_on: the tasks, and how many steps of them.
        command: what makes it again.
        cost: of that, in CPU time.
        results: figures, with the command that measured them.
        limits: where it fails.
        sha256: digest of the weights file.
    """

    summary: str
    trained_on: str
    command: str
    cost: str
    results: str
    limits: str
    sha256: str

    @classmethod
    def read(cls, path: Path) -> Card:
        """Read a card.

        Raises:
            ValueError: it lacks something, or has something unknown.
        """
        found = tomllib.loads(path.read_text())
        names = {field.name for field in fields(cls)}
        if found.keys() != names:
            raise ValueError(
                f"The card {path} must have {sorted(names)}, got {sorted(found)}. Take the card "
                "that came with the weights."
            )
        return cls(**found)

    def write(self, path: Path) -> None:
        """Write it as TOML, whose strings are JSON's."""
        rows = [f"{name} = {json.dumps(text)}\n" for name, text in asdict(self).items()]
        path.write_text("".join(rows))


def digest(weights: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def trained_names() -> list[str]:
    """Return the names that `load_trained` knows."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def read_card(name: str) -> Card:
    """Return the card of trained weights.

    Raises:
        ValueError: there are none of that name.
    """
    return Card.read(_file(name).with_suffix(".toml"))


def load_trained(name: str, *, steps: int | None = None) -> Optimizer:
    """Return an optimizer with weights that come with the package; nothing is downloaded.

    Args:
        name: one of `trained_names()`.
        steps: the number of steps of your training, for those that have to know it.

    Raises:
        ValueError: an unknown name, a card that is not that of the weights, or `steps` for one that
            does not have to know it.
    """
    path = _file(name)
    expected = read_card(name).sha256
    if digest(path) != expected:
        raise ValueError(
            f"{path.name} has the SHA-256 {digest(path)}, its card says {expected}: they are not "
            "of one training. Install the package again, or train anew with the card's command."
        )
    optimizer = Optimizer.load(path)
    if steps is None:
        return optimizer
    if not any(map(asks_for_steps, optimizer.modules())):
        raise ValueError(
            f"The trained optimizer {name!r} takes no number of steps, got steps={steps}. Leave it "
            "out; `read_card` says for how long a training it was made."
        )
    return with_steps(optimizer, steps)


def _file(name: str) -> Path:
    if name not in trained_names():
        raise ValueError(
            f"There is no trained optimizer {name!r}; there are {', '.join(trained_names())}."
        )
    return FOLDER / f"{name}.safetensors"
