"""What the rules that look at the end of a loop promise besides their formula: purity, one mask, preconditioners, compilation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bilevel import flat, logistic, stated
from problems import Formula, adam, adamw, assert_close, leaf, rmsprop
from torch import Tensor, nn
from torch.func import grad

import metaopt as mo
from metaopt.differentiate import End, InnerLoop, PointRule, attach
from metaopt.tasks.digits import digits
from metaopt.transforms import is_tracked
from optimizers import SGD, Adam, AdamW, ClipNorm, LSTMOptimizer, MLPOptimizer, RMSprop

float64 = pytest.mark.usefixtures("float64")
CG = mo.ConjugateGradient(max_steps=3)
POINT_RULES: list[PointRule] = [mo.Implicit(CG), mo.T1T2(), mo.FiniteDifference(), mo.SAMA(), mo.Penalty()]


def kind(rule: Any) -> str:
    return type(rule).__name__


each_rule = pytest.mark.parametrize("rule", POINT_RULES, ids=kind)


@dataclass(frozen=True)
class Record:
    """A rule that keeps the loop it is given."""

    loops: list[InnerLoop] = field(default_factory=list)

    def __call__(self, loop: InnerLoop) -> Any:
        self.loops.append(loop)
        return mo.Backprop()(loop)


def recorded(*args: Any, **kwargs: Any) -> tuple[InnerLoop, End]:
    """Return the loop that `minimize` builds, and where it ends."""
    record = Record()
    with torch.no_grad():
        out = mo.minimize(*args, **kwargs, differentiate=record)
    (loop,) = record.loops
    return loop, End(out.params, out.opt_state, mo.tree.index(loop.batches, -1))


# --- SAMA's preconditioner


def loss_of_two(w: dict[str, Tensor], _: Any, meta: Tensor) -> Tensor:
    return (w["a"] ** 4).sum() / 4 + torch.sin(w["b"] * meta).sum() + (w["a"].sum() * w["b"]).square().sum()


def two_leaves() -> dict[str, Tensor]:
    return {"a": torch.tensor([0.9, -0.4, 0.3]), "b": torch.tensor([[0.5, -1.1]])}


HAND: dict[str, tuple[Callable[[], mo.Optimizer], Formula, dict[str, float]]] = {
    "Adam": (lambda: Adam(0.003), adam, {"lr": 0.003, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "eps_root": 0.0}),
    "AdamW": (
        lambda: AdamW(0.003, weight_decay=0.1),
        adamw,
        {"lr": 0.003, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "eps_root": 0.0, "weight_decay": 0.1},
    ),
    "RMSprop": (lambda: RMSprop(0.003), rmsprop, {"lr": 0.003, "alpha": 0.99, "eps": 1e-8}),
}
LEARNED: dict[str, Callable[[], mo.Optimizer]] = {
    "LSTM": lambda: LSTMOptimizer(4, scale=0.003).double(),
    "MLP": lambda: MLPOptimizer(4, step_size=0.003).double(),
    "clipped": lambda: ClipNorm(0.1, SGD(0.003, momentum=0.9)),
}


@float64
@pytest.mark.parametrize("name", [*HAND, *LEARNED])
def test_the_preconditioner_is_the_derivative_of_the_update(name: str) -> None:
    """At steps 1, ..., 1000: against autograd of the formula by hand or, for what has none, central differences of the update.

    Differences of a displacement of 1e-6 leave 1e-12 of bias and 1e-10 of rounding, relative to updates over 1e-3.
    """
    optimizer = (HAND[name][0] if name in HAND else LEARNED[name])()
    meta, v = torch.tensor(0.7), {"a": torch.tensor([1.0, -2.0, 0.5]), "b": torch.tensor([[0.3, 0.7]])}
    loop, _ = recorded(loss_of_two, optimizer, two_leaves(), None, steps=1, meta=meta)
    params, state = two_leaves(), optimizer.requires_grad_(False).init(two_leaves())
    for step in range(1, 1001):
        grads = grad(loss_of_two)(params, None, meta)
        with torch.no_grad():
            updates, after = optimizer(grads, state, params)
        if step in (1, 2, 5, 20, 100, 1000):
            x = mo.SAMA().precondition(loop, End(params, state, None), v)
            if name in HAND:
                _, formula, h = HAND[name]
                for k in params:
                    g, slots = leaf(grads[k]), {s: slot[k] for s, slot in state["slots"].items()}
                    (expected,) = torch.autograd.grad((formula(step, params[k], g, h, slots)[0] * v[k]).sum(), g)
                    assert_close(x[k], expected, 1e-9)
            else:
                at, small = mo.tree.ravel(grads), 1e-6 * grads["a"].abs().max()
                sides = [
                    [optimizer(mo.tree.unravel(at + sign * small * e, grads), state, params)[0] for e in torch.eye(5)]
                    for sign in (1, -1)
                ]
                rows = [(mo.tree.ravel(u) - mo.tree.ravel(d)) / (2 * small) for u, d in zip(*sides, strict=True)]
                expected = torch.stack(rows) @ mo.tree.ravel(v)
                torch.testing.assert_close(mo.tree.ravel(x), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
        params, state = mo.apply_updates(params, updates), after


@float64
def test_sama_with_adam_is_its_formula() -> None:
    """At the state after the last step: [d grad_w L]' D' v with D of the step that would come next."""
    bilevel = logistic()
    meta = leaf(bilevel.meta)
    out = mo.minimize(
        bilevel.loss, Adam(0.1, eps=1e-2), bilevel.start, bilevel.batch, steps=7, meta=meta, differentiate=mo.SAMA(1e-4)
    )
    (bar,) = torch.autograd.grad(bilevel.outer(out.params), meta)

    w, slots = leaf(out.params), {name: slot.detach() for name, slot in out.opt_state["slots"].items()}
    (v,) = torch.autograd.grad(bilevel.outer(w), w)
    at = bilevel.meta.clone().requires_grad_()
    (g,) = torch.autograd.grad(bilevel.loss(w, bilevel.batch, at), w, create_graph=True)
    h = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-2, "eps_root": 0.0}
    after, _ = adam(8, w.detach(), g, h, slots)
    (expected,) = torch.autograd.grad((after * v).sum(), at)
    assert_close(bar, expected, 1e-7)  # radius 1e-4


# --- one mask


class Net(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(dropout), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x)).relu()))


def digits_problem(dropout: float) -> tuple[Net, InnerLoop, End, Callable[[Any], Tensor], Tensor]:
    """Return a network trained for a while, weights of its examples as meta, and the loss of other digits."""
    torch.manual_seed(0)
    model = Net(dropout)
    net = mo.functional(model)
    images, labels = digits()
    meta = torch.zeros(128)

    def loss(params: Any, batch: Any, meta: Tensor) -> Tensor:
        x, y = batch
        return (torch.sigmoid(meta) * F.cross_entropy(net(params, x), y, reduction="none")).mean()

    still = mo.functional(Net(0.0))

    def outer(params: Any) -> Tensor:
        return F.cross_entropy(still(params, images[128:640]), labels[128:640])

    torch.manual_seed(1)
    clean = mo.functional(Net(0.0))
    start = {k: p.detach().clone() for k, p in clean.params.items()}
    batch = (images[:128], labels[:128])
    loop, _ = recorded(loss, SGD(0.1), start, batch, steps=1, meta=meta)
    trained = mo.minimize(lambda w, b: F.cross_entropy(clean(w, b[0]), b[1]), SGD(0.1), start, batch, steps=10)
    return model, loop, End(mo.tree.map(Tensor.detach, trained.params), trained.opt_state, ()), outer, meta


def hypergradient(rule: PointRule, loop: InnerLoop, end: End, outer: Callable[[Any], Tensor], meta: Tensor) -> Tensor:
    meta = meta.clone().requires_grad_()
    params = attach(rule, replace(loop, inputs={**loop.inputs, "meta": meta}), end)
    outer(params).backward()
    assert meta.grad is not None
    return meta.grad


@pytest.mark.parametrize(
    "rule", [mo.FiniteDifference(), mo.SAMA(), mo.Penalty(100.0, 10, 0.3)], ids=lambda rule: type(rule).__name__
)
def test_both_sides_see_one_dropout_mask(rule: PointRule) -> None:
    """Cosine to the same rule without dropout above .95, nothing left behind; two masks would give noise."""
    _, *clean, meta = digits_problem(0.0)
    expected = hypergradient(rule, *clean, meta)
    model, loop, end, outer, meta = digits_problem(0.1)
    weights, buffers = ([t.clone() for t in tensors()] for tensors in (model.parameters, model.buffers))
    values = [p.clone() for p in end.params.values()]
    random = torch.get_rng_state()
    found = hypergradient(rule, loop, end, outer, meta)
    assert torch.equal(random, torch.get_rng_state())
    assert all(map(torch.equal, weights, model.parameters()))
    assert all(map(torch.equal, buffers, model.buffers()))
    assert all(map(torch.equal, values, end.params.values()))
    assert F.cosine_similarity(found, expected, dim=0) >= 0.95

    if isinstance(rule, mo.FiniteDifference):  # the same with a mask for each side
        v = grad(outer)(end.params)
        length = mo.tree.norm(v)
        sides = [mo.tree.map(lambda w, v, s=s: w + s * 0.01 / length * v, end.params, v) for s in (1, -1)]
        batch = loop.inputs["batch"]
        one, two = (grad(lambda m, w=w: loop.loss({**loop.inputs, "meta": m}, w, (), batch)[0])(meta) for w in sides)
        assert F.cosine_similarity(two - one, expected, dim=0) < 0.5


@float64
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("rule", "exact"), [(mo.FiniteDifference(1e-4), mo.T1T2()), (mo.Penalty(1e6, 200, 0.3), mo.Implicit(mo.Direct()))], ids=kind
)
def test_with_dropout_the_difference_is_the_exact_product(rule: PointRule, exact: PointRule, batched: bool) -> None:
    """Of the very same mask, one per row of a `vmap`; and a second backward pass sees it again. Radius and weight leave 1e-6."""

    def value(meta: Tensor, rule: PointRule) -> Tensor:
        def loss(w: Tensor, x: Tensor, meta: Tensor) -> Tensor:
            return F.dropout(torch.tanh(x * w * meta), 0.4).square().mean() + (w - meta).square().sum() / 2

        x = torch.linspace(-2, 2, 60).reshape(20, 3)
        out = mo.minimize(loss, SGD(0.1), torch.zeros(3), x, steps=3, meta=meta, differentiate=rule)
        return out.params.sin().sum()

    def slopes(rule: PointRule) -> Tensor:
        torch.manual_seed(5)
        meta = torch.tensor([[0.7, -0.5, 1.2], [0.7, -0.5, 1.2]])
        if batched:
            return torch.func.vmap(grad(value), (0, None), randomness="different")(meta, rule)
        meta.requires_grad_()
        total = value(meta[0], rule)
        random = torch.get_rng_state()
        once, twice = (torch.autograd.grad(total, meta, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(once, twice)
        assert torch.equal(random, torch.get_rng_state())
        return once

    found, expected = slopes(rule), slopes(exact)
    assert_close(found, expected, 1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # another mask, another derivative


def test_in_float32_the_difference_is_near_the_exact_product() -> None:
    """With DARTS' radius: truncation and rounding together are 1 % at most."""
    _, *problem, meta = digits_problem(0.0)
    exact, found = (hypergradient(rule, *problem, meta) for rule in (mo.T1T2(), mo.FiniteDifference()))
    assert (found - exact).norm() < 0.01 * exact.norm()


