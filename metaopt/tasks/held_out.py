"""Eight families that small MLPs say nothing of: what an optimizer is judged on, not trained on."""

from __future__ import annotations

from typing import NamedTuple

from metaopt.meta_training.task import TaskFamily
from metaopt.tasks.characters import CharacterLSTM, CharacterTransformer
from metaopt.tasks.examples import Classes, Reconstruction, Waves
from metaopt.tasks.functions import NoisyQuadratics, Rosenbrock
from metaopt.tasks.networks import MLP, ConvNet
from metaopt.tasks.supervised import Supervised


class HeldOut(NamedTuple):
    """A family to judge on, and the number of steps it is trained for."""

    family: TaskFamily
    horizon: int


def stress_families() -> dict[str, HeldOut]:
    """Return harder versions of what small MLPs are: longer, wider and deeper, by name."""
    return {
        "2,000 steps": HeldOut(Supervised(MLP((64, 32)), Classes()), 2000),
        "256 wide": HeldOut(Supervised(MLP((256, 256)), Classes()), 200),
        "6 layers": HeldOut(Supervised(MLP((32,) * 5), Classes()), 200),
        "tanh, large weights": HeldOut(Supervised(MLP((64, 32), "tanh", 3.0), Classes()), 200),
        "Rosenbrock": HeldOut(Rosenbrock(), 200),
        "noisy quadratics": HeldOut(NoisyQuadratics(50, 1000.0, 0.3), 200),
        "waves": HeldOut(Supervised(MLP((40, 40)), Waves(), 10), 200),
    }


def held_out_families() -> dict[str, HeldOut]:
    """Return the families by name.

    A deeper MLP on digits for 100 and 500 steps; a convolution network; MLPs on wine and on breast
    cancer; an autoencoder; a transformer and an LSTM that read characters.
    """
    deep = Supervised(MLP((64, 32)), Classes())
    return {
        "mlp": HeldOut(deep, 100),
        "mlp, long": HeldOut(deep, 500),
        "conv": HeldOut(Supervised(ConvNet((8, 16)), Classes(), 32), 200),
        "wine": HeldOut(Supervised(MLP((16,)), Classes("wine"), 16), 100),
        "breast cancer": HeldOut(Supervised(MLP((24,), "tanh"), Classes("breast_cancer"), 16), 200),
        "autoencoder": HeldOut(Supervised(MLP((32, 8, 32), "tanh"), Reconstruction()), 300),
        "transformer": HeldOut(CharacterTransformer(), 300),
        "LSTM": HeldOut(CharacterLSTM(), 200),
    }
