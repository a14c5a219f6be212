"""The comparisons with Betty's engine, in the classes it asks for; version 0.2.1, the last one."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from betty import hypergradient
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.hypergradient import utils
from betty.problems import ImplicitProblem
from torch import Tensor, nn

from contenders import problems
from contenders.by_hand import Run, again_and_again
from contenders.large_model import Scale, adam_slopes, age
from contenders.quadratics import Bilevel

BATCHES = 1000  # in its data loader, which is begun again when it ends


class AdamW(torch.optim.AdamW):
    """Takes all its defaults as arguments, with which the engine makes it anew."""

    def __init__(self, *args: Any, decoupled_weight_decay: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)


def meta_weight_net(problem: problems.MetaWeightNet) -> Run:
    """One step of the engine, with its rule "darts"."""
    noisy, clean = problem.data()

    class Lower(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return problems.weighted_loss(
                F.cross_entropy(self.module(x), y, reduction="none"), self.upper.module
            )

    class Upper(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.lower.module(x), y)

    model, weights = problem.model(), problem.weights()
    inner = torch.optim.SGD(model.parameters(), problem.lr, momentum=problem.momentum)
    config = Config(type="darts", darts_alpha=problem.radius)
    lower = Lower("lower", config, model, inner, train_data_loader=[noisy] * BATCHES)
    return hypergradients(lower, upper_problem(Upper, weights, problem.outer_lr, clean), 1)


def scale(problem: Scale) -> Run:
    """One step of the engine, with its rule "darts" or "sama"."""
    mend_preconditioner()
    noisy, clean = problem.data()

    class Lower(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return problems.weighted_loss(
                F.cross_entropy(self.module(x), y, reduction="none"), self.upper.module
            )

    class Upper(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.lower.module(x), y)

    model, weights = problem.model(), problem.weights()
    params = [param for param in model.parameters() if param.requires_grad]
    model.parameters = lambda recurse=True: iter(params)  # it would differentiate in frozen ones
    inner = AdamW(params, problem.lr, foreach=True)
    config = Config(type=problem.rule, darts_alpha=problem.radius, sama_adam_alpha=problem.radius)
    lower = Lower("lower", config, model, inner, train_data_loader=[noisy] * BATCHES)
    upper = upper_problem(Upper, weights, problem.outer_lr, clean)
    return hypergradients(lower, upper, 1, lambda: age([*lower.optimizer.state.values()]))


def imaml(problem: problems.IMAML) -> Run:
    """As in its example, with its rule "cg"."""
    mend_conjugate_gradients()
    task = problem.data()

    class Lower(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            distance = problem.distance(self.module.parameters(), self.upper.module.parameters())
            return F.mse_loss(self.module(x), y) + distance

        def on_inner_loop_start(self) -> None:
            self.module.load_state_dict(self.upper.module.state_dict())

    class Upper(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return F.mse_loss(self.lower.module(x), y)

    model = problem.model()
    inner = torch.optim.SGD(model.parameters(), problem.lr)
    config = Config(type="cg", unroll_steps=problem.steps, cg_iterations=problem.cg_steps)
    lower = Lower("lower", config, model, inner, train_data_loader=[task.support] * BATCHES)
    upper = upper_problem(Upper, problem.model(), problem.outer_lr, task.query)
    return hypergradients(lower, upper, problem.steps)


def logistic_regression(problem: problems.LogisticRegression) -> Run:
    """As in its example."""
    mend_conjugate_gradients()
    train, validation = problem.data()

    class Lower(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return problems.decayed_loss(self.module(x), y, self.module.w, self.upper.module.w)

        def on_inner_loop_start(self) -> None:
            self.module.w.data.zero_()

    class Upper(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return F.binary_cross_entropy_with_logits(self.lower.module(x), y)

    model = problem.model()
    inner = torch.optim.SGD(model.parameters(), problem.lr)
    config = Config(
        type=problem.rule,
        unroll_steps=problem.steps,
        darts_alpha=problem.radius,
        cg_iterations=problem.products,
        neumann_iterations=problem.products,
        neumann_alpha=problem.alpha,
    )
    lower = Lower("lower", config, model, inner, train_data_loader=[train] * BATCHES)
    upper = upper_problem(Upper, problem.decay(), problem.outer_lr, validation)
    return hypergradients(lower, upper, problem.steps)


def bilevel(problem: Bilevel, *, rule: str) -> Run:
    """One step of the engine, which stays at the solution, with its rule "cg" or "neumann"."""
    mend_conjugate_gradients()
    lower_loss, upper_loss, z, x = problem.data()

    class Lower(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return lower_loss(self.module.w, self.upper.module.w)

    class Upper(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return upper_loss(self.lower.module.w, self.module.w)

    model = problems.Vector(z)
    inner = torch.optim.SGD(model.parameters(), problem.lr)
    config = Config(
        type=rule,
        cg_iterations=problem.products,
        neumann_iterations=problem.products - 1,  # its series has one term more
        neumann_alpha=problem.lr,
    )
    nothing = torch.empty(0)
    lower = Lower("lower", config, model, inner, train_data_loader=[nothing] * BATCHES)
    upper = upper_problem(Upper, problems.Vector(x), problem.outer_lr, nothing)
    return hypergradients(lower, upper, 1)


def upper_problem(
    kind: type[ImplicitProblem], model: nn.Module, lr: float, batch: Any
) -> ImplicitProblem:
    """Return the upper problem, which steps with Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    loader = [batch] * BATCHES
    return kind("upper", Config(retain_graph=True), model, optimizer, train_data_loader=loader)


