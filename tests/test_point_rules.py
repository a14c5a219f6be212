"""What the rules that look at the end of a loop promise besides their formula.

Its derivatives, protocol, compilation, errors.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bilevel import flat, logistic, recorded, stated
from problems import assert_close, leaf
from torch import Tensor, nn
from torch.func import grad

import metaopt as mo
from metaopt.autodiff.mixed import mixed_difference
from metaopt.differentiate import InnerLoop, PointRule
from metaopt.transforms import is_tracked
from optimizers import SGD

float64 = pytest.mark.usefixtures("float64")
CG = mo.ConjugateGradient(max_steps=3)
POINT_RULES: list[PointRule] = [
    mo.Implicit(CG),
    mo.T1T2(),
    mo.FiniteDifference(),
    mo.SAMA(),
    mo.Penalty(),
]


def kind(rule: Any) -> str:
    return type(rule).__name__


each_rule = pytest.mark.parametrize("rule", POINT_RULES, ids=kind)


@float64
def test_a_zero_cotangent_gives_zero() -> None:
    bilevel = logistic()
    for rule in POINT_RULES:
        found = grad(lambda meta, rule=rule: 0 * bilevel.value(rule, meta))(bilevel.meta)
        assert (found == 0).all(), rule


class Product(torch.autograd.Function):
    """Whose derivative is a view of what it was given."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return (a * b).sum()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return b, a


@float64
def test_a_slope_may_be_a_view_of_the_displaced_parameters() -> None:
    w, m, x = torch.ones(3), torch.ones(3), torch.arange(3.0)
    with torch.no_grad():
        found = mixed_difference(Product.apply, w, m, x, True, 0.01)
    assert_close(found, x, 1e-12)


# --- differentiable again


@float64
@pytest.mark.parametrize("kind", ["T1T2", "difference", "SAMA", "penalty"])
def test_the_second_derivative_is_that_of_the_formula(kind: str) -> None:
    """By hand, with dw/dl given by the rule's own formula.

    d/dl <h(l), u> = h_l + h_w dw/dl, all by autograd at the end. SAMA's D for SGD is -lr.
    Differences: radius 1e-3 leaves 1e-6.
    """
    bilevel = replace(logistic(), lr=0.3)
    rule = {
        "T1T2": mo.T1T2(),
        "difference": mo.FiniteDifference(1e-3),
        "SAMA": mo.SAMA(1e-3),
        "penalty": mo.Penalty(1e6, 120, 0.25),
    }[kind]
    u = torch.linspace(-1, 1, 10)
    found = grad(lambda meta: grad(lambda meta: bilevel.value(rule, meta))(meta) @ u)(bilevel.meta)

    w, meta = bilevel.end(), leaf(bilevel.meta)

    def slope(w: Tensor, meta: Tensor) -> Tensor:
        return grad(bilevel.loss)(w, bilevel.batch, meta)

    def hypergradient_at(w: Tensor, meta: Tensor) -> Tensor:
        x = grad(bilevel.outer)(w)
        if kind == "penalty":
            x = torch.linalg.solve(torch.func.jacrev(slope)(w, meta), x)
        return -(bilevel.lr if kind == "SAMA" else 1) * torch.func.jacrev(slope, 1)(w, meta).T @ x

    by_w, by_meta = torch.func.jacrev(hypergradient_at, (0, 1))(w, meta)
    x = by_w.T @ u
    if kind == "penalty":
        x = torch.linalg.solve(torch.func.jacrev(slope)(w, meta), x)
    through_w = -(bilevel.lr if kind == "SAMA" else 1) * torch.func.jacrev(slope, 1)(w, meta).T @ x
    assert_close(found, (by_meta.T @ u + through_w).detach(), 1e-11 if kind == "T1T2" else 1e-5)


# --- the protocol


def tracks(values: Any) -> bool:
    return any(is_tracked(leaf) for leaf in mo.tree.leaves(values) if isinstance(leaf, Tensor))


