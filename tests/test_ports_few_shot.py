"""Few-shot programs of others, ported as examples.

Their meta-gradients against plain torch by hand, and finite differences.
"""

from __future__ import annotations

import importlib.util
from functools import partial, reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close
from torch import Tensor, nn

import metaopt as mo
from metaopt.tasks.episode import Episode
from optimizers import SGD, MetaCurvature, PerParameter, PerStep

pytestmark = pytest.mark.usefixtures("float64")


def load(name: str) -> Any:
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"ported_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_slopes(
    value: Any, params: Any, tensors: dict[str, Tensor], found: dict[str, Tensor], tolerance: float
) -> None:
    """Compare gradients with central differences of `value(params)`.

    They are along a random direction in each tensor.
    """
    for name, tensor in tensors.items():
        direction, ends = torch.randn_like(tensor), []
        for sign in (1, -1):
            with torch.no_grad():
                tensor.add_(sign * 1e-7 * direction)
                ends.append(value(params))
                tensor.sub_(sign * 1e-7 * direction)
        assert_close((found[name] * direction).sum(), (ends[0] - ends[1]) / 2e-7, tolerance)


def maml_plus_plus_by_hand(
    program: Any, model: nn.Module, params: Any, rates: Any, tasks: Any, first_order: bool
) -> Any:
    """Return (the mean over tasks, the running statistics of each).

    There is one plain loop over tasks and one over steps.
    """
    losses, statistics = [], []
    (support, query), weights = tasks
    for index in range(len(weights)):
        fast, rows = dict(params), {name: buffer.clone() for name, buffer in model.named_buffers()}

        def logits(fast: Any, x: Tensor, t: int, rows: Any) -> Tensor:
            for layer in range(2):
                x = F.conv2d(
                    x, fast[f"convs.{layer}.weight"], fast[f"convs.{layer}.bias"], padding=1
                )
                mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
                if rows is not None:
                    rows[f"norms.{layer}.mean"][t] = (
                        0.9 * rows[f"norms.{layer}.mean"][t] + 0.1 * mean.detach()
                    )
                    wide = x.detach().var((0, 2, 3), correction=1)
                    rows[f"norms.{layer}.var"][t] = 0.9 * rows[f"norms.{layer}.var"][t] + 0.1 * wide
                x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
                x = (
                    x * params[f"norms.{layer}.scale"][t][:, None, None]
                    + params[f"norms.{layer}.shift"][t][:, None, None]
                )
                x = F.max_pool2d(F.relu(x), 2)
            return F.linear(x.flatten(1), fast["head.weight"], fast["head.bias"])

        total = 0.0
        for t in range(program.ADAPT):
            loss = F.cross_entropy(logits(fast, support[0][index], t, rows), support[1][index])
            moving = [name for name in params if "norms" not in name]
            grads = torch.autograd.grad(
                loss, [fast[name] for name in moving], create_graph=not first_order
            )
            for name, grad in zip(moving, grads, strict=True):
                place = next(
                    i for i, layer in enumerate(program.LAYERS) if name.startswith(layer[:-1])
                )
                fast[name] = fast[name] - rates[place][t] * grad
            total = total + weights[index][t] * F.cross_entropy(
                logits(fast, query[0][index], t, None), query[1][index]
            )
        losses.append(total)
        statistics.append(rows)
    return torch.stack(losses).mean(), statistics


def maml_plus_plus(program: Any, monkeypatch: Any) -> tuple[nn.Module, SGD, Any]:
    monkeypatch.setattr(program, "FILTERS", 3)
    model = program.Network(program.ADAPT)
    for norm in model.norms:
        nn.init.normal_(norm.scale, 1, 0.1)
        nn.init.normal_(norm.shift, 0, 0.1)
    inner = SGD(
        lr={
            layer: PerStep(nn.Parameter(torch.rand(program.ADAPT) * 0.2))
            for layer in program.LAYERS
        }
    )
    images = torch.rand(2, 2, 10, 1, 8, 8)
    support, query = ((images[side], torch.randint(5, (2, 10))) for side in (0, 1))
    return model, inner, (Episode(support, query), torch.rand(2, program.ADAPT))


@pytest.mark.parametrize(
    "rule",
    [mo.Backprop(), mo.Backprop(memory="steps"), mo.FirstOrder()],
    ids=["full", "steps", "first"],
)
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_maml_plus_plus_is_the_plain_loop(rule: Any, chunk_size: int, monkeypatch: Any) -> None:
    """In all parameters, the norms' rows of each step and the rates of each layer in each step.

    The running statistics too.
    """
    program = load("maml_plus_plus")
    model, inner, tasks = maml_plus_plus(program, monkeypatch)
    net = mo.functional(model)
    options = {"learn": inner, "has_aux": True, "chunk_size": chunk_size}
    meta_gradient = mo.meta_grad(partial(program.task_loss, net, inner, rule), **options)
    (grads, of_rates), losses, (_, buffers) = meta_gradient(net.params, tasks)
    rates = [schedule.values for schedule in inner.lr.values.values()]
    value, statistics = maml_plus_plus_by_hand(
        program, model, net.params, rates, tasks, isinstance(rule, mo.FirstOrder)
    )
    expected = torch.autograd.grad(value, [*net.params.values(), *rates])
    assert_close(losses.mean(), value, 1e-10)
    for (name, found), own in zip({**grads, **of_rates}.items(), expected, strict=True):
        assert own.abs().max() > 1e-6 or name in {"convs.0.bias", "convs.1.bias"}, (
            "what a norm takes away"
        )
        assert_close(found, own, 1e-10)
    for name, buffer in buffers.items():
        assert_close(buffer, torch.stack([rows[name] for rows in statistics]), 1e-10)
    assert all(parameter.grad is None for parameter in [*model.parameters(), *inner.parameters()])


