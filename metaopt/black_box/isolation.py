"""Other libraries at work: what they draw, warn of and log stays with them."""

from __future__ import annotations

import hashlib
import logging
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import numpy as np
import torch

from metaopt.extras import extra


def derive_seed(seed: int, number: int) -> int:
    """Return the seed of one suggestion, in [0, 2^32).

    A suggestion depends on the search's seed and its own number, and on no generator that would
    have to be kept: so a search that goes on from its file suggests what it would have.
    """
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


@contextmanager
def isolate(user: str, module: str, seed: int) -> Iterator[None]:
    """While entered, the global generators of torch, numpy and Python begin at a seed.

    Ax, Optuna and the fit of a Gaussian process draw from them. Afterwards they are as they were
    before. Of torch's only the one on the CPU is: nothing here runs on another device.

    What the library says to its own developers (deprecations, a fit that was begun again, every
    step of a trial) is kept from the user; its errors are not.

    Args:
        user: what needs the library, for the message if it is not installed.
        module: the module to be used, which is imported first.
        seed: where the generators begin.

    Raises:
        ModuleNotFoundError: the library is not installed.
    """
    # the old generators of numpy, since these are what the libraries use
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _import(user, module)
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            with _silence(module.split(".")[0]):
                yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


def _import(user: str, module: str) -> None:
    """Import a module without what it logs meanwhile."""
    if sys.modules.get(module) is not None:
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with extra(user):
            import_module(module)
    finally:
        logging.disable(before)


@contextmanager
def _silence(package: str) -> Iterator[None]:
    """While entered, a package's own handler shows errors only.

    Its loggers are not touched: each of Ax's modules has one with a level of its own.
    """
    levels = {handler: handler.level for handler in logging.getLogger(package).handlers}
    for handler in levels:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)