@float64
@each_rule
def test_what_a_rule_does_not_reach_is_an_error_or_constant(rule: PointRule) -> None:
    bilevel = logistic()

    def value(start: Tensor, lr: Any = 0.1, velocity: Tensor = bilevel.start) -> Tensor:
        optimizer = SGD(lr, momentum=0.9)
        state = {**optimizer.init(start), "slots": {"velocity": velocity}}
        problem = (bilevel.loss, optimizer, start, bilevel.batch)
        out = mo.minimize(*problem, steps=2, meta=bilevel.meta, opt_state=state, differentiate=rule)
        assert not tracks((out.opt_state, out.losses))
        return out.params.sum()

    name = type(rule).__name__
    with pytest.raises(
        ValueError, match=f"{name}: the initial state must not be differentiated, but .*'velocity'"
    ):
        grad(lambda velocity: value(bilevel.start, velocity=velocity))(torch.zeros(3))
    with pytest.raises(
        ValueError, match=f"{name}: the initial parameters must not be differentiated"
    ):
        grad(value)(bilevel.start)
    with pytest.raises(
        ValueError, match=f"{name}: the optimizer's tensors must not be differentiated"
    ):
        grad(lambda lr: value(bilevel.start, lr))(torch.tensor(0.1))
    for given, what in (
        ({"start": leaf(bilevel.start)}, "initial parameters"),
        ({"start": bilevel.start, "lr": nn.Parameter(torch.tensor(0.1))}, "optimizer's tensors"),
        ({"start": bilevel.start, "velocity": leaf(torch.zeros(3))}, "initial state"),
    ):
        end = value(**given)  # no error before anybody goes backward
        assert_close(end.detach(), value(bilevel.start), 0.0)
        with pytest.raises(
            ValueError,
            match=f"{name}: the {what} must not be differentiated.*pass the same tensors as `meta`",
        ):
            end.backward()
    assert not value(bilevel.start).requires_grad


@each_rule
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("is_convolution", [False, True], ids=["dense", "convolution"])
def test_a_loop_over_tasks_answers_an_error_as_vmap_does(
    rule: PointRule, chunk_size: int | None, tasks: int, is_convolution: bool
) -> None:
    """It was zeros wherever plain autograd stood in for `torch.func.grad`.

    One task, chunks of one, convolutions.
    """
    first = nn.Conv1d(1, 2, 2) if is_convolution else nn.Linear(3, 4)
    net = mo.functional(nn.Sequential(first, nn.Flatten(), nn.Linear(4, 1)))

    def loss(params: Any, x: Tensor) -> Tensor:
        return net(params, x).square().mean()

    def task_loss(params: Any, x: Tensor) -> Tensor:
        doubled = mo.tree.map(lambda p: 2 * p, params)
        return loss(mo.minimize(loss, SGD(0.1), doubled, x, steps=2, differentiate=rule).params, x)

    with pytest.raises(
        ValueError,
        match=f"{kind(rule)}: the initial parameters must not be differentiated, but .*0.weight",
    ):
        mo.meta_grad(task_loss, chunk_size=chunk_size)(net.params, torch.randn(tasks, 2, 1, 3))


@each_rule
def test_forward_mode_is_refused_and_not_answered_by_zeros(rule: PointRule) -> None:
    def end(meta: Tensor, x: Tensor | None = None) -> Tensor:
        def loss(w: Tensor, x: Tensor, meta: Tensor) -> Tensor:
            return square(w, None, meta) + (0 if x is None else (w * x).sum())

        return mo.minimize(
            loss, SGD(0.1), torch.zeros(2), x, steps=2, meta=meta, differentiate=rule
        ).params

    one = torch.ones(2)
    message = "knows its derivative in reverse mode alone .* cannot be differentiated forward"
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            with pytest.raises(ValueError, match=message):
                torch.func.jvp(end, (one,), (one,))
            with pytest.raises(ValueError, match=message):
                torch.func.jvp(lambda x: end(one, x), (one,), (one,))
            with pytest.raises(ValueError, match=message):
                torch.func.jvp(lambda x: torch.func.vmap(end)(torch.stack([x, x])), (one,), (one,))
            with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match=message):
                end(torch.autograd.forward_ad.make_dual(one, one))
            _, slope = torch.func.jvp(lambda x: x * end(one), (one,), (one,))  # a constant is one
            assert_close(slope, end(one), 0.0)


@each_rule
def test_what_no_running_gradient_differentiates_may_require_grad(rule: PointRule) -> None:
    """Initial parameters computed from what plain autograd alone tracks are constants.

    So they are under `torch.func.grad`.
    """
    outside = torch.ones(2, requires_grad=True)

    def task_loss(meta: Tensor, _: Tensor) -> Tensor:
        start = 2 * outside
        return mo.minimize(
            square, SGD(0.1), start, None, steps=2, meta=meta, differentiate=rule
        ).params.sum()

    found = [
        mo.meta_grad(task_loss, chunk_size=size)(torch.ones(2), torch.zeros(2))[0]
        for size in (1, 2)
    ]
    assert_close(*found, 1e-5)
    assert (found[0] > 0).all()


