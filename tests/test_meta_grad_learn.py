"""What `meta_grad` learns beside the parameters, and what it tells.

And how it goes through tasks that are not alike.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close
from torch import Tensor, nn
from torch.func import grad

import metaopt as mo
from optimizers import SGD, Adam, LSTMSchedule

pytestmark = pytest.mark.usefixtures("float64")
LOOPS = [{}, {"chunk_size": 1}, {"chunk_size": 2}]


def line(params: Any, batch: Any) -> Tensor:
    x, y = batch
    return (x @ params["w"] + params["b"] - y).square().mean()


def tasks_of(n: int = 4) -> Any:
    return (torch.randn(n, 5, 3), torch.randn(n, 5)), (torch.randn(n, 6, 3), torch.randn(n, 6))


def start() -> dict[str, Tensor]:
    return {"w": torch.randn(3), "b": torch.randn(())}


def by_hand(params: Any, tasks: Any, adapt: Any, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the derivatives of the mean loss over tasks in the leaves.

    They are by autograd through everything.
    """
    (xs, ys), (queries, targets) = tasks
    losses = [
        line(adapt(params, (x, y)), (q, t))
        for x, y, q, t in zip(xs, ys, queries, targets, strict=True)
    ]
    return torch.autograd.grad(torch.stack(losses).mean(), leaves)


@pytest.mark.parametrize("options", LOOPS)
def test_an_inner_rate_is_learned(options: dict[str, Any]) -> None:
    """It was silently left out: `inner.lr.grad` stayed None and an outer optimizer skipped it."""
    inner, tasks, params = (
        SGD(lr=nn.Parameter(torch.tensor(0.1)), momentum=nn.Parameter(torch.tensor(0.5))),
        tasks_of(),
        start(),
    )

    def task_loss(params: Any, task: Any) -> Tensor:
        return line(mo.minimize(line, inner, params, task[0], steps=3).params, task[1])

    meta_gradient = mo.meta_grad(task_loss, learn=inner, **options)
    (grads, of_inner), losses = meta_gradient(params, tasks)
    assert losses.shape == (4,)
    assert of_inner.keys() == {"lr", "momentum"}
    leaves = {
        **{name: p.clone().requires_grad_() for name, p in params.items()},
        **dict(inner.named_parameters()),
    }

    def adapt(params: Any, batch: Any) -> Any:
        velocity = dict.fromkeys(params, 0.0)
        for _ in range(3):
            found = dict(
                zip(
                    params,
                    torch.autograd.grad(
                        line(params, batch), list(params.values()), create_graph=True
                    ),
                    strict=True,
                )
            )
            velocity = {name: leaves["momentum"] * velocity[name] + g for name, g in found.items()}
            params = {name: p - leaves["lr"] * velocity[name] for name, p in params.items()}
        return params

    expected = by_hand({"w": leaves["w"], "b": leaves["b"]}, tasks, adapt, [*leaves.values()])
    for found, own in zip([*grads.values(), *of_inner.values()], expected, strict=True):
        assert not found.requires_grad
        assert_close(found, own, 1e-12)
    mo.assign_grads(inner, of_inner)
    assert torch.equal(inner.lr.grad, of_inner["lr"])


def test_a_learned_loss_and_a_learned_schedule_together() -> None:
    """Several modules in one; finite differences in each."""
    loss = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    inner = SGD(lr=LSTMSchedule(0.1, steps=3, hidden_size=3).double())
    nn.init.normal_(inner.lr.readout, std=0.3)
    both, tasks, params = nn.ModuleDict({"loss": loss, "inner": inner}), tasks_of(2), start()

    own = mo.functional(loss)

    def task_loss(params: Any, task: Any) -> Tensor:
        def inner_loss(params: Any, batch: Any, weights: Any) -> Tensor:
            x, y = batch
            return own(weights, torch.stack([x @ params["w"] + params["b"], y], -1)).square().mean()

        return line(
            mo.minimize(inner_loss, inner, params, task[0], steps=3, meta=own.params).params,
            task[1],
        )

    (_, learned_grads), _ = mo.meta_grad(task_loss, learn=both)(params, tasks)
    value = mo.meta_grad(task_loss, learn=both)
    for name, parameter in both.named_parameters():
        direction = torch.randn_like(parameter)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-5 * direction)
                ends.append(value(params, tasks)[1].mean())
                parameter.sub_(sign * 1e-5 * direction)
        slope = (ends[0] - ends[1]) / 2e-5
        assert_close((learned_grads[name] * direction).sum(), slope, 1e-7)
    assert learned_grads["inner.lr.readout"].abs().max() > 1e-6