def hypergradients(
    lower: ImplicitProblem,
    upper: ImplicitProblem,
    steps: int,
    prepare: Callable[[], None] = lambda: None,
) -> Run:
    """Return a run of the engine's steps up to and including one of the upper problem."""
    logging.disable(logging.INFO)
    engine = Engine(
        problems=[lower, upper],
        config=EngineConfig(strategy="cpu"),
        dependencies={"u2l": {upper: [lower]}, "l2u": {lower: [upper]}},
    )
    engine.train()

    def step() -> None:
        for _ in range(steps):
            engine.train_step()

    above = dict(upper.module.named_parameters())
    below = list(lower.module.parameters())
    # the engine replaces the optimizers that it is given by others of the same class
    return again_and_again(step, above, below, lower.optimizer, upper.optimizer, prepare)


def mend_conjugate_gradients() -> None:
    """Put r_(k+1) in the place of r_k in p_(k+1) = r_(k+1) + beta p_k of its rule "cg".

    Without it, the method is wrong from its second iteration on: after n of them, in n = 6
    dimensions, the solution is off by a third of its norm. The time is the same.
    """
    source = inspect.getsource(hypergradient.cg)
    wrong = "rr + beta * pp for rr, pp in zip(r, p)"
    if source.count(wrong) != 1:
        raise ValueError(f"Betty's `cg` is not the one of version 0.2.1: it lacks {wrong!r}.")
    scope = dict(vars(inspect.getmodule(hypergradient.cg)))
    exec(source.replace(wrong, wrong.replace("zip(r,", "zip(r_new,")), scope)
    hypergradient.jvp_fn_mapping["cg"] = scope["cg"]


def mend_preconditioner() -> None:
    """Put the derivative of Adam's update in the place of what its rule "sama" takes for it.

    That has no correction of the bias. Both are of the last update, whose gradient it has kept.
    """

    def precondition(vectors: Sequence[Tensor], problem: Any) -> list[Tensor]:
        params = problem.meta_trainable_parameters()
        memory = [problem.get_opt_state_for_param(param) for param in params]
        grads = [state["last_grad"] for state in memory]
        group = problem.get_opt_param_group_for_param(params[0])
        pairs = zip(vectors, adam_slopes(grads, memory, group), strict=True)
        return [-slope.mul_(v) for v, slope in pairs]

    utils.precondition_fn_mapping["adam"] = precondition