def test_maml_plus_plus_against_finite_differences(monkeypatch: Any) -> None:
    program = load("maml_plus_plus")
    model, inner, tasks = maml_plus_plus(program, monkeypatch)
    net = mo.functional(model)
    meta_gradient = mo.meta_grad(
        partial(program.task_loss, net, inner, mo.Backprop()),
        learn=inner,
        has_aux=True,
        chunk_size=2,
    )
    (grads, of_rates), *_ = meta_gradient(net.params, tasks)
    tensors = {**net.params, **dict(inner.named_parameters())}
    check_slopes(
        lambda params: meta_gradient(params, tasks)[1].mean(),
        net.params,
        tensors,
        {**grads, **of_rates},
        1e-6,
    )


def tanh_loss(params: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(torch.tanh(x @ params["one"].T + params["bias"]) @ params["two"].T, y)


def few_shots() -> tuple[dict[str, Tensor], Any]:
    """Return parameters, and 3 tasks with 6 examples to adapt on and as many to be judged on."""
    params = {
        "one": 0.5 * torch.randn(4, 5),
        "bias": torch.randn(4),
        "two": 0.5 * torch.randn(3, 4),
    }
    return params, tuple((torch.randn(3, 6, 5), torch.randint(3, (3, 6))) for _ in range(2))


def by_hand(params: Any, tasks: Any, move: Any, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the derivatives of the mean query loss after 3 steps w <- w + move(name, gradient)."""
    losses = []
    for index in range(3):
        support, query = mo.tree.index(tasks, index)
        fast = dict(params)
        for _ in range(3):
            grads = torch.autograd.grad(
                tanh_loss(fast, support), list(fast.values()), create_graph=True
            )
            fast = {
                name: p + move(name, g) for (name, p), g in zip(fast.items(), grads, strict=True)
            }
        losses.append(tanh_loss(fast, query))
    return torch.autograd.grad(torch.stack(losses).mean(), leaves)


def check_meta_gradient(inner: mo.Optimizer, move: Any, rule: Any, chunk_size: int) -> None:
    """Compare the meta-gradient in the parameters and in the optimizer with that by hand.

    It is compared with finite differences too.
    """
    params, tasks = few_shots()
    params = {name: p.requires_grad_() for name, p in params.items()}

    def task_loss(params: Any, task: Any) -> Tensor:
        return tanh_loss(
            mo.minimize(tanh_loss, inner, params, task[0], steps=3, differentiate=rule).params,
            task[1],
        )

    meta_gradient = mo.meta_grad(task_loss, learn=inner, chunk_size=chunk_size)
    (grads, of_inner), _ = meta_gradient(params, tasks)
    learned = dict(inner.named_parameters())
    expected = by_hand(params, tasks, move, [*params.values(), *learned.values()])
    for found, own in zip([*grads.values(), *of_inner.values()], expected, strict=True):
        assert own.abs().max() > 1e-6
        assert_close(found, own, 1e-10)
    check_slopes(
        lambda params: meta_gradient(params, tasks)[1].mean(),
        params,
        {**params, **learned},
        {**grads, **of_inner},
        1e-6,
    )


@pytest.mark.parametrize(
    "rule", [mo.Backprop(), mo.Backprop(memory="steps")], ids=["full", "steps"]
)
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_meta_sgd_is_a_loop_by_hand(rule: Any, chunk_size: int) -> None:
    inner = SGD(lr=PerParameter(few_shots()[0], 0.1))
    for rates in inner.parameters():
        nn.init.uniform_(rates, -0.05, 0.2)
    check_meta_gradient(inner, lambda name, g: -inner.lr.params[name] * g, rule, chunk_size)


@pytest.mark.parametrize(
    "rule", [mo.Backprop(), mo.Backprop(memory="steps")], ids=["full", "steps"]
)
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_meta_curvature_is_a_loop_by_hand(rule: Any, chunk_size: int) -> None:
    """By hand it is one Kronecker product for each gradient."""
    inner = MetaCurvature(few_shots()[0], SGD(nn.Parameter(torch.tensor(0.3))))
    matrices = [matrix for row in inner.matrices.values() for matrix in row]
    assert all(torch.equal(m, torch.eye(len(m))) for m in matrices)
    for matrix in matrices:
        nn.init.normal_(matrix, std=0.5)

    def move(name: str, g: Tensor) -> Tensor:
        product = reduce(torch.kron, inner.matrices[name])
        return -inner.optimizer.lr * (product @ g.flatten()).view_as(g)

    check_meta_gradient(inner, move, rule, chunk_size)