def test_it_can_be_differentiated_again() -> None:
    inner, tasks, params = SGD(lr=nn.Parameter(torch.tensor(0.1))), tasks_of(2), start()

    def task_loss(params: Any, task: Any) -> Tensor:
        return line(mo.minimize(line, inner, params, task[0], steps=2).params, task[1])

    def size(params: Any) -> Tensor:
        (grads, of_inner), _ = mo.meta_grad(task_loss, learn=inner)(params, tasks)
        return grads["w"].square().sum() + of_inner["lr"].square()

    found = grad(size)(params)["b"]
    h = torch.tensor(1e-5)
    expected = (size({**params, "b": params["b"] + h}) - size({**params, "b": params["b"] - h})) / (
        2 * h
    )
    assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("options", LOOPS)
def test_aux_is_stacked_over_tasks(options: dict[str, Any]) -> None:
    tasks, params = tasks_of(), start()

    def task_loss(params: Any, task: Any) -> Any:
        out = mo.minimize(line, SGD(0.1), params, task[0], steps=2)
        x, y = task[1]
        return line(out.params, task[1]), {
            "residual": x @ out.params["w"] - y,
            "inner": out.losses,
            "shots": 5,
        }

    grads, losses, aux = mo.meta_grad(task_loss, has_aux=True, **options)(params, tasks)
    plain, _ = mo.meta_grad(lambda p, t: task_loss(p, t)[0])(params, tasks)
    assert_close(grads["w"], plain["w"], 1e-14)
    assert aux["residual"].shape == (4, 6)
    assert aux["inner"].shape == (4, 2)
    assert aux["shots"].tolist() == [5] * 4
    assert not aux["residual"].requires_grad
    assert len(losses) == 4


def test_a_list_of_ragged_tasks_is_gone_through_one_by_one() -> None:
    params = start()
    tasks = [
        ((torch.randn(n, 3), torch.randn(n)), (torch.randn(4, 3), torch.randn(4)))
        for n in (2, 5, 3)
    ]

    def task_loss(params: Any, task: Any) -> Any:
        out = mo.minimize(line, SGD(0.1), params, task[0], steps=2)
        return line(out.params, task[1]), task[0][1]

    grads, losses, aux = mo.meta_grad(task_loss, has_aux=True)(params, tasks)
    each = [mo.meta_grad(task_loss, has_aux=True)(params, [task]) for task in tasks]
    assert_close(losses, torch.cat([one[1] for one in each]), 1e-15)
    assert_close(grads["w"], torch.stack([one[0]["w"] for one in each]).mean(0), 1e-14)
    assert [len(part) for part in aux] == [2, 5, 3]


def test_a_list_of_bare_tensors_is_ambiguous() -> None:
    with pytest.raises(
        ValueError,
        match=r"`tasks` must be a list of tasks, such as \[\(x, y\), \(x, y\)\], got 2 bare "
        r"tensors",
    ):
        mo.meta_grad(line)(start(), [torch.randn(4, 3), torch.randn(4)])
    with pytest.raises(ValueError, match="Stack the tasks first, or pass them as a list"):
        mo.meta_grad(line)(start(), (torch.randn(4, 3), torch.randn(3)))


