"""What torch mended in which version: the one place where tests ask for it.

Tests of what torch gets wrong state it by these.
"""

from __future__ import annotations

import torch

MENDED = {
    "cdist has no second derivative": "2.14",
    "pdist has no second derivative": "2.14",
    # it is refused from there on
    "the third derivative of batch and instance norm is wrong": "2.14",
    "the compiler forgets the scale of a sum with a product of matrices": "2.15",
}


def is_mended(defect: str) -> bool:
    """Return True if the torch that runs has it right, or says that it has no right answer."""
    return torch.__version__ >= MENDED[defect]
