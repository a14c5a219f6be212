"""What a type checker makes of both names of the optimizers; `mypy` reads it, nobody imports it."""

from __future__ import annotations

from typing import assert_type

import optimizers
from metaopt.optimizers import SGD, LSTMOptimizer
from metaopt.optimizers.learned import LSTMOptimizer as SameLSTM
from metaopt.optimizers.schedules import Cosine
from metaopt.optimizers.transforms import ClipNorm

assert_type(SGD(0.1), optimizers.SGD)
assert_type(LSTMOptimizer(4), SameLSTM)
assert_type(ClipNorm(1.0, SGD(Cosine(0.1, steps=3))), optimizers.ClipNorm)
SGD(lr=0.1, momentun=0.9)  # type: ignore[call-arg]
SGD(lr="0.1")  # type: ignore[arg-type]
