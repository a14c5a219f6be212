"""The comparisons in plain PyTorch, without a library for meta-learning.

They show what the others cost beyond the work itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from contenders import problems
from contenders.attention import Attention, gradient_of_gradient
from contenders.large_model import Scale, adam_slopes, age
from contenders.optimizer_steps import OptimizerSteps
from contenders.quadratics import Bilevel
from metaopt.tasks.episode import Episode
from optimizers import LSTMOptimizer

Run = Callable[[], dict[str, Tensor]]
Params = dict[str, Tensor]


def sinusoid(problem: problems.Sinusoid, *, compile: bool = False) -> Run:
    """`vmap` of `grad`, as in torch's own tutorials."""
    model, tasks = problem.model(), problem.data()
    start = {name: param.detach() for name, param in model.named_parameters()}

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(model, params, (x,)), y)

    def task_loss(params: Params, task: Episode) -> Tensor:
        for _ in range(problem.steps):
            grads = grad(loss)(params, *task.support)
            params = {name: param - problem.lr * grads[name] for name, param in params.items()}
        return loss(params, *task.query)

    def meta_gradient(params: Params, tasks: Episode) -> Params:
        return {
            name: g.mean(0) for name, g in vmap(grad(task_loss), (None, 0))(params, tasks).items()
        }

    if compile:
        meta_gradient = torch.compile(meta_gradient, fullgraph=True)
    return torch.no_grad()(partial(meta_gradient, start, tasks))


def lstm(problem: problems.LSTM) -> Run:
    """`torch.nn.LSTMCell` over all coordinates in one batch, and autograd through the loop."""
    model, (x, y) = problem.model(), problem.data()
    learned = LSTMOptimizer(problem.hidden)  # only for its initial weights
    cells = [torch_cell(cell.weight, cell.bias, problem.hidden) for cell in learned.cells]
    readout = learned.readout.detach().clone().requires_grad_()
    names = [name for name, _ in model.named_parameters()]
    shapes = [param.shape for param in model.parameters()]
    start = torch.cat([param.detach().flatten() for param in model.parameters()])
    sizes = [shape.numel() for shape in shapes]

    def run() -> dict[str, Tensor]:
        flat, total = start, torch.zeros(())
        memory = [(start.new_zeros(len(start), problem.hidden),) * 2 for _ in cells]
        for t in range(problem.steps):
            flat = flat if flat.requires_grad else flat.requires_grad_()
            parts = [
                part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)
            ]
            loss = F.cross_entropy(
                functional_call(model, dict(zip(names, parts, strict=True)), (x[t],)), y[t]
            )
            (gradient,) = torch.autograd.grad(loss, flat, retain_graph=True)
            signal = log_and_sign(gradient)
            for layer, cell in enumerate(cells):
                memory[layer] = cell(signal, memory[layer])
                signal = memory[layer][0]
            flat = flat + learned.scale * (signal @ readout.T)[:, 0]
            total = total + loss
        weights = [
            weight for cell in cells for weight in (cell.weight_ih, cell.weight_hh, cell.bias_ih)
        ]
        *of_cells, of_readout = torch.autograd.grad(total, [*weights, readout])
        result = {"readout": of_readout}
        for layer in range(len(cells)):
            of_x, of_h, of_bias = of_cells[3 * layer : 3 * layer + 3]
            result |= {
                f"cells.{layer}.weight": torch.cat([of_x, of_h], 1),
                f"cells.{layer}.bias": of_bias,
            }
        return result

    return run


def meta_weight_net(problem: problems.MetaWeightNet) -> Run:
    """Move parameters in place, as in DARTS; before each run everything is put back."""
    model, weights = problem.model(), problem.weights()
    (x, y), (clean_x, clean_y) = problem.data()
    inner = torch.optim.SGD(model.parameters(), problem.lr, momentum=problem.momentum)
    outer = torch.optim.Adam(weights.parameters(), problem.outer_lr)
    params, above = list(model.parameters()), list(weights.parameters())

    def loss() -> Tensor:
        return problems.weighted_loss(F.cross_entropy(model(x), y, reduction="none"), weights)

    def step() -> None:
        put_grads(params, torch.autograd.grad(loss(), params))
        inner.step()
        v = torch.autograd.grad(F.cross_entropy(model(clean_x), clean_y), params)
        put_grads(above, mixed_difference(loss, params, above, v, problem.radius))
        outer.step()

    return again_and_again(step, dict(weights.named_parameters()), params, inner, outer)


