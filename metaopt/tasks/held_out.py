"""Eight families that small MLPs say nothing of: what an optimizer is judged on, not trained on."""

from __future__ import annotations

from typing import NamedTuple

from metaopt.meta_training.task import TaskFamily
from metaopt.tasks.characters import CharacterLSTM, CharacterTransformer
from metaopt.tasks.examples import Classes, Reconstruction
from metaopt.tasks.networks import MLP, ConvNet
from metaopt.tasks.supervised import Supervised


class HeldOut(NamedTuple):
    """A family to judge on, and the number of steps it is trained for."""

    family: TaskFamily
    horizon: int


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