@float64
@pytest.mark.parametrize(
    "rule",
    [*POINT_RULES, mo.Backprop("steps"), mo.ForwardMode(), mo.Backprop("steps", hvp="forward")],
    ids=repr,
)
def test_a_loss_that_reads_the_state_and_hands_on_results(rule: Any) -> None:
    """State (optimizer's, running mean of w).

    The loss pulls w to that mean, and hands on the new one.
    """

    def loss(inputs: Any, w: Tensor, state: Any, batch: Any) -> tuple[Tensor, Tensor]:
        _, mean = state
        return (w - inputs["meta"] * mean).square().sum() / 2 + (
            w**4
        ).sum() / 12, 0.5 * mean + 0.5 * w.sin()

    def update(
        inputs: Any, grads: Tensor, state: Any, w: Tensor, loss: Tensor, aux: Tensor
    ) -> tuple[Tensor, Any]:
        steps, _ = state
        return w - 0.4 * grads, (steps + 1, aux)

    def by_hand(w: Tensor, mean: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(3):
            g = w - meta * mean + w**3 / 3
            w, mean = w - 0.4 * g, 0.5 * mean + 0.5 * w.sin()
        return w, mean

    start, mean, meta = (
        torch.tensor([0.3, -0.6]),
        torch.tensor([1.0, 0.5]),
        torch.tensor(0.8, requires_grad=True),
    )
    inputs = {"optimizer": {}, "loss": {}, "meta": meta, "batch": None}
    loop = InnerLoop(loss, update, inputs, start, (torch.tensor(0), mean), (), 3)
    w, (steps, last), losses = rule.attach(loop)
    expected_w, expected_mean = by_hand(start, mean, meta)
    assert steps == 3
    assert losses.shape == (3,)
    assert_close([w, last], [expected_w, expected_mean], 1e-12)
    if isinstance(rule, PointRule):
        v = torch.ones(2)
        x = {"SAMA": 0.4 * v, "Implicit": v / (1 + w**2), "Penalty": v / (1 + w**2)}.get(
            type(rule).__name__, v
        )
        assert_close(
            torch.autograd.grad(w.sum(), meta)[0],
            (x * last).sum(),
            2e-2 if isinstance(rule, mo.Penalty) else 1e-5,
        )
    else:
        found, expected = (
            torch.autograd.grad(w.sum() + mean.sum(), meta)[0]
            for w, mean in ((w, last), (expected_w, expected_mean))
        )
        assert_close(found, expected, 1e-12)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
# of torch's own compiler
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize(
    "rule",
    [rule for rule in POINT_RULES if not isinstance(rule, mo.Penalty)],
    ids=lambda rule: type(rule).__name__,
)
def test_compiled_is_equal(rule: PointRule) -> None:
    def run(compile: bool) -> Tensor:
        meta = torch.linspace(-1, 1, 10).requires_grad_()
        x, y = torch.linspace(-2, 2, 30).reshape(10, 3), (torch.arange(10) % 2).float()

        def loss(w: Tensor, batch: tuple[Tensor, Tensor], meta: Tensor) -> Tensor:
            x, y = batch
            logits = x @ w
            return ((F.softplus(logits) - y * logits) * meta.sigmoid()).sum() + w.square().sum() / 2

        out = mo.minimize(
            loss,
            SGD(0.1),
            torch.zeros(3),
            (x, y),
            steps=4,
            meta=meta,
            differentiate=rule,
            compile=compile,
        )
        (out.params - 1).square().sum().backward()
        assert meta.grad is not None
        return meta.grad

    torch._dynamo.reset()
    # float32; a difference of radius 0.01 multiplies rounding by 100
    torch.testing.assert_close(run(True), run(False), rtol=1e-4, atol=1e-5)


@float64
@each_rule
def test_nothing_is_pulled_back_to_what_only_the_optimizer_reads(rule: PointRule) -> None:
    """A level of `grad` that differentiates the optimizer's tensors alone.

    It stands around one that differentiates `meta`.
    """
    loop, end = recorded(
        square, SGD(torch.tensor(0.1)), torch.zeros(2), None, steps=3, meta=torch.ones(2)
    )

    def value(meta: Tensor, lr: Tensor) -> Tensor:
        inputs = {**loop.inputs, "meta": meta, "optimizer": {"lr": lr}}
        return rule.attach_at(replace(loop, inputs=inputs), end).square().sum()

    lr, meta = torch.tensor(0.1), torch.ones(2)
    of_lr = grad(lambda lr: grad(value)(meta, lr).sum())(lr)
    of_meta = grad(value)(meta, lr)
    # SAMA's D is -lr
    assert_close(
        of_lr, (of_meta / lr).sum() if isinstance(rule, mo.SAMA) else torch.tensor(0.0), 1e-6
    )


# --- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: mo.FiniteDifference(0.0),
            "FiniteDifference: `radius` must be a positive number, got 0.0",
        ),
        (lambda: mo.SAMA(radius=-1), "SAMA: `radius` must be a positive number, got -1"),
        (
            lambda: mo.Penalty(weight=float("nan")),
            "Penalty: `weight` must be a positive number, got nan",
        ),
        (lambda: mo.Penalty(lr=True), "Penalty: `lr` must be a positive number, got True"),
        (lambda: mo.Penalty(steps=0), "Penalty: `steps` must be a positive integer, got 0"),
        (
            lambda: mo.EvolutionStrategy(std=0),
            "EvolutionStrategy: `std` must be a positive number, got 0",
        ),
        (
            lambda: mo.EvolutionStrategy(pairs=1.5),
            "EvolutionStrategy: `pairs` must be a positive integer, got 1.5",
        ),
    ],
)
def test_bad_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_point_rule_defines_its_pullback() -> None:
    class Empty(PointRule):
        pass

    with pytest.raises(TypeError, match="Empty must define `pull_back"):
        grad(
            lambda m: mo.minimize(
                square, SGD(0.1), torch.zeros(2), None, steps=1, meta=m, differentiate=Empty()
            ).params.sum()
        )(torch.ones(2))


