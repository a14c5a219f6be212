"""The comparisons in metaopt."""

from __future__ import annotations

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt as mo
import optimizers
from contenders import problems
from contenders.attention import Attention, gradient_of_gradient
from contenders.large_model import SQUARE_BEFORE, STEPS_BEFORE, Scale
from contenders.optimizer_steps import OptimizerSteps
from contenders.problems import next_byte_losses
from contenders.quadratics import Bilevel
from contenders.short_steps import Descent, TrainerLoop
from metaopt import tree
from metaopt._functional import Functional, Params
from metaopt.differentiate import Rule
from metaopt.exact_ops import any_order
from metaopt.tasks.episode import Episode
from optimizers import SGD, Adam, AdamW, Grouped, LSTMOptimizer

Run = Callable[[], dict[str, Tensor]]


def sinusoid(problem: problems.Sinusoid, *, compile: bool = False) -> Run:
    net, tasks = mo.functional(problem.model()), problem.data()
    meta_gradient = mo.meta_grad(
        maml_loss(net, F.mse_loss, problem.lr, problem.steps), compile=compile
    )
    return lambda: meta_gradient(net.params, tasks)[0]


def omniglot(
    problem: problems.Omniglot,
    *,
    compile: bool = False,
    chunk_size: int | None = 1,
    channels_last: bool = True,
) -> Run:
    """Compile a step of the inner loop.

    The evaluation on many queries is fastest with torch's own kernels.
    """
    model, tasks = problem.channels_last() if channels_last else (problem.model(), problem.data())
    net = mo.functional(model)
    task_loss = maml_loss(net, F.cross_entropy, problem.lr, problem.steps, compile=compile)
    meta_gradient = mo.meta_grad(task_loss, chunk_size=chunk_size)
    return lambda: meta_gradient(net.params, tasks)[0]


