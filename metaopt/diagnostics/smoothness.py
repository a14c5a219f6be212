"""Whether training responds smoothly to what is to be learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from metaopt import tree
from metaopt.checks import check_positive
from metaopt.tree import Tree


def metasmoothness(train: Callable[[Tree], Tree], z: Tree, direction: Tree, step: float) -> float:
    """Return S in [-1, 1]: how far training goes on in the direction in which it set out.

    With theta_0, theta_h, theta_2h trained at z, z + h v and z + 2h v, and d = |theta_2h - theta_0|
    entrywise: S = sum_i d_i / |d|_1 sign(theta_h - theta_0)_i sign(theta_2h - theta_h)_i. Near 1 a
    metagradient at z says where to go; near 0 or below it is noise, exact or not. Larger batches,
    average pooling, batch norm before the activation, smaller final logits, eps inside Adam's
    square root and moderate rates make training smoother.

    Args:
        train: z -> trained parameters, a tree; deterministic: the same batches, and the same random
            numbers, at every call.
        z: a tree of floating-point tensors, what is learned.
        direction: v, a tree like z.
        step: h, as long as the updates of z that are to be made.

    Raises:
        ValueError: the step is not positive, `direction` is not like z, the trained parameters are
            not finite, or do not change.

    Cost:
        Three trainings without a graph.

    Reference:
        Engstrom, Ilyas, Chen, Feldmann, Moses, Madry 2025, arXiv:2503.13751, definition 2.
    """
    check_positive("metasmoothness", "step", step)
    _, structure = tree.flatten(z)
    v = tree.unflatten(structure, tree.flatten_like(structure, direction, "direction"))
    with torch.no_grad():
        here, there, beyond = (
            tree.ravel(train(tree.map(lambda z, v, i=i: z + i * step * v, z, v))) for i in range(3)
        )
    for name, end in (("z", here), ("z + h v", there), ("z + 2 h v", beyond)):
        if not end.isfinite().all():
            raise ValueError(
                f"metasmoothness: training at {name} must end at finite parameters. Take a smaller "
                f"`step`, or rate."
            )
    distances = (beyond - here).abs().double()
    if not distances.any():
        raise ValueError(
            f"metasmoothness: the trained parameters must change with z, but are the same for "
            f"step={step!r}. Does `train` use z?"
        )
    agreement = (there - here).sign() * (beyond - there).sign()
    return cast(float, ((distances * agreement).sum() / distances.sum()).tolist())