def square(w: Tensor, _: Any, meta: Tensor) -> Tensor:
    return (w - meta).square().sum()


@pytest.mark.parametrize("rule", [mo.FiniteDifference(), mo.SAMA()])
def test_half_precision_parameters_are_refused(rule: PointRule) -> None:
    meta = torch.ones(2, requires_grad=True)
    start = {"w": torch.zeros(2, dtype=torch.bfloat16)}

    def loss(w: dict[str, Tensor], _: Any, meta: Tensor) -> Tensor:
        return square(w["w"], None, meta)

    out = mo.minimize(loss, SGD(0.1), start, None, steps=1, meta=meta, differentiate=rule)
    with pytest.raises(
        ValueError, match=r"need parameters in float32 or float64, got torch.bfloat16 at \['w'\]"
    ):
        out.params["w"].sum().backward()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
# of torch's own compiler
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_penalty_is_not_compiled() -> None:
    meta = torch.ones(2, requires_grad=True)
    torch._dynamo.reset()
    rule = mo.Penalty()
    out = mo.minimize(
        square, SGD(0.1), torch.zeros(2), None, steps=1, meta=meta, differentiate=rule, compile=True
    )
    with pytest.raises(Exception, match="Penalty cannot be compiled"):
        out.params.sum().backward()


def test_forward_mode_names_an_operator_without_a_forward_derivative() -> None:
    grid = torch.zeros(1, 2, 2, 2)

    def loss(w: Tensor, _: Any, meta: Tensor) -> Tensor:
        return F.grid_sample(w * meta, grid, align_corners=False).square().sum()

    meta = torch.ones((), requires_grad=True)
    out = mo.minimize(
        loss,
        SGD(0.1),
        torch.ones(1, 1, 3, 3),
        None,
        steps=2,
        meta=meta,
        differentiate=mo.ForwardMode(),
    )
    with pytest.raises(
        ValueError,
        match=r"`ForwardMode` needs the forward derivative of every operator .* got `\w*grid_sampl",
    ):
        out.params.sum().backward()


