"""Forward-mode differentiation of the inner loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.forward import slope_along
from metaopt.autodiff.pullback import choose, put, spread
from metaopt.differentiate.protocol import Given, InnerLoop, Result
from metaopt.differentiate.rerun import RerunRule
from metaopt.differentiate.steps import weigh_result


@dataclass(frozen=True)
class ForwardMode(RerunRule):
    """Exact derivative of the steps taken, Z_{t+1} = A_t Z_t + B_t, carried along with the steps.

    Z_t = d(w_t, s_t)/dl for everything l that is differentiated, m numbers in all; A_t and B_t are
    the derivatives of a step. For a cotangent v the result is Z_T' v. It is computed when v is
    known: the loop runs again, with m tangents batched by `vmap`. Nothing is stored from step to
    step, so memory does not grow with their number, but time and memory grow with m: this is for a
    few hyperparameters. The initial parameters count too, if they are differentiated.

    **Bias**: none. Differentiable again, any number of times; that records the batched run.

    Raises:
        ValueError: on the way back: an operator in the loss has no forward derivative, or a level
            below has a derivative in reverse mode alone.

    Cost:
        One run of the loop, and a second with m forward derivatives of each step. Memory: m copies
        of parameters and state.

    Reference:
        Franceschi, Donini, Frasconi, Pontil 2017, arXiv:1703.01785, section 3.2.
    """

    def pull_back(self, loop: InnerLoop, cotangents: Result, wanted: Given) -> Given:
        """Return Z_T' v."""
        given = loop.given()
        variables = choose(given, wanted)
        row = tree.ravel(variables)

        def value(variables: list[Tensor]) -> Tensor:
            return weigh_result(loop.starting_from(put(variables, given, wanted)), cotangents)

        def slope(direction: Tensor) -> Tensor:
            along = tree.unravel(direction, variables)
            asked, instead = "`ForwardMode`", "`Backprop()`"
            return slope_along(value, variables, along, asked=asked, instead=instead)[1]  # type: ignore[no-any-return]

        each = torch.eye(len(row), dtype=row.dtype, device=row.device)
        slopes = torch.func.vmap(slope, randomness="same")(each)
        return spread(tree.unravel(slopes, variables), given, wanted)  # type: ignore[no-any-return]
