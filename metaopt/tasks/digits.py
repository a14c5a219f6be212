"""The handwritten digits bundled with scikit-learn, as tensors."""

from __future__ import annotations

import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Return (images [1797, 64] in [0, 1], float32; labels [1797], int64). Do not change them in place.

    Reference:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