class _Reversal(torch.autograd.Function):
    """An old-style function, without `setup_context`: vmap refuses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


def early_stop(params: Any, task: Any) -> Tensor:
    for _ in range(4):
        out = mo.minimize(line, SGD(0.05), params, task[0], steps=1)
        params = out.params
        if out.losses[0] < 0.5:
            break
    return line(params, task[1])


def mask_check(params: Any, task: Any) -> Tensor:
    if task[1][0].abs().sum().item() == 0:
        raise AssertionError("no queries")
    return line(mo.minimize(line, SGD(0.1), params, task[0], steps=2).params, task[1])


def reversed_loss(params: Any, task: Any) -> Tensor:
    def inner(params: Any, batch: Any) -> Tensor:
        return line({"w": _Reversal.apply(params["w"]), "b": params["b"]}, batch)

    return line(mo.minimize(inner, SGD(0.1), params, task[0], steps=2).params, task[1])


@pytest.mark.parametrize("task_loss", [early_stop, mask_check, reversed_loss])
def test_what_vmap_cannot_do_falls_back_to_the_loop_with_one_warning(task_loss: Any) -> None:
    """It ended in torch's own text, while the loop was right."""
    tasks, params = tasks_of(), start()
    expected = mo.meta_grad(task_loss, chunk_size=1)(params, tasks)
    meta_gradient = mo.meta_grad(task_loss)
    with pytest.warns(
        RuntimeWarning,
        match=r"cannot be batched by vmap.*gone through one by one.*Pass `chunk_size=1`",
    ):
        found = meta_gradient(params, tasks)
    assert_close(found[0]["w"], expected[0]["w"], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meta_gradient(params, tasks)
    with pytest.raises(RuntimeError) as caught:
        mo.meta_grad(task_loss, chunk_size=2)(params, tasks)
    assert "With `chunk_size=1` they are gone through one by one" in "".join(caught.value.__notes__)


def test_a_loss_that_is_wrong_by_itself_says_so() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        mo.meta_grad(lambda p, t: line({"w": torch.randn(7), "b": p["b"]}, t[0]))(
            start(), tasks_of()
        )


RULES = [
    mo.Implicit(mo.ConjugateGradient()),
    mo.T1T2(),
    mo.FiniteDifference(),
    mo.SAMA(),
    mo.Penalty(),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("options", [*LOOPS, {"count": 1}, {"conv": True}])
def test_rules_that_look_at_the_end_never_answer_zero(rule: Any, options: dict[str, Any]) -> None:
    """The gradient was zero, silently, wherever tasks were gone through in a loop.

    So it was by default for convolutions.
    """
    options = dict(options)
    count, conv = options.pop("count", 4), options.pop("conv", False)
    if conv:
        net = mo.functional(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)))
        params, tasks = net.params, (torch.randn(count, 3, 1, 4, 4), torch.randint(3, (count, 3)))

        def loss(p: Any, b: Any) -> Tensor:
            return F.cross_entropy(net(p, b[0]), b[1])
    else:
        params, tasks, loss = start(), tasks_of(count)[0], line

    def task_loss(p: Any, t: Any) -> Tensor:
        return loss(mo.minimize(loss, SGD(0.1), p, t, steps=2, differentiate=rule).params, t)

    with pytest.raises(
        ValueError,
        match=r"the initial parameters must not be differentiated.*the answer would be zeros",
    ):
        mo.meta_grad(task_loss, **options)(params, tasks)


@pytest.mark.parametrize("options", LOOPS)
def test_what_is_not_used_is_named(options: dict[str, Any]) -> None:
    inner = Adam(lr=nn.Parameter(torch.tensor(0.1)))
    with pytest.raises(
        ValueError, match=r"must depend on all that is learned, but does not on \['lr'\] of `learn`"
    ):
        mo.meta_grad(lambda p, t: line(p, t[0]), learn=inner, **options)(start(), tasks_of())
    model = nn.Linear(3, 1)
    with pytest.raises(
        ValueError, match=r"`task_loss` must depend on `params`, but its gradient would be zero"
    ):
        mo.meta_grad(lambda p, t: t[0][0].sum(), **options)(start(), tasks_of())
    with pytest.raises(
        ValueError,
        match=r"depends on `model.bias` \(shape \(1,\)\), "
        r"`model.weight`.*`requires_grad_\(False\)`",
    ):
        mo.meta_grad(lambda p, t: line(p, t[0]) + model(t[0][0]).sum(), **options)(
            start(), tasks_of()
        )