def test_microbatches_do_not_split_levels_below() -> None:
    def loss(inputs: Any, w: Tensor, state: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
        return (w * batch).mean(), w

    inputs = {"optimizer": {}, "loss": {}, "meta": None, "batch": None}
    loop = InnerLoop(
        loss,
        lambda i, g, s, w, l, aux: (w - g, s),
        inputs,
        torch.ones(2),
        (),
        torch.ones(3, 4, 2),
        3,
    )
    with pytest.raises(
        ValueError,
        match="`microbatches=2` needs a loss that is a mean over examples and nothing else",
    ):
        mo.Backprop("steps", microbatches=2).attach(loop)


@float64
def test_the_formulas_of_the_tests_are_dense() -> None:
    """`stated` itself, on 1/2 a w^2 - w m: H = a, so that -C(H^-1 v) = v / a."""
    problem = replace(
        logistic(),
        loss=lambda w, _, m: (3 * w**2 / 2 - w * m).sum(),
        start=torch.zeros(2),
        meta=torch.ones(2),
        steps=50,
    )
    problem = replace(problem, outer=lambda w: (w * torch.tensor([1.0, 2.0])).sum())
    assert_close(stated(problem, "inverse"), torch.tensor([1 / 3, 2 / 3]), 1e-12)
    assert_close(flat([stated(problem, "identity")]), torch.tensor([1.0, 2.0]), 1e-12)


@pytest.mark.parametrize(
    "rule", [mo.FiniteDifference(5.0), mo.FiniteDifference(), mo.SAMA(5.0)], ids=str
)
def test_a_cotangent_of_zero_gives_zero(rule: Any) -> None:
    """Also with a radius that, divided by the least number there is, is none.

    And with what comes of it once more.
    """
    w, c = torch.ones(2, requires_grad=True), torch.zeros((), requires_grad=True)

    def loss(params: Any, _: Any, w: Tensor) -> Tensor:
        return ((params["a"] - w) ** 2).sum()

    end = mo.minimize(
        loss, SGD(0.1), {"a": torch.zeros(2)}, None, steps=3, meta=w, differentiate=rule
    ).params["a"]
    (first,) = torch.autograd.grad((end * c).sum(), w, create_graph=True)
    assert (first == 0).all()
    (second,) = torch.autograd.grad(first.sum(), c, create_graph=True)
    assert second.isfinite()
    (third,) = torch.autograd.grad(second, c, allow_unused=True)
    assert third is None or third.isfinite()


RULES_THAT_LOOK_AGAIN = {
    "steps": mo.Backprop("steps"),
    "Revolve": mo.Backprop(mo.Revolve(1)),
    "ForwardMode": mo.ForwardMode(),
    "T1T2": mo.T1T2(),
    "FiniteDifference": mo.FiniteDifference(),
    "SAMA": mo.SAMA(),
    "Implicit": mo.Implicit(mo.ConjugateGradient(max_steps=3)),
    "Penalty": mo.Penalty(steps=3),
    "EvolutionStrategy": mo.EvolutionStrategy(pairs=4),
}


@pytest.mark.parametrize("rule", RULES_THAT_LOOK_AGAIN)
@pytest.mark.parametrize("inside", [False, True], ids=["the loop", "a loop in its loss"])
@float64
def test_a_model_may_be_in_another_mode_on_the_way_back(rule: str, inside: bool) -> None:
    """`minimize`, `model.eval()`, a validation loss, `backward`: what is differentiated has run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    net, x, y = mo.functional(model), 2 * torch.randn(8, 3) + 1, torch.randn(8, 1)

    def loss(params: Any, _: None, meta: Tensor) -> Tensor:
        start = params
        if inside:
            params = mo.minimize(fit, SGD(0.1), params, None, steps=1).params
        return fit(params, None) + meta * sum(p.square().sum() for p in start.values())

    def fit(params: Any, _: None) -> Tensor:
        return (net(params, x) - y).square().mean()

    def slope(*, is_left: bool) -> Tensor:
        torch.manual_seed(1)
        meta = torch.tensor(0.1, requires_grad=True)
        how = copy.deepcopy(RULES_THAT_LOOK_AGAIN[rule])
        model.train()
        end = mo.minimize(
            loss, SGD(0.1), net.params, None, steps=2, meta=meta, differentiate=how
        ).params
        model.train(not is_left)
        (found,) = torch.autograd.grad(sum(p.square().sum() for p in end.values()), meta)
        assert all(layer.training != is_left for layer in model)
        return found

    assert_close(slope(is_left=True), slope(is_left=False), 1e-10)