@float64
def test_a_zero_cotangent_gives_zero() -> None:
    bilevel = logistic()
    for rule in POINT_RULES:
        found = grad(lambda meta, rule=rule: 0 * bilevel.value(rule, meta))(bilevel.meta)
        assert (found == 0).all(), rule


# --- differentiable again


@float64
@pytest.mark.parametrize("kind", ["T1T2", "difference", "SAMA", "penalty"])
def test_the_second_derivative_is_that_of_the_formula(kind: str) -> None:
    """By hand: with dw/dl given by the rule's own formula, d/dl <h(l), u> = h_l + h_w dw/dl, all by autograd at the end.

    SAMA's D for SGD is -lr. Differences: radius 1e-3 leaves 1e-6.
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

    def value(start: Tensor, lr: Any = 0.1) -> Tensor:
        out = mo.minimize(bilevel.loss, SGD(lr), start, bilevel.batch, steps=2, meta=bilevel.meta, differentiate=rule)
        assert not tracks((out.opt_state, out.losses))
        return out.params.sum()

    name = type(rule).__name__
    with pytest.raises(ValueError, match=f"{name}: the initial parameters must not be differentiated"):
        grad(value)(bilevel.start)
    with pytest.raises(ValueError, match=f"{name}: the optimizer's tensors must not be differentiated"):
        grad(lambda lr: value(bilevel.start, lr))(torch.tensor(0.1))
    assert not value(bilevel.start.requires_grad_(), nn.Parameter(torch.tensor(0.1))).requires_grad


@float64
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own forward mode uses it
@pytest.mark.parametrize(
    "rule", [*POINT_RULES, mo.Backprop("steps"), mo.ForwardMode(), mo.Backprop("steps", hvp="forward")], ids=repr
)
def test_a_loss_that_reads_the_state_and_hands_on_results(rule: Any) -> None:
    """State (optimizer's, running mean of w); the loss pulls w to that mean, and hands on the new one."""

    def loss(inputs: Any, w: Tensor, state: Any, batch: Any) -> tuple[Tensor, Tensor]:
        _, mean = state
        return (w - inputs["meta"] * mean).square().sum() / 2 + (w**4).sum() / 12, 0.5 * mean + 0.5 * w.sin()

    def update(inputs: Any, grads: Tensor, state: Any, w: Tensor, loss: Tensor, aux: Tensor) -> tuple[Tensor, Any]:
        steps, _ = state
        return w - 0.4 * grads, (steps + 1, aux)

    def by_hand(w: Tensor, mean: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(3):
            g = w - meta * mean + w**3 / 3
            w, mean = w - 0.4 * g, 0.5 * mean + 0.5 * w.sin()
        return w, mean

    start, mean, meta = torch.tensor([0.3, -0.6]), torch.tensor([1.0, 0.5]), torch.tensor(0.8, requires_grad=True)
    inputs = {"optimizer": {}, "loss": {}, "meta": meta, "batch": None}
    loop = InnerLoop(loss, update, inputs, start, (torch.tensor(0), mean), (), 3)
    w, (steps, last), losses = rule(loop)
    expected_w, expected_mean = by_hand(start, mean, meta)
    assert steps == 3
    assert losses.shape == (3,)
    assert_close([w, last], [expected_w, expected_mean], 1e-12)
    if isinstance(rule, PointRule):
        v = torch.ones(2)
        x = {"SAMA": 0.4 * v, "Implicit": v / (1 + w**2), "Penalty": v / (1 + w**2)}.get(type(rule).__name__, v)
        assert_close(torch.autograd.grad(w.sum(), meta)[0], (x * last).sum(), 2e-2 if isinstance(rule, mo.Penalty) else 1e-5)
    else:
        found, expected = (
            torch.autograd.grad(w.sum() + mean.sum(), meta)[0] for w, mean in ((w, last), (expected_w, expected_mean))
        )
        assert_close(found, expected, 1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # of torch's own compiler
@pytest.mark.parametrize(
    "rule", [rule for rule in POINT_RULES if not isinstance(rule, mo.Penalty)], ids=lambda rule: type(rule).__name__
)
def test_compiled_is_equal(rule: PointRule) -> None:
    def run(compile: bool) -> Tensor:
        meta = torch.linspace(-1, 1, 10).requires_grad_()
        x, y = torch.linspace(-2, 2, 30).reshape(10, 3), (torch.arange(10) % 2).float()

        def loss(w: Tensor, batch: tuple[Tensor, Tensor], meta: Tensor) -> Tensor:
            x, y = batch
            logits = x @ w
            return ((F.softplus(logits) - y * logits) * meta.sigmoid()).sum() + w.square().sum() / 2

        out = mo.minimize(loss, SGD(0.1), torch.zeros(3), (x, y), steps=4, meta=meta, differentiate=rule, compile=compile)
        (out.params - 1).square().sum().backward()
        assert meta.grad is not None
        return meta.grad

    torch._dynamo.reset()
    # float32; a difference of radius 0.01 multiplies rounding by 100
    torch.testing.assert_close(run(True), run(False), rtol=1e-4, atol=1e-5)


@float64
@each_rule
def test_nothing_is_pulled_back_to_what_only_the_optimizer_reads(rule: PointRule) -> None:
    """A level of `grad` that differentiates the optimizer's tensors alone, around one that differentiates `meta`."""
    loop, end = recorded(square, SGD(torch.tensor(0.1)), torch.zeros(2), None, steps=3, meta=torch.ones(2))

    def value(meta: Tensor, lr: Tensor) -> Tensor:
        return attach(rule, replace(loop, inputs={**loop.inputs, "meta": meta, "optimizer": {"lr": lr}}), end).square().sum()

    lr, meta = torch.tensor(0.1), torch.ones(2)
    of_lr = grad(lambda lr: grad(value)(meta, lr).sum())(lr)
    of_meta = grad(value)(meta, lr)
    assert_close(of_lr, (of_meta / lr).sum() if isinstance(rule, mo.SAMA) else torch.tensor(0.0), 1e-6)  # SAMA's D is -lr


# --- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mo.FiniteDifference(0.0), "FiniteDifference: `radius` must be a positive number, got 0.0"),
        (lambda: mo.SAMA(radius=-1), "SAMA: `radius` must be a positive number, got -1"),
        (lambda: mo.Penalty(weight=float("nan")), "Penalty: `weight` must be a positive number, got nan"),
        (lambda: mo.Penalty(lr=True), "Penalty: `lr` must be a positive number, got True"),
        (lambda: mo.Penalty(steps=0), "Penalty: `steps` must be a positive integer, got 0"),
        (lambda: mo.EvolutionStrategy(std=0), "EvolutionStrategy: `std` must be a positive number, got 0"),
        (lambda: mo.EvolutionStrategy(pairs=1.5), "EvolutionStrategy: `pairs` must be a positive integer, got 1.5"),
    ],
)
def test_bad_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_point_rule_defines_its_pullback() -> None:
    class Empty(PointRule):
        pass

    with pytest.raises(TypeError, match="Empty must define `pull_back"):
        grad(lambda m: mo.minimize(square, SGD(0.1), torch.zeros(2), None, steps=1, meta=m, differentiate=Empty()).params.sum())(
            torch.ones(2)
        )


def square(w: Tensor, _: Any, meta: Tensor) -> Tensor:
    return (w - meta).square().sum()


@pytest.mark.parametrize("rule", [mo.FiniteDifference(), mo.SAMA()])
def test_half_precision_parameters_are_refused(rule: PointRule) -> None:
    meta = torch.ones(2, requires_grad=True)
    start = {"w": torch.zeros(2, dtype=torch.bfloat16)}

    def loss(w: dict[str, Tensor], _: Any, meta: Tensor) -> Tensor:
        return square(w["w"], None, meta)

    out = mo.minimize(loss, SGD(0.1), start, None, steps=1, meta=meta, differentiate=rule)
    with pytest.raises(ValueError, match=r"need parameters in float32 or float64, got torch.bfloat16 at \['w'\]"):
        out.params["w"].sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # of torch's own compiler
def test_penalty_is_not_compiled() -> None:
    meta = torch.ones(2, requires_grad=True)
    torch._dynamo.reset()
    rule = mo.Penalty()
    out = mo.minimize(square, SGD(0.1), torch.zeros(2), None, steps=1, meta=meta, differentiate=rule, compile=True)
    with pytest.raises(Exception, match="Penalty cannot be compiled"):
        out.params.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own forward mode uses it
def test_forward_mode_names_an_operator_without_a_forward_derivative() -> None:
    grid = torch.zeros(1, 2, 2, 2)

    def loss(w: Tensor, _: Any, meta: Tensor) -> Tensor:
        return F.grid_sample(w * meta, grid, align_corners=False).square().sum()

    meta = torch.ones((), requires_grad=True)
    out = mo.minimize(loss, SGD(0.1), torch.ones(1, 1, 3, 3), None, steps=2, meta=meta, differentiate=mo.ForwardMode())
    with pytest.raises(ValueError, match=r"`ForwardMode` needs the forward derivative of every operator .* got `\w*grid_sampl"):
        out.params.sum().backward()


def test_microbatches_do_not_split_levels_below() -> None:
    def loss(inputs: Any, w: Tensor, state: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
        return (w * batch).mean(), w

    inputs = {"optimizer": {}, "loss": {}, "meta": None, "batch": None}
    loop = InnerLoop(loss, lambda i, g, s, w, l, aux: (w - g, s), inputs, torch.ones(2), (), torch.ones(3, 4, 2), 3)
    with pytest.raises(ValueError, match="`microbatches=2` needs a loss that is a mean over examples and nothing else"):
        mo.Backprop("steps", microbatches=2)(loop)


@float64
def test_the_formulas_of_the_tests_are_dense() -> None:
    """`stated` itself, on 1/2 a w^2 - w m: H = a, so that -C(H^-1 v) = v / a."""
    problem = replace(
        logistic(), loss=lambda w, _, m: (3 * w**2 / 2 - w * m).sum(), start=torch.zeros(2), meta=torch.ones(2), steps=50
    )
    problem = replace(problem, outer=lambda w: (w * torch.tensor([1.0, 2.0])).sum())
    assert_close(stated(problem, "inverse"), torch.tensor([1 / 3, 2 / 3]), 1e-12)
    assert_close(flat([stated(problem, "identity")]), torch.tensor([1.0, 2.0]), 1e-12)