def scale(problem: Scale) -> Run:
    """Move parameters in place, with operations on lists.

    The losses that the weights see are constants, so no graph of the transformer is needed there.
    """
    model, weights = problem.model(), problem.weights()
    (words, y), (clean_words, clean_y) = problem.data()
    params = [param for param in model.parameters() if param.requires_grad]
    above = list(weights.parameters())
    inner = torch.optim.AdamW(params, problem.lr, foreach=True)
    outer = torch.optim.Adam(above, problem.outer_lr, foreach=True)

    def losses() -> Tensor:
        return F.cross_entropy(model(words), y, reduction="none")

    def loss() -> Tensor:
        return problems.weighted_loss(losses(), weights)

    def seen_from_above() -> Tensor:
        with torch.no_grad():
            each = losses()
        return problems.weighted_loss(each, weights)

    def precondition(v: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        memory = [inner.state[param] for param in params]
        slopes = adam_slopes(grads, memory, inner.param_groups[0])
        torch._foreach_mul_(slopes, v)
        return torch._foreach_neg(slopes)

    def step() -> None:
        grads = torch.autograd.grad(loss(), params)
        put_grads(params, grads)
        inner.step()
        inner.zero_grad()
        if problem.rule != "sama":
            del grads
        v = torch.autograd.grad(F.cross_entropy(model(clean_words), clean_y), params)
        x = precondition(v, grads) if problem.rule == "sama" else v
        put_grads(above, mixed_difference(seen_from_above, params, above, x, problem.radius))
        outer.step()

    above_by_name = dict(weights.named_parameters())
    return again_and_again(
        step, above_by_name, params, inner, outer, lambda: age([*inner.state.values()])
    )


def imaml(problem: problems.IMAML) -> Run:
    """Move parameters in place; one graph of the gradient serves all products with the Hessian."""
    model, initial, task = problem.model(), problem.model(), problem.data()
    inner = torch.optim.SGD(model.parameters(), problem.lr)
    outer = torch.optim.Adam(initial.parameters(), problem.outer_lr)
    params, above = list(model.parameters()), list(initial.parameters())

    def loss() -> Tensor:
        x, y = task.support
        return F.mse_loss(model(x), y) + problem.distance(params, above)

    def step() -> None:
        with torch.no_grad():
            torch._foreach_copy_(params, above)
        descend(loss, params, inner, problem.steps)
        x, y = task.query
        v = torch.autograd.grad(F.mse_loss(model(x), y), params)
        grads = torch.autograd.grad(loss(), params, create_graph=True)
        x = conjugate_gradients(grads, params, v, problem.cg_steps)
        put_grads(above, [-bar for bar in torch.autograd.grad(grads, above, x)])
        outer.step()

    return again_and_again(step, dict(initial.named_parameters()), params, inner, outer)


def logistic_regression(problem: problems.LogisticRegression) -> Run:
    """Move parameters in place, as in DARTS.

    One graph of the gradient serves all products with the Hessian.
    """
    model, decay = problem.model(), problem.decay()
    (x, y), (other_x, other_y) = problem.data()
    inner = torch.optim.SGD(model.parameters(), problem.lr)
    outer = torch.optim.Adam(decay.parameters(), problem.outer_lr)

    def loss() -> Tensor:
        return problems.decayed_loss(model(x), y, model.w, decay.w)

    def hypergradient() -> Tensor:
        value = F.binary_cross_entropy_with_logits(model(other_x), other_y)
        v = torch.autograd.grad(value, [model.w])
        if problem.rule == "darts":
            return mixed_difference(loss, [model.w], [decay.w], v, problem.radius)[0]
        (slope,) = torch.autograd.grad(loss(), [model.w], create_graph=True)
        if problem.rule == "cg":
            (solution,) = conjugate_gradients([slope], [model.w], v, problem.products)
        else:
            solution = term = v[0]
            for _ in range(problem.products):
                (product,) = torch.autograd.grad(slope, [model.w], term, retain_graph=True)
                term = term - problem.alpha * product
                solution = solution + term
            solution = problem.alpha * solution
        return -torch.autograd.grad(slope, [decay.w], solution)[0]

    def step() -> None:
        with torch.no_grad():
            model.w.zero_()
        descend(loss, [model.w], inner, problem.steps)
        put_grads([decay.w], [hypergradient()])
        outer.step()

    return again_and_again(step, dict(decay.named_parameters()), [model.w], inner, outer)


def bilevel(problem: Bilevel) -> Run:
    """By conjugate gradients."""
    lower, upper, z, x = problem.data()
    z.requires_grad_()
    x.requires_grad_()

    def run() -> dict[str, Tensor]:
        v, direct = torch.autograd.grad(upper(z, x), [z, x])
        slope = torch.autograd.grad(lower(z, x), [z], create_graph=True)
        solution = conjugate_gradients(slope, [z], [v], problem.products)
        return {"w": direct - torch.autograd.grad(slope, x, solution)[0]}

    return run


def many_tensors(problem: problems.ManyTensors) -> Run:
    """Adam written out, a tensor after the other."""
    model, ((x, y), (other_x, other_y)) = problem.model(), problem.data()
    start, (beta1, beta2) = dict(model.named_parameters()), (0.9, 0.999)

    def loss(params: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(model, dict(zip(start, params, strict=True)), (x,)), y)

    def run() -> dict[str, Tensor]:
        params = list(start.values())
        means = squares = [torch.zeros_like(param) for param in params]
        for t in range(1, problem.steps + 1):
            grads = torch.autograd.grad(loss(params, x, y), params, create_graph=True)
            means = [beta1 * m + (1 - beta1) * g for m, g in zip(means, grads, strict=True)]
            squares = [beta2 * v + (1 - beta2) * g * g for v, g in zip(squares, grads, strict=True)]
            rate, bias = problem.lr / (1 - beta1**t), 1 - beta2**t
            params = [
                param - rate * m / ((v / bias).sqrt() + problem.eps)
                for param, m, v in zip(params, means, squares, strict=True)
            ]
        found = torch.autograd.grad(loss(params, other_x, other_y), list(start.values()))
        return dict(zip(start, found, strict=True))

    return run


def descend(
    loss: Callable[[], Tensor], params: list[Tensor], optimizer: torch.optim.SGD, steps: int
) -> None:
    for _ in range(steps):
        put_grads(params, torch.autograd.grad(loss(), params))
        optimizer.step()


def conjugate_gradients(
    grads: Sequence[Tensor], params: list[Tensor], v: Sequence[Tensor], steps: int
) -> list[Tensor]:
    """Return x after this number of steps from zero towards H x = v.

    H is the derivative of the gradients.
    """
    x, r, p = [torch.zeros_like(part) for part in v], v, v
    rr = dot(r, r)
    for _ in range(steps):
        product = torch.autograd.grad(grads, params, p, retain_graph=True)
        alpha = rr / dot(p, product)
        x = torch._foreach_add(x, torch._foreach_mul(p, alpha))
        r = torch._foreach_sub(r, torch._foreach_mul(product, alpha))
        before, rr = rr, dot(r, r)
        p = torch._foreach_add(r, torch._foreach_mul(p, rr / before))
    return x


def dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return sum((a * b).sum() for a, b in zip(one, other, strict=True))


def mixed_difference(
    loss: Callable[[], Tensor],
    params: list[Tensor],
    above: list[Tensor],
    v: Sequence[Tensor],
    radius: float,
) -> list[Tensor]:
    """Return -d/de grad_above loss(params + e v), as a difference over twice the radius.

    The parameters are as before on return.
    """
    eps = radius / torch.stack(torch._foreach_norm(v)).norm().item()
    before = [param.detach().clone() for param in params]
    with torch.no_grad():
        torch._foreach_add_(params, v, alpha=eps)
    ahead = torch.autograd.grad(loss(), above)
    with torch.no_grad():
        torch._foreach_add_(params, v, alpha=-2 * eps)
    behind = torch.autograd.grad(loss(), above)
    with torch.no_grad():
        torch._foreach_copy_(params, before)
    return [(b - a) / (2 * eps) for a, b in zip(ahead, behind, strict=True)]


def put_grads(params: list[nn.Parameter], grads: Sequence[Tensor]) -> None:
    for param, grad_ in zip(params, grads, strict=True):
        param.grad = grad_


def again_and_again(
    step: Callable[[], None],
    above: dict[str, nn.Parameter],
    below: list[nn.Parameter],
    inner: torch.optim.Optimizer,
    outer: torch.optim.Adam,
    prepare: Callable[[], None] = lambda: None,
) -> Run:
    """Return a run that makes the first step of all problems, after what `prepare` does.

    It returns the gradient with which Adam moved the parameters above.
    """
    params = [*above.values(), *below]
    initial = [param.detach().clone() for param in params]
    step()
    memory = [
        tensor
        for opt in (inner, outer)
        for state in opt.state.values()
        for tensor in state.values()
    ]
    means = {name: outer.state[param]["exp_avg"] for name, param in above.items()}
    decay = outer.defaults["betas"][0]

    def run() -> dict[str, Tensor]:
        with torch.no_grad():
            torch._foreach_copy_(params, initial)
            torch._foreach_zero_(memory)
            prepare()
        step()
        return {name: mean / (1 - decay) for name, mean in means.items()}

    return run


def torch_cell(weight: Tensor, bias: Tensor, hidden: int) -> nn.LSTMCell:
    """Return torch's cell with these weights: the gates are in the same order."""
    cell = nn.LSTMCell(weight.shape[1] - hidden, hidden)
    inputs, recurrent = weight.split([weight.shape[1] - hidden, hidden], dim=1)
    with torch.no_grad():
        for parameter, value in zip(
            cell.parameters(), (inputs, recurrent, bias, torch.zeros_like(bias)), strict=True
        ):
            parameter.copy_(value)
    return cell


def log_and_sign(x: Tensor) -> Tensor:
    """Return [n, 2], as in appendix A of arXiv:1606.04474 with p = 10."""
    tiny = math.exp(-10)
    return torch.stack([x.abs().clamp(min=tiny).log() / 10, (x / tiny).clamp(-1, 1)], dim=1)


def optimizer_steps(problem: OptimizerSteps) -> Run:
    params = dict(problem.model().named_parameters())
    adam = torch.optim.Adam(params.values(), foreach=True)

    def run() -> dict[str, Tensor]:
        adam.step()
        return params

    return run


def attention(problem: Attention) -> Run:
    """By torch's plain kernel, the only one of its own with a second derivative."""
    inputs, mask = problem.data(), problem.mask()
    return sdpa_kernel(SDPBackend.MATH)(partial(gradient_of_gradient, problem, inputs, mask))