def test_what_a_loss_makes_by_itself_is_no_hidden_tensor() -> None:
    """A gradient penalty asks its input to require grad."""

    def task_loss(params: Any, task: Any) -> Tensor:
        x = task[0][0].detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad((x @ params["w"]).square().sum(), x, create_graph=True)
        return line(params, task[0]) + slope.square().mean()

    grads, _ = mo.meta_grad(task_loss, chunk_size=1)(start(), tasks_of())
    assert grads["w"].abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"chunk_size": 1.5},
            TypeError,
            r"`chunk_size` must be a positive integer or None, got 1\.5",
        ),
        (
            {"chunk_size": True},
            TypeError,
            r"`chunk_size` must be a positive integer or None, got True",
        ),
        ({"chunk_size": 0}, ValueError, r"`chunk_size` must be a positive integer or None, got 0"),
        ({"learn": 3}, TypeError, r"`learn` must be an nn.Module, got a int.*nn.ModuleDict"),
        (
            {"learn": SGD(0.1)},
            ValueError,
            r"`learn` must have a parameter that requires grad, got a SGD without",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mo.meta_grad(line, **arguments)


def test_aux_must_be_there_and_params_must_be_tensors() -> None:
    with pytest.raises(
        ValueError, match=r"must return \(loss, aux\) because of has_aux=True, got a Tensor"
    ):
        mo.meta_grad(lambda p, t: line(p, t[0]), has_aux=True)(start(), tasks_of())
    with pytest.raises(TypeError, match=r"`params` must be a tree of tensors, got a Linear"):
        mo.meta_grad(line)(nn.Linear(3, 1), tasks_of()[0])
    with pytest.raises(
        ValueError, match=r"`task_loss` must return a floating-point scalar, got a tuple of 2"
    ):
        mo.meta_grad(lambda p, t: (line(p, t[0]), 1))(start(), tasks_of())


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_it_is_differentiated_inside_a_loss(chunk_size: int | None) -> None:
    """In a loss whose gradient plain autograd takes it thought itself outermost.

    Its part of the gradient was zero.
    """
    tasks = torch.arange(6.0).reshape(3, 2)
    inner = mo.meta_grad(lambda p, t: ((p - t) ** 3).sum(), chunk_size=chunk_size)

    def loss(p: Tensor, _: Any) -> Tensor:
        grads, losses = inner(p, tasks)
        return 0.01 * grads.square().sum() + 0.1 * losses.mean()

    def by_hand(p: Tensor) -> Tensor:
        grads = (3 * (p - tasks) ** 2).mean(0)
        return 0.01 * grads.square().sum() + 0.1 * ((p - tasks) ** 3).sum(1).mean()

    p = torch.ones(2)
    found = mo.minimize(loss, SGD(0.01), p, None, steps=2).params
    for _ in range(2):
        at = p.detach().requires_grad_()
        p = p - 0.01 * torch.autograd.grad(by_hand(at), at)[0]
    assert_close(found, p, 1e-13)
    nested, _ = mo.meta_grad(loss, chunk_size=chunk_size)(torch.ones(2), torch.zeros(1))
    at = torch.ones(2, requires_grad=True)
    assert_close(nested, torch.autograd.grad(by_hand(at), at)[0], 1e-13)


def test_tasks_of_a_list_may_use_different_parts() -> None:
    """What is learned is looked for in all of them, and so is what is hidden."""
    parts = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})
    x = torch.randn(5, 3)
    value = lambda p, t: (p * parts[t[0]](t[1]).sum()).square()
    (_, learned), _ = mo.meta_grad(value, learn=parts)(torch.tensor(2.0), [("a", x), ("b", x)])
    assert all(grad.abs().max() > 0 for grad in learned.values())
    hidden = torch.tensor(3.0, requires_grad=True)
    with pytest.raises(ValueError, match=r"depends on `hidden` \(shape \(\)\)"):
        mo.meta_grad(lambda p, t: p * (hidden if t[0] else 1.0))(
            torch.tensor(2.0), [(0, x), (1, x)]
        )


def test_parameters_made_in_a_loss_are_not_hidden() -> None:
    """Their derivative is nobody's."""
    make = lambda p, _: (nn.Parameter(torch.ones(2)) * p).sum() ** 2
    grads, _ = mo.meta_grad(make)(torch.ones(2), torch.zeros(2))
    assert_close(grads, torch.full((2,), 4.0), 0)
    mo.minimize(
        lambda p, _: nn.Linear(2, 1)(p).square().sum(), SGD(0.1), torch.ones(2), None, steps=2
    )


def test_in_inference_mode_nothing_is_looked_for() -> None:
    with torch.inference_mode():
        _, losses = mo.meta_grad(lambda p, t: (p * t).sum())(torch.ones(2), torch.ones(3, 2))
    assert losses.tolist() == [2.0] * 3


def test_aux_of_other_kinds_is_a_list() -> None:
    _, _, aux = mo.meta_grad(lambda p, t: (p * t[0], {t[1]: t[0]}), has_aux=True)(
        torch.ones(()), [(torch.ones(()), "x"), (torch.ones(()), "y")]
    )
    assert [*map(list, aux)] == [["x"], ["y"]]


def test_integers_and_no_tasks_are_named() -> None:
    with pytest.raises(
        ValueError,
        match=r"`params` must be floating-point or complex tensors, got torch.int64 at \['n'\]",
    ):
        mo.meta_grad(lambda p, t: p["w"].sum())(
            {"w": torch.ones(2), "n": torch.tensor(1)}, torch.ones(3)
        )
    with pytest.raises(ValueError, match="`tasks` must hold at least one task, got an empty list"):
        mo.meta_grad(lambda p, t: p.sum())(torch.ones(2), [])


def test_a_tensor_that_an_optimizer_hides_is_named() -> None:
    optimizer = SGD(0.1)
    optimizer.secret = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(
        ValueError,
        match=r"SGD has tensors that require grad and are neither parameters nor buffers, "
        r"\['secret'\]",
    ):
        mo.minimize(lambda p, _: p.sum(), optimizer, torch.ones(2), None, steps=1)
