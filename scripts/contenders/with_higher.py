"""The comparisons in higher, as its README writes them."""

from __future__ import annotations

from collections.abc import Callable

import higher
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contenders import problems
from contenders.problems import next_byte_losses
from metaopt import tree
from metaopt.tasks.episode import Episode

Run = Callable[[], dict[str, Tensor]]


def sinusoid(problem: problems.Sinusoid) -> Run:
    return maml(problem.model(), problem.data(), F.mse_loss, problem)


def omniglot(problem: problems.Omniglot, *, channels_last: bool = False) -> Run:
    model, tasks = problem.channels_last() if channels_last else (problem.model(), problem.data())
    return maml(model, tasks, F.cross_entropy, problem)


def maml(
    model: nn.Module,
    tasks: Episode,
    criterion: Callable[..., Tensor],
    problem: problems.Sinusoid | problems.Omniglot,
) -> Run:
    """Adapt to one task after the other; the query losses add up in the model's `.grad`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.lr)

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        for index in range(problem.tasks):
            (x, y), (query_x, query_y) = tree.index(tasks, index)
            with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (net, inner):
                for _ in range(problem.steps):
                    inner.step(criterion(net(x), y))
                (criterion(net(query_x), query_y) / problem.tasks).backward()
        return {
            name: param.grad for name, param in model.named_parameters() if param.grad is not None
        }

    return run


def transformer(problem: problems.Transformer) -> Run:
    model, (train, validation) = problem.model(), problem.data()
    optimizer = torch.optim.SGD(
        [{"params": [param]} for param in model.parameters()], lr=problem.lr
    )
    rates = {name: rate.requires_grad_() for name, rate in problem.rates().items()}
    weights = problem.weights().requires_grad_()

    def run() -> dict[str, Tensor]:
        with higher.innerloop_ctx(model, optimizer, override={"lr": list(rates.values())}) as (
            net,
            inner,
        ):
            for text, weight in zip(train, weights, strict=True):
                inner.step((weight * next_byte_losses(net(text), text)).mean())
            value = next_byte_losses(net(validation), validation).mean()
            *of_rates, of_weights = torch.autograd.grad(value, [*rates.values(), weights])
        return dict(zip(rates, of_rates, strict=True)) | {"weights": of_weights}

    return run


def many_tensors(problem: problems.ManyTensors) -> Run:
    """Tell its Adam another eps at every step.

    Its eps is torch's, but without the correction of the bias.
    """
    model, ((x, y), (other_x, other_y)) = problem.model(), problem.data()
    optimizer = torch.optim.Adam(model.parameters(), problem.lr, eps=problem.eps)
    _, beta2 = optimizer.defaults["betas"]

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (net, inner):
            for t in range(1, problem.steps + 1):
                eps = problem.eps * (1 - beta2**t) ** 0.5
                inner.step(F.mse_loss(net(x), y), override={"eps": [eps]})
            F.mse_loss(net(other_x), other_y).backward()
        return {name: param.grad for name, param in model.named_parameters()}

    return run
