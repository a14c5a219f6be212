"""The random generators that a program has in common: torch's, Python's and numpy's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def read_random_state() -> dict[str, Any]:
    """Return the states of all of them: tensors and numbers."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - users draw from it
    number, words, gauss = random.getstate()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": on_gpu,
        "numpy": [kind, torch.tensor(keys.astype(np.int64)), *rest],  # type: ignore[union-attr]
        "python": [number, torch.tensor(words), gauss],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Go back to it, on as many GPUs as there were.

    Raises:
        ValueError, TypeError, LookupError, RuntimeError: it is no such state.
    """
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    number, words, gauss = state["python"]
    random.setstate((number, tuple(words.tolist()), gauss))
    torch.set_rng_state(state["torch"])
    for index, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(one.cpu(), index)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """While entered, what is drawn leaves no trace: afterwards all of them are as they were."""
    before = read_random_state()
    try:
        yield
    finally:
        restore_random_state(before)
