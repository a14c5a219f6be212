"""What every test starts from: one thread, seed 0, and `problems` importable."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from metaopt.autodiff.forward import load_formulas

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves it out
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
# By default torch starts a pool of processes that compile, each of which imports torch, for
# programs of a few lines.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
load_formulas()  # some tests call `torch.func.jvp` themselves


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Make float64 the default: derivatives are compared to 1e-10."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
