"""The derivative of the inner loop estimated from its values alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.pullback import choose, put, spread
from metaopt.checks import check_count, check_positive
from metaopt.differentiate.protocol import Given, InnerLoop, Result
from metaopt.differentiate.rerun import RerunRule
from metaopt.differentiate.steps import weigh_result
from metaopt.transforms import outside_transforms
from metaopt.tree import Tree


@dataclass
class _Count:
    made: int = 0


@dataclass(frozen=True)
class EvolutionStrategy(RerunRule):
    """Estimate J' v by the mean over pairs of e <v, r(l + std e) - r(l - std e)> / (2 std).

    The noise is e ~ N(0, I).

    J is the derivative of the loop's result r(l) in everything l that is differentiated. The outer
    loss is differentiated as usual; v is its gradient. All runs see the same batches and the same
    random numbers. A pair that is not finite is left out of the mean; if none is left, the result
    is nan.

    **Bias**: an unbiased estimate of the derivative of the smoothed r, E r(l + std e): off by std^2
    / 2 times the gradient of the
    Laplacian of <v, r>. **Variance**, for g = J' v: (|g|^2 + g_i^2) / pairs in entry i: more pairs
    are needed than l has entries. Differentiable again if the loop is: the derivative of this
    estimate, with the same e.

    Where the loop runs again (a rebuilt step of a loop around it, the two sides of a finite
    difference) it draws other e: still unbiased, but `FiniteDifference` and `SAMA` above it
    multiply its noise by 1 / radius.

    Args:
        std: size of the perturbations.
        pairs: number of antithetic pairs.
        seed: of e. The n-th backward pass of this object draws the n-th block of what belongs to
            the seed. That n is no part of the rule's value: rules are equal if they are given the
            same numbers, and a copy made by `dataclasses.replace` begins again.

    Raises:
        ValueError: `std` or `pairs` is not positive, or `seed` no integer.

    Cost:
        One run of the loop, and 2 pairs runs batched by `vmap`, without a graph and without the
        derivative of a step.

    Reference:
        Salimans et al. 2017, arXiv:1703.03864, section 2; Nesterov, Spokoiny 2017,
        doi:10.1007/s10208-015-9296-2.
    """

    std: float = 0.01
    pairs: int = 16
    seed: int = field(default=0, kw_only=True)
    _draws: _Count = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_positive(self, "std", self.std)
        check_count(self, "pairs", self.pairs)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"EvolutionStrategy: `seed` must be an integer, got {self.seed!r}.")
        object.__setattr__(self, "_draws", _Count())

    @property
    def draws(self) -> int:
        """Number of blocks of noise that this object has drawn."""
        return self._draws.made

    def wind_to(self, draws: int) -> None:
        """Go on as if this object had drawn `draws` blocks."""
        self._draws.made = draws

    def pull_back(self, loop: InnerLoop, cotangents: Result, wanted: Given) -> Given:
        """Return the estimate of J' v, with noise that no other pullback draws."""
        given = loop.given()
        variables = choose(given, wanted)
        row = tree.ravel(variables)
        noise = self._draw(row)

        # Every run has a state of its own, for what is updated in place, as running statistics are.
        def repeat(leaf: Any) -> Any:
            return leaf.expand(2 * self.pairs, *leaf.shape) if isinstance(leaf, Tensor) else leaf

        def value(row: Tensor, state: Tree) -> Tensor:
            there = put(tree.unravel(row, variables), given._replace(state=state), wanted)
            return weigh_result(loop.starting_from(there), cotangents)

        rows = torch.cat([row + self.std * noise, row - self.std * noise])
        try:
            values = torch.func.vmap(value, randomness="same")(rows, tree.map(repeat, given.state))
        except RuntimeError as error:
            if "setup_context" not in str(error) and not str(error).startswith("vmap:"):
                raise
            raise ValueError(
                "`EvolutionStrategy` runs the loop for all pairs at once by `vmap`, which "
                "something in the loss does not allow: "
                f"{str(error).strip().splitlines()[0]} Use `Backprop()` or `FirstOrder()`."
            ) from error
        ahead, behind = values[: self.pairs], values[self.pairs :]
        slopes = (ahead - behind) / (2 * self.std)
        finite = slopes.isfinite()
        weights = (torch.where(finite, slopes, 0) / finite.sum()).to(noise.dtype)
        estimate = weights @ noise
        return spread(tree.unravel(estimate, variables), given, wanted)  # type: ignore[no-any-return]

    def _draw(self, like: Tensor) -> Tensor:
        """Return [pairs, n] standard normal numbers, the same for every element of a `vmap`."""
        # torch's generator takes 32 bits
        block = hashlib.sha256(f"{self.seed}, {self._draws.made}".encode()).digest()[:4]
        self._draws.made += 1
        with outside_transforms():
            generator = torch.Generator().manual_seed(int.from_bytes(block))
            return torch.randn(self.pairs, len(like), dtype=like.dtype, generator=generator).to(
                like.device
            )
