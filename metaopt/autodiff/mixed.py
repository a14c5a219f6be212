"""The mixed second derivative of a loss: C(x) = [d_given grad_w L(w, given)]' x."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.gradient import gradient
from metaopt.autodiff.pullback import choose, pull_back, put, spread
from metaopt.autodiff.replay import Ambient
from metaopt.spare import empty_like
from metaopt.transforms import is_unrecorded
from metaopt.tree import Tree

Loss = Callable[[Tree, Tree], Tensor]  # (w, given) -> L
# a dtype whose rounding unit is above this loses the displacement that a difference needs
COARSE = 1e-4


def mixed_product(loss: Loss, w: Tree, given: Tree, x: Tree, wanted: Tree) -> Tree:
    """Return C(x), exactly; differentiable again.

    Args:
        loss: (w, given) -> L.
        w: where.
        given: a tree.
        x: a tree like w.
        wanted: a tree of bools like `given`, or with one for a whole part. What is not wanted is
            None in the result.

    Cost:
        One gradient and its derivative.
    """

    def slope(w: Tree, given: Tree) -> Tree:
        return gradient(lambda w: (loss(w, given), ()), w)[0]

    _, bars = pull_back(slope, (w, given), x, (False, wanted))
    return bars


def mixed_difference(
    loss: Loss,
    w: Tree,
    given: Tree,
    x: Tree,
    wanted: Tree,
    radius: float,
    *,
    sign: int = 1,
    is_random: bool = True,
) -> Tree:
    """Return sign (G(w + e x) - G(w - e x)) / 2e with G = grad_given L and e = radius / |x|.

    It is differentiable again; at x = 0, where it is 0, with the derivative of the exact product.

    The error is radius^2 |x| / 6 times the third derivative of G along x / |x|, and that of
    rounding, of the order of eps |x| (|G| + |w| |dG/dw|) / radius. Both sides see the same random
    numbers.

    Args:
        loss: (w, given) -> L.
        w: where.
        given: a tree.
        x: a tree like w.
        wanted: a tree of bools like `given`, or with one for a whole part. What is not wanted is
            None in the result.
        radius: Euclidean length of the displacement, of all parameters together.
        sign: 1 or -1.
        is_random: whether the loss may draw random numbers.

    Raises:
        ValueError: parameters in half precision.

    Cost:
        Two gradients.
    """
    kinds = {leaf.dtype for leaf in tree.leaves(w)}
    _check_precision(w, kinds)
    length = tree.norm(x)
    # At 0 any number will do: e is not to depend on x, nor the difference to vanish with it.
    scale = radius / torch.where(length > 0, length, 1)
    variables = choose(given, wanted)

    def slope(e: Tensor) -> list[Tensor]:
        # of a wider one a 0-dim leaf would take the dtype
        e_in = {kind: e.to(kind) for kind in kinds}
        # One displaced copy at a time; not in the same memory, which a slope may be a view of.
        there = tree.map(lambda w, x: _displace(w, x, e_in[w.dtype]), w, x)

        def value(variables: list[Tensor]) -> tuple[Tensor, Tree]:
            return loss(there, put(variables, given, wanted)), ()

        slopes: list[Tensor] = gradient(value, variables)[0]
        return slopes

    ahead, behind = map_same_noise(slope, [scale, -scale], is_random=is_random)
    slant = 1 / (sign * 2 * scale)
    bars = [((a - b) * slant).to(a.dtype) for a, b in zip(ahead, behind, strict=True)]
    return spread(bars, given, wanted)


def _displace(w: Tensor, x: Tensor, e: Tensor) -> Tensor:
    """Return w + e x."""
    if is_unrecorded() and type(w) is type(x) is Tensor:
        return torch.addcmul(w, x, e, out=empty_like(w))
    return torch.addcmul(w, x, e)


def map_same_noise(
    function: Callable[[Tree], Tree], points: list[Tree], *, is_random: bool = True
) -> list[Tree]:
    """Return the function's values at these points, with the same random numbers in each."""
    if not is_random:
        return [function(point) for point in points]
    if torch.compiler.is_compiling():  # a compiler cannot wind a generator back
        values = torch.func.vmap(function, randomness="same")(tree.stack(points))
        return [tree.index(values, i) for i in range(len(points))]
    ambient, values = Ambient.of_generators({leaf.device for leaf in tree.leaves(points)}), []
    for point in points:
        try:
            values.append(function(point))
        finally:
            ambient.reinstate()
    return values


def _check_precision(w: Tree, dtypes: set[torch.dtype]) -> None:
    if all(torch.finfo(dtype).eps <= COARSE for dtype in dtypes):
        return
    name, dtype = next(
        (name, leaf.dtype)
        for name, leaf in tree.named_leaves(w)
        if torch.finfo(leaf.dtype).eps > COARSE
    )
    raise ValueError(
        f"Finite differences need parameters in float32 or float64, got {dtype} at {name}: the "
        f"displacement would be "
        "lost in rounding. Keep float32 parameters and use autocast inside the loss."
    )
