"""Which optimizer of torch each of ours equals."""

from __future__ import annotations

import torch

from metaopt.optimizer import Optimizer, register_equal

from .adadelta import Adadelta
from .adafactor import Adafactor
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .adamax import Adamax
from .asgd import ASGD
from .muon import Muon
from .nadam import NAdam
from .radam import RAdam
from .rmsprop import RMSprop
from .rprop import Rprop
from .sgd import SGD

ADAM = {"mean": "exp_avg", "square": "exp_avg_sq", "largest": "max_exp_avg_sq"}
# name in torch.optim -> (our equal, our name of a slot -> its name there)
EQUALS: dict[str, tuple[type[Optimizer], dict[str, str]]] = {
    "SGD": (SGD, {"velocity": "momentum_buffer"}),
    "Adam": (Adam, ADAM),
    "AdamW": (AdamW, ADAM),
    "Adamax": (Adamax, {"mean": "exp_avg", "largest": "exp_inf"}),
    "RAdam": (RAdam, ADAM),
    "NAdam": (NAdam, ADAM | {"product": "mu_product"}),
    "Adafactor": (Adafactor, {"row": "row_var", "column": "col_var", "square": "variance"}),
    "Adagrad": (Adagrad, {"square": "sum"}),
    "Adadelta": (Adadelta, {"square": "square_avg", "moved": "acc_delta"}),
    "RMSprop": (
        RMSprop,
        {"square": "square_avg", "mean": "grad_avg", "velocity": "momentum_buffer"},
    ),
    "ASGD": (ASGD, {"average": "ax", "eta": "eta"}),
    "Rprop": (Rprop, {"previous": "prev", "size": "step_size"}),
    "Muon": (Muon, {"mean": "momentum_buffer"}),
}


def register_equals() -> None:
    """Tell `metaopt`, which does not know this package."""
    for name, (ours, slots) in EQUALS.items():
        register_equal(getattr(torch.optim, name), ours, slots)
