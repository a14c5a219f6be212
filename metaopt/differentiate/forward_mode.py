"""Forward-mode differentiation of the inner loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.derivative import with_derivative
from metaopt.autodiff.forward import slope_along
from metaopt.autodiff.pullback import chosen, put, spread
from metaopt.autodiff.replay import Ambient
from metaopt.differentiate.base import InnerLoop, run, sources, starting_from, weighted_end
from metaopt.tree import Tree


@dataclass(frozen=True)
class ForwardMode:
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

    def __call__(self, loop: InnerLoop) -> tuple[Tree, Any, Tree]:
        given = sources(loop)

        def pull_back(_: Tree, given: Tree, cotangent: Tree, wanted: Tree) -> Tree:
            variables = chosen(given, wanted)
            row = tree.ravel(variables)

            def value(variables: list[Tensor]) -> Tensor:
                return weighted_end(starting_from(loop, put(variables, given, wanted)), cotangent)

            def along(direction: Tensor) -> Tensor:
                _, slope = slope_along(
                    value,
                    variables,
                    tree.unravel(direction, variables),
                    asked="`ForwardMode`",
                    instead="`Backprop()`",
                )
                return slope

            slopes = torch.func.vmap(along, randomness="same")(
                torch.eye(len(row), dtype=row.dtype, device=row.device)
            )
            return spread(tree.unravel(slopes, variables), given, wanted)

        ambient = Ambient.now(tree.leaves(given))
        return with_derivative(pull_back, run(starting_from(loop, given)), given, ambient)
