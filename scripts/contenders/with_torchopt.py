"""The comparisons in TorchOpt.

`MetaSGD` as in its MAML examples; the functional interface where rates are learned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn

from contenders import problems
from contenders.problems import next_byte_losses
from metaopt import tree
from metaopt.tasks.episode import Episode

Run = Callable[[], dict[str, Tensor]]


def sinusoid(problem: problems.Sinusoid) -> Run:
    return maml(problem.model(), problem.data(), F.mse_loss, problem)


def omniglot(problem: problems.Omniglot) -> Run:
    return maml(problem.model(), problem.data(), F.cross_entropy, problem)


def maml(
    model: nn.Module,
    tasks: Episode,
    criterion: Callable[..., Tensor],
    problem: problems.Sinusoid | problems.Omniglot,
) -> Run:
    """Adapt to one task after the other, each from the initial weights.

    The gradients of the query losses add up in the `.grad` of these.
    """
    inner = torchopt.MetaSGD(model, lr=problem.lr)
    start = dict(model.named_parameters())
    weights = torchopt.extract_state_dict(model, by="reference", detach_buffers=True)
    state = torchopt.extract_state_dict(inner, by="reference")

    def run() -> dict[str, Tensor]:
        for param in start.values():
            param.grad = None
        for index in range(problem.tasks):
            (x, y), (query_x, query_y) = tree.index(tasks, index)
            for _ in range(problem.steps):
                inner.step(criterion(model(x), y))
            (criterion(model(query_x), query_y) / problem.tasks).backward()
            torchopt.recover_state_dict(model, weights)
            torchopt.recover_state_dict(inner, state)
        return {name: param.grad for name, param in start.items() if param.grad is not None}

    return run


def many_tensors(problem: problems.ManyTensors) -> Run:
    model, ((x, y), (other_x, other_y)) = problem.model(), problem.data()
    inner = torchopt.MetaAdam(model, lr=problem.lr, eps=problem.eps)
    start = dict(model.named_parameters())
    weights = torchopt.extract_state_dict(model, by="reference", detach_buffers=True)
    state = torchopt.extract_state_dict(inner, by="reference")

    def run() -> dict[str, Tensor]:
        for _ in range(problem.steps):
            inner.step(F.mse_loss(model(x), y))
        found = torch.autograd.grad(F.mse_loss(model(other_x), other_y), list(start.values()))
        torchopt.recover_state_dict(model, weights)
        torchopt.recover_state_dict(inner, state)
        return dict(zip(start, found, strict=True))

    return run


def transformer(problem: problems.Transformer) -> Run:
    model, (train, validation) = problem.model(), problem.data()
    names = [name for name, _ in model.named_parameters()]
    rates = {name: rate.requires_grad_() for name, rate in problem.rates().items()}
    weights = problem.weights().requires_grad_()

    def scale(grads: Any, params: Any) -> Any:
        return tuple(-rate * grad for rate, grad in zip(rates.values(), grads, strict=True))

    def logits(params: tuple[Tensor, ...], text: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, params, strict=True)), (text,))

    def run() -> dict[str, Tensor]:
        inner = torchopt.FuncOptimizer(stateless(scale))
        params = tuple(model.parameters())
        for text, weight in zip(train, weights, strict=True):
            params = inner.step(
                (weight * next_byte_losses(logits(params, text), text)).mean(), params
            )
        value = next_byte_losses(logits(params, validation), validation).mean()
        *of_rates, of_weights = torch.autograd.grad(value, [*rates.values(), weights])
        return dict(zip(rates, of_rates, strict=True)) | {"weights": of_weights}

    return run


def stateless(update: Callable[[Any, Any], Any]) -> torchopt.base.GradientTransformation:
    """Return the transform that applies `update(grads, params)`."""
    return torchopt.base.GradientTransformation(
        lambda params: torchopt.base.EmptyState(),
        lambda grads, state, *, params=None, inplace=True: (update(grads, params), state),
    )
