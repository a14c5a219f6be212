"""Trainings whose examples have weights, and the scores that `data_attribution.py` compares."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

import metaopt as mo
from metaopt import tree
from metaopt._functional import Params
from metaopt.tree import Tree

PART = 10  # steps of training between two checkpoints


class Problem(NamedTuple):
    """A training whose examples have weights, and test examples."""

    net: mo.Functional
    params: Params
    optimizer: mo.Optimizer
    order: Tensor  # [steps, batch], rows of the examples
    examples: tuple[Tensor, Tensor]
    tests: tuple[Tensor, Tensor]
    weight_decay: float

    def losses(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """Return the cross-entropy of each example, [n]; of a passage the mean."""
        logits = self.net(params, x)
        found = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none")
        return found.view(len(x), -1).mean(1)

    def loss(self, params: Params, rows: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted mean loss of some examples, and the decay."""
        x, y = self.examples
        loss = (weights[rows] * self.losses(params, x[rows], y[rows])).mean()
        if not self.weight_decay:
            return loss
        return loss + self.weight_decay / 2 * tree.ravel(params).square().sum()

    def train(self, weights: Tensor, rule: mo.Rule = mo.Backprop()) -> Params:  # noqa: B008
        """Return the last parameters of the training with these weights, [examples]."""
        return mo.minimize(
            self.loss, self.optimizer, self.params, self.order, meta=weights, differentiate=rule
        ).params

    def test_losses(self, params: Params, rows: Tensor) -> Tensor:
        """Return the loss of each of some test examples."""
        return self.losses(params, self.tests[0][rows], self.tests[1][rows])


class Part:
    """A part of the work, in steps, with a state that says how far it is.

    Args:
        state: what a step changes.
    """

    def __init__(self, **state: Any):
        self.now: dict[str, Any] = {"step": 0, "seconds": 0.0, **state}

    def step(self) -> dict[str, float]:
        started = time.process_time()
        changed, metrics = self.advance(self.now["step"])
        seconds = self.now["seconds"] + time.process_time() - started
        self.now = {"step": self.now["step"] + 1, "seconds": seconds, **changed}
        return metrics

    def advance(self, step: int) -> tuple[dict[str, Any], dict[str, float]]:
        """Return the new state, and what is to be shown."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return self.now

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.now = {name: state[name] for name in self.now}


class Retraining(Part):
    """Trains with many weights side by side, `PART` steps at a time."""

    def __init__(self, problem: Problem, weights: Tensor):
        self.problem, self.weights = problem, weights
        start = {
            "params": tree.map(Tensor.detach, problem.params),
            "opt_state": problem.optimizer.init(problem.params),
        }
        copies = len(weights)
        super().__init__(**tree.map(lambda leaf: leaf.expand(copies, *leaf.shape).clone(), start))

    def advance(self, step: int) -> tuple[dict[str, Any], dict[str, float]]:
        problem = self.problem
        rows = problem.order[step * PART : (step + 1) * PART]

        def train(params: Tree, state: Tree, weights: Tensor) -> tuple[Tree, Tree, Tensor]:
            out = mo.minimize(
                problem.loss, problem.optimizer, params, rows, meta=weights, opt_state=state
            )
            return out.params, out.opt_state, out.losses[-1]

        params, state, losses = vmap(train)(self.now["params"], self.now["opt_state"], self.weights)
        return {"params": params, "opt_state": state}, {"loss": losses.mean().tolist()}


def metagradients(problem: Problem, rule: mo.Rule, rows: Tensor) -> Tensor:
    """Return d(test loss) / d(weights) through the training, for some tests, [rows, examples]."""
    weights = torch.ones(len(problem.examples[0]), requires_grad=True)
    losses = problem.test_losses(problem.train(weights, rule), rows)
    # One backward pass with a cotangent for each test; no graph of it, as `torch.func.grad` keeps.
    found = torch.autograd.grad(losses, weights, torch.eye(len(rows)), is_grads_batched=True)
    return found[0]


def approximate(problem: Problem, params: Params, solver: Any, rows: Tensor) -> Tensor:
    """Return the same with the last parameters in place of the training."""
    every = torch.arange(len(problem.examples[0]))

    def test_loss(weights: Tensor, row: Tensor) -> Tensor:
        w = mo.implicit(problem.loss, params, every, meta=weights, solver=solver)
        return problem.test_losses(w, row[None])[0]

    return vmap(grad(test_loss), (None, 0))(torch.ones(len(every)), rows)  # type: ignore[no-any-return]


class Attribution(Part):
    """Scores the training examples for the test examples, some of these at a time.

    Args:
        score: rows of the tests -> scores [rows, examples].
        tests: number of test examples.
        at_once: those of a step.
    """

    def __init__(self, score: Callable[[Tensor], Tensor], tests: int, at_once: int):
        super().__init__(scores=[])
        self.score, self.parts = score, torch.arange(tests).split(at_once)

    def advance(self, step: int) -> tuple[dict[str, Any], dict[str, float]]:
        scores = self.score(self.parts[step])
        return {"scores": [*self.now["scores"], scores]}, {"size": scores.abs().mean().tolist()}


def approximations(
    problem: Problem, params: Params, products: int, dampings: tuple[float, ...], seed: int
) -> dict[str, list[Any]]:
    """Return the rules and solvers that stand for the training, each with its grid.

    Args:
        problem: the training.
        params: the last parameters.
        products: Hessian products of a solver.
        dampings: the grid.
        seed: of what the solvers draw.
    """
    net, x = problem.net, problem.examples[0]
    factors = {
        corrected: mo.KroneckerFactors(
            net, params, x, corrected=corrected, draws=4, chunk_size=64, seed=seed
        )
        for corrected in (False, True)
    }
    largest = largest_eigenvalue(problem, params)
    each: dict[str, Callable[[float], Any]] = {
        "CG": lambda d: mo.ConjugateGradient(products, damping=d),
        "EKFAC + CG": lambda d: mo.KFACCG(max(products // 3, 1), factors=factors[True], damping=d),
        "EKFAC": lambda d: mo.KFAC(factors[True], damping=d),
        "KFAC": lambda d: mo.KFAC(factors[False], damping=d),
        "Nystrom": lambda d: mo.Nystrom(products, seed=seed, damping=d),
        "Neumann": lambda d: mo.Neumann(1 / (largest + d), products, damping=d),
    }
    found: dict[str, list[Any]] = {
        name: [make(damping) for damping in dampings] for name, make in each.items()
    }
    return found | {"T1 - T2": [mo.T1T2()]}


def largest_eigenvalue(problem: Problem, params: Params, steps: int = 20) -> float:
    """Return about the largest eigenvalue of the Hessian, by power iteration."""
    rows, weights = torch.arange(len(problem.examples[0])), torch.ones(len(problem.examples[0]))
    gradient = grad(lambda v: problem.loss(tree.unravel(v, params), rows, weights))
    at = tree.ravel(params)
    v = torch.randn(at.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        v = torch.func.jvp(gradient, (at,), (v / v.norm(),))[1]
    return v.norm().tolist()
