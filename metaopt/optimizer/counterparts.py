"""Which of our optimizers corresponds to which of torch's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from metaopt.optimizer.optimizer import Optimizer


class Counterpart(NamedTuple):
    """A differentiable equal of a class of torch.

    Args:
        kind: the class that makes the same updates.
        slots: its name of a slot -> the name in the state of torch's.
    """

    kind: type[Optimizer]
    slots: Mapping[str, str]


_COUNTERPARTS: dict[type[torch.optim.Optimizer], Counterpart] = {}


def register_equal(
    theirs: type[torch.optim.Optimizer], ours: type[Optimizer], slots: Mapping[str, str]
) -> None:
    """Make `ours` what `from_torch` returns for a live optimizer whose class is exactly `theirs`.

    Args:
        theirs: the class of the live optimizer.
        ours: a class that makes the same updates; its constructor takes the options of a parameter
            group by their names there.
        slots: name of a slot of `ours` -> its name in the state of `theirs`.

    Raises:
        TypeError: one of the two is not such a class.
    """
    for name, value, base in (("theirs", theirs, torch.optim.Optimizer), ("ours", ours, Optimizer)):
        if not (inspect.isclass(value) and issubclass(value, base)):
            raise TypeError(
                f"register_equal: `{name}` must be a class derived from "
                f"{base.__module__}.{base.__name__}, got {value!r}. Give the classes, not an "
                "optimizer of each: register_equal(torch.optim.SGD, MySGD, {})."
            )
    _COUNTERPARTS[theirs] = Counterpart(ours, dict(slots))


def counterparts() -> Mapping[type[Any], Counterpart]:
    """Return class of torch -> its equal, as far as they are registered."""
    return _COUNTERPARTS
