"""The handwritten digits bundled with scikit-learn.

Training a small network on them is a task.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt._functional import Params
from metaopt.extras import extra
from metaopt.meta_training.task import Task

CLASSES = 10
PIXELS = 64


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Return (images [1797, 64] in [0, 1], float32; labels [1797], int64).

    Do not change them in place.

    Reference:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
        Repository, 1998.
    """
    with extra("`digits`"):
        # here: it takes as long to import as all the rest without torch
        from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


@dataclass(frozen=True)
class DigitsMLP:
    """Cross-entropy of a ReLU network 64-hidden-10 on minibatches of digits.

    Each task starts from a fresh initialisation.

    Args:
        hidden: widths of the hidden layers.
        batch_size: digits per step, drawn with replacement.
    """

    hidden: tuple[int, ...] = (32,)
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.batch_size < 1 or any(width < 1 for width in self.hidden):
            raise ValueError(
                f"DigitsMLP: `batch_size` and `hidden` must be positive, got {self.batch_size} and "
                f"{self.hidden}."
            )

    def loss(self, params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy of a batch (images [n, 64], labels [n])."""
        x, labels = batch
        layers = len(self.hidden) + 1
        for layer in range(layers):
            x = F.linear(
                x if layer == 0 else x.relu(), params[f"weight{layer}"], params[f"bias{layer}"]
            )
        return F.cross_entropy(x, labels)

    def sample(self, generator: torch.Generator, steps: int) -> Task:
        """Draw weights from N(0, 1 / fan in), biases 0, and a minibatch for every step."""
        params = {}
        for layer, (fan_in, fan_out) in enumerate(
            itertools.pairwise([PIXELS, *self.hidden, CLASSES])
        ):
            params[f"weight{layer}"] = torch.randn(
                fan_out, fan_in, generator=generator
            ) / math.sqrt(fan_in)
            params[f"bias{layer}"] = torch.zeros(fan_out)
        images, labels = digits()
        chosen = torch.randint(len(labels), (steps, self.batch_size), generator=generator)
        return Task(params, (images[chosen], labels[chosen]))