def maml_loss(
    net: Functional, criterion: Callable[..., Tensor], lr: float, steps: int, **options: Any
) -> Callable[[Params, Episode], Tensor]:
    """Return the query loss after gradient steps on the support set."""

    def loss(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return criterion(net(params, x), y)

    def task_loss(params: Params, task: Episode) -> Tensor:
        return loss(
            mo.minimize(loss, SGD(lr), params, task.support, steps=steps, **options).params,
            task.query,
        )

    return task_loss


def lstm(problem: problems.LSTM, *, memory: Any = "full", **options: Any) -> Run:
    net, data, optimizer = (
        mo.functional(problem.model()),
        problem.data(),
        LSTMOptimizer(problem.hidden),
    )
    start = {name: param.detach() for name, param in net.params.items()}
    weights = dict(optimizer.named_parameters())

    def loss(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(net(params, x), y)

    def run() -> dict[str, Tensor]:
        out = mo.minimize(
            loss, optimizer, start, data, differentiate=mo.FirstOrder(memory=memory), **options
        )
        return dict(
            zip(weights, torch.autograd.grad(out.losses.sum(), list(weights.values())), strict=True)
        )

    return run


def meta_training(problem: problems.MetaTraining, *, compile: bool = False) -> Run:
    learned, family = LSTMOptimizer(problem.size), problem.family()
    theta = {name: param.detach() for name, param in learned.named_parameters()}
    estimator: mo.Estimator = mo.FullUnroll(problem.tasks, compile=compile)
    if problem.estimator == "nres":
        estimator = mo.NRES(
            problem.std, problem.tasks, window=problem.steps, stagger=False, compile=compile
        )
    weights = torch.full((problem.tasks,), 1 / problem.tasks)

    def run() -> dict[str, Tensor]:
        generator = problem.generator()
        estimate = estimator(learned, theta, family, problem.steps, estimator.init(), generator)
        return estimate.weighted_sum(weights)

    return run


def transformer(problem: problems.Transformer, *, memory: Any = "full", **options: Any) -> Run:
    net, (train, validation) = mo.functional(problem.model()), problem.data()
    start = {name: param.detach() for name, param in net.params.items()}
    rates = {name: nn.Parameter(rate) for name, rate in problem.rates().items()}
    optimizer = Grouped({name: SGD(rate) for name, rate in rates.items()})
    weights = problem.weights().requires_grad_()
    rule: Rule = mo.Backprop(memory=memory)

    def loss(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        text, weight = batch
        return (weight * next_byte_losses(net(params, text), text)).mean()

    def run() -> dict[str, Tensor]:
        params = mo.minimize(
            loss, optimizer, start, (train, weights), differentiate=rule, **options
        ).params
        value = next_byte_losses(net(params, validation), validation).mean()
        *of_rates, of_weights = torch.autograd.grad(value, [*rates.values(), weights])
        return dict(zip(rates, of_rates, strict=True)) | {"weights": of_weights}

    return run


def meta_weight_net(problem: problems.MetaWeightNet, *, compile: bool = False) -> Run:
    noisy, clean = problem.data()

    def learner_loss(levels: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return problems.weighted_loss(
            F.cross_entropy(levels.learner(x), y, reduction="none"), levels.weights
        )

    def meta_loss(levels: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(levels.learner(x), y)

    learner = mo.Level(
        "learner",
        problem.model(),
        learner_loss,
        SGD(problem.lr, momentum=problem.momentum),
        data=[noisy],
    )
    weights = mo.Level(
        "weights", problem.weights(), meta_loss, Adam(problem.outer_lr), data=[clean]
    )
    rule = mo.FiniteDifference(problem.radius)
    graph = mo.LevelGraph(
        [mo.Edge(upper=weights, lower=learner, differentiate=rule)], compile=compile
    )
    return hypergradients(graph, "weights")


def trainer(problem: TrainerLoop, *, by_hand: bool = False) -> Run:
    """Make all steps by a `Trainer` with a checkpoint, or in one line that keeps the losses."""
    training = Descent(problem)
    start = training.state_dict()

    def run() -> dict[str, Tensor]:
        training.load_state_dict(start)
        if by_hand:
            _ = [float(training.step()["loss"]) for _ in range(problem.steps)]
        else:
            with TemporaryDirectory() as folder:
                mo.Trainer(
                    training,
                    max_steps=problem.steps,
                    checkpoint=folder,
                    checkpoint_every=problem.steps,
                    progress=False,
                ).fit()
        return training.state_dict()

    return run


def scale(problem: Scale) -> Run:
    noisy, clean = problem.data()

    def learner_loss(levels: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        words, y = batch
        return problems.weighted_loss(
            F.cross_entropy(levels.learner(words), y, reduction="none"), levels.weights
        )

    def meta_loss(levels: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        words, y = batch
        return F.cross_entropy(levels.learner(words), y)

    rules = {
        "darts": mo.FiniteDifference(problem.radius),
        "sama": mo.SAMA(problem.radius, at="last"),
    }
    rule = rules[problem.rule]
    learner = mo.Level("learner", problem.model(), learner_loss, AdamW(problem.lr), data=[noisy])
    weights = mo.Level(
        "weights", problem.weights(), meta_loss, Adam(problem.outer_lr), data=[clean]
    )
    graph = mo.LevelGraph([mo.Edge(upper=weights, lower=learner, differentiate=rule)])
    first = {name: graph.params(name) for name in ("learner", "weights")}

    def run() -> dict[str, Tensor]:
        # In place, as the sides by hand do it: a second state to load would be a second model.
        states = graph._states
        levels = {"weights": states["weights"], "learner": states["weights"]["below"]["learner"]}
        with torch.no_grad():
            for name, state in levels.items():
                tree.map(Tensor.copy_, state["params"], first[name])
                tree.map(Tensor.zero_, state["optimizer"])
            past = levels["learner"]["optimizer"]
            past["step"].fill_(STEPS_BEFORE)
            tree.map(lambda square: square.fill_(SQUARE_BEFORE), past["slots"]["square"])
        graph.step()
        memory = graph._states["weights"]["optimizer"]["slots"]["mean"]
        return {name: mean / (1 - 0.9) for name, mean in memory.items()}  # Adam's beta1

    return run


def imaml(problem: problems.IMAML, *, compile: bool = False) -> Run:
    task = problem.data()

    def task_loss(levels: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        distance = problem.distance(levels.learner.params.values(), levels.initial.params.values())
        return F.mse_loss(levels.learner(x), y) + distance

    def meta_loss(levels: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(levels.learner(x), y)

    learner = mo.Level("learner", problem.model(), task_loss, SGD(problem.lr), data=[task.support])
    initial = mo.Level(
        "initial", problem.model(), meta_loss, Adam(problem.outer_lr), data=[task.query]
    )
    rule = mo.Implicit(mo.ConjugateGradient(max_steps=problem.cg_steps, rtol=0.0))
    edge = mo.Edge(
        upper=initial, lower=learner, steps=problem.steps, start="upper", differentiate=rule
    )
    return hypergradients(mo.LevelGraph([edge], compile=compile), "initial")


def logistic_regression(problem: problems.LogisticRegression) -> Run:
    train, validation = problem.data()

    def train_loss(levels: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        model = levels.model
        return problems.decayed_loss(model(x), y, model.params["w"], levels.decay.params["w"])

    def validation_loss(levels: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.binary_cross_entropy_with_logits(levels.model(x), y)

    # Betty's Neumann series has one term more than products
    rule: Rule = {
        "darts": mo.FiniteDifference(problem.radius),
        "cg": mo.Implicit(mo.ConjugateGradient(max_steps=problem.products, rtol=0.0)),
        "neumann": mo.Implicit(mo.Neumann(problem.alpha, terms=problem.products + 1)),
    }[problem.rule]
    model = mo.Level("model", problem.model(), train_loss, SGD(problem.lr), data=[train])
    decay = mo.Level(
        "decay", problem.decay(), validation_loss, Adam(problem.outer_lr), data=[validation]
    )
    edge = mo.Edge(
        upper=decay, lower=model, steps=problem.steps, start="restart", differentiate=rule
    )
    return hypergradients(mo.LevelGraph([edge]), "decay")


def bilevel(problem: Bilevel, *, rule: str) -> Run:
    """One step, which stays at the solution; backpropagation goes through several such steps."""
    lower, upper, start, x = problem.data()
    x.requires_grad_()
    products, rank, ends = problem.products, problem.rank, {"rtol": 1e-9}
    middle = problem.condition**-0.5  # of the eigenvalues
    rules: dict[str, Rule] = {
        "CG": mo.Implicit(mo.ConjugateGradient(products, rtol=0.0)),
        "GMRES": mo.Implicit(mo.GMRES(products, **ends)),
        "BiCGStab": mo.Implicit(mo.BiCGStab(products, **ends)),
        "NystromCG": mo.Implicit(mo.NystromCG(products, **ends, rank=rank)),
        "Direct": mo.Implicit(mo.Direct()),
        "Neumann": mo.Implicit(mo.Neumann(problem.lr, products)),
        "Nystrom": mo.Implicit(mo.Nystrom(rank, damping=middle)),
        "Backprop": mo.Backprop(),
        "Backprop, truncated": mo.Backprop(),
        "T1T2": mo.T1T2(scale="lr"),
        "FiniteDifference": mo.FiniteDifference(scale="lr"),
        "SAMA": mo.SAMA(),
    }
    steps = {"Backprop": products, "Backprop, truncated": problem.window}.get(rule, 1)

    def loss(z: Tensor, batch: None, x: Tensor) -> Tensor:
        return lower(z, x)

    def run() -> dict[str, Tensor]:
        out = mo.minimize(
            loss, SGD(problem.lr), start, None, steps=steps, meta=x, differentiate=rules[rule]
        )
        return {"w": torch.autograd.grad(upper(out.params, x), x)[0]}

    return run


def hypergradients(graph: mo.LevelGraph, level: str) -> Run:
    """Return a run that makes the first step of the graph.

    It returns the gradient with which Adam moved the level's parameters.
    """
    start, decay = tree.leaves(graph.state_dict()["levels"]), 0.9  # Adam's beta1

    def run() -> dict[str, Tensor]:
        with torch.no_grad():  # in place, as the sides by hand do it
            torch._foreach_copy_(tree.leaves(graph._states), start)
        graph.step()
        means = graph._states[level]["optimizer"]["slots"]["mean"]
        return {name: mean / (1 - decay) for name, mean in means.items()}

    return run


def many_tensors(problem: problems.ManyTensors) -> Run:
    net, (train, validation) = mo.functional(problem.model()), problem.data()

    def loss(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(net(params, x), y)

    def run() -> dict[str, Tensor]:
        adam = Adam(problem.lr, eps=problem.eps)
        out = mo.minimize(loss, adam, net.params, train, steps=problem.steps)
        found = torch.autograd.grad(loss(out.params, validation), list(net.params.values()))
        return dict(zip(net.params, found, strict=True))

    return run


def optimizer_steps(problem: OptimizerSteps, *, name: str, **options: Any) -> Run:
    params, loss = dict(problem.model().named_parameters()), torch.ones(())
    optimizer = mo.with_steps(getattr(optimizers, name)(**options), 10**6)
    deployed = optimizer.as_torch(params.values())

    def run() -> dict[str, Tensor]:
        deployed.step(loss=loss)
        return params

    return run


def attention(problem: Attention) -> Run:
    """As in a loss, which runs in `any_order`."""
    inputs, mask = problem.data(), problem.mask()

    def run() -> dict[str, Tensor]:
        with any_order():
            return gradient_of_gradient(problem, inputs, mask)

    return run
