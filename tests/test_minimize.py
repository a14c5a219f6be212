"""Meta-gradients of `minimize`, first and second order.

They are compared with loops written by hand and with finite differences.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from problems import (
    VARIANTS,
    Variant,
    as_parameters,
    assert_close,
    by_hand,
    leaf,
    memory,
    outer,
    regression,
    start,
    two_derivatives,
)
from torch import Tensor, nn
from torch.func import grad, grad_and_value, jacfwd, jacrev, vmap

import metaopt as mo
from metaopt import tree
from optimizers import SGD, Adam

pytestmark = pytest.mark.usefixtures("float64")

# two orders of summation in float64, after at most some ten steps and two derivatives
EXACT = 1e-10
MODES = ["full", "steps"]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
each_memory = pytest.mark.parametrize("mode", MODES)


def rows(batches: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [tree.index(batches, t) for t in range(len(batches[0]))]


def resumed(optimizer: mo.Optimizer, params: dict[str, Tensor], slots: dict, done: int) -> dict:
    return optimizer.init(params) | {"step": torch.tensor(done), "slots": slots}


@each_memory
@each_variant
@pytest.mark.parametrize("done", [0, 3], ids=["fresh", "resumed"])
def test_both_derivatives_equal_autograd_through_the_loop_by_hand(
    variant: Variant, mode: str, done: int
) -> None:
    params, batches, meta = start()
    slots = memory(params, variant.slots)
    params, batches, meta, slots = leaf((params, batches, meta, slots))
    h = as_parameters(variant.tensors())
    # At the first step the velocity is replaced, not decayed: only later does its initial value
    # matter.
    inputs = [
        *tree.leaves((params, batches, meta)),
        *h.values(),
        *(tree.leaves(slots) if done else []),
    ]
    known = slots if done else tree.map(torch.zeros_like, slots)

    optimizer = variant.build(h)
    state = resumed(optimizer, params, slots, done) if done else None
    out = mo.minimize(
        regression,
        optimizer,
        params,
        batches,
        meta=meta,
        opt_state=state,
        differentiate=mo.Backprop(memory=mode),
    )
    expected = by_hand(
        regression, variant.formula, h, params, rows(batches), meta, known, done=done
    )

    assert_close((out.params, out.opt_state["slots"], out.losses), expected, 1e-12)
    assert int(out.opt_state["step"]) == done + 4
    found = two_derivatives(outer(out.params, out.opt_state["slots"], out.losses), inputs)
    wanted = two_derivatives(outer(*expected), inputs)
    scale = max(tensor.abs().max() for tensor in [*wanted[0], *wanted[1]])
    assert all((g != 0).any() for g in wanted[0]), "an input without influence would prove nothing"
    assert_close(tree.map(lambda g: g / scale, found), tree.map(lambda g: g / scale, wanted), EXACT)


@each_variant
def test_rebuilt_steps_equal_kept_ones(variant: Variant) -> None:
    params, batches, meta = start()
    results = []
    for mode in MODES:
        h, point = as_parameters(variant.tensors()), leaf((params, batches, meta))
        out = mo.minimize(
            regression,
            variant.build(h),
            point[0],
            point[1],
            meta=point[2],
            differentiate=mo.Backprop(memory=mode),
        )
        results.append(
            two_derivatives(
                outer(out.params, out.opt_state["slots"], out.losses),
                [*tree.leaves(point), *h.values()],
            )
        )
    scale = max(tensor.abs().max() for tensor in tree.leaves(results[0]))
    assert_close(*[tree.map(lambda g: g / scale, result) for result in results], 1e-12)


@each_memory
@each_variant
def test_plain_tensors_as_hyperparameters_inside_func_grad(variant: Variant, mode: str) -> None:
    params, batches, meta = start()

    def value(h: dict[str, Tensor], params: dict, batches: tuple, meta: Tensor) -> Tensor:
        out = mo.minimize(
            regression,
            variant.build(h),
            params,
            batches,
            meta=meta,
            differentiate=mo.Backprop(memory=mode),
        )
        return outer(out.params, out.opt_state["slots"], out.losses)

    inputs = leaf((variant.tensors(), params, batches, meta))
    zeros = tree.map(torch.zeros_like, memory(params, variant.slots))
    wanted = outer(
        *by_hand(
            regression, variant.formula, inputs[0], inputs[1], rows(inputs[2]), inputs[3], zeros
        )
    )
    first, second = two_derivatives(wanted, tree.leaves(inputs))

    arguments = (variant.tensors(), params, batches, meta)
    found = grad(value, argnums=(0, 1, 2, 3))(*arguments)
    scale = max(g.abs().max() for g in first + second)
    assert_close([g / scale for g in tree.leaves(found)], [g / scale for g in first], EXACT)

    def mixed(*arguments: object) -> Tensor:
        gradients = tree.leaves(grad(value, argnums=(0, 1, 2, 3))(*arguments))
        return sum(
            (g * torch.linspace(-1, 1.3, g.numel()).reshape(g.shape)).sum() for g in gradients
        )

    found = grad(mixed, argnums=(0, 1, 2, 3))(*arguments)
    assert_close([g / scale for g in tree.leaves(found)], [g / scale for g in second], EXACT)


@each_memory
@each_variant
def test_finite_differences_agree(variant: Variant, mode: str) -> None:
    """A witness that shares neither our code nor autograd.

    Central differences of the values, then of the gradient.
    """
    params, batches, meta = start()
    tensors = leaf((variant.tensors(), params, batches[1], meta))
    flat, structure = tree.flatten(tensors)

    def value(*leaves: Tensor) -> Tensor:
        h, params, targets, meta = tree.unflatten(structure, leaves)
        rule = mo.Backprop(memory=mode)
        out = mo.minimize(
            regression,
            variant.build(h),
            params,
            (batches[0], targets),
            meta=meta,
            differentiate=rule,
        )
        return out.params["w"].sum() + out.params["b"].square().sum() + out.losses.sum()

    # One random direction per input: the differences cost 2 runs each instead of 2 per entry.
    assert torch.autograd.gradcheck(value, flat, fast_mode=True, atol=1e-5, rtol=1e-4)
    assert torch.autograd.gradgradcheck(value, flat, fast_mode=True, atol=1e-5, rtol=1e-4)


@each_memory
@each_variant
def test_first_order_equals_a_loop_with_detached_gradients(variant: Variant, mode: str) -> None:
    params, batches, meta = start()
    params, batches, meta = leaf((params, batches, meta))
    h = as_parameters(variant.tensors())
    inputs = [*tree.leaves((params, batches, meta)), *h.values()]
    zeros = tree.map(torch.zeros_like, memory(params, variant.slots))
    out = mo.minimize(
        regression,
        variant.build(h),
        params,
        batches,
        meta=meta,
        differentiate=mo.FirstOrder(memory=mode),
    )
    expected = by_hand(
        regression, variant.formula, h, params, rows(batches), meta, zeros, first_order=True
    )

    found = two_derivatives(outer(out.params, out.opt_state["slots"], out.losses), inputs)
    wanted = two_derivatives(outer(*expected), inputs)
    scale = max(tensor.abs().max() for tensor in [*wanted[0], *wanted[1]])
    assert_close(tree.map(lambda g: g / scale, found), tree.map(lambda g: g / scale, wanted), EXACT)
    exact = mo.minimize(regression, variant.build(h), params, batches, meta=meta)
    exact_gradient = torch.autograd.grad(
        outer(exact.params, exact.opt_state["slots"], exact.losses), inputs
    )
    difference = torch.cat(
        [(a - b).flatten() for a, b in zip(exact_gradient, wanted[0], strict=True)]
    ).norm()
    assert difference > 1e-3 * scale, (
        "the problem must tell the first order from the exact gradient"
    )


def test_first_order_needs_no_second_derivative() -> None:
    """The backward pass of the loss is not recorded.

    An operator without a second derivative is fine.
    """

    class Cube(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x**3

        @staticmethod
        def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(*inputs)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, cotangent):  # type: ignore[no-untyped-def]
            (x,) = ctx.saved_tensors
            return 3 * x**2 * cotangent

    lr = torch.tensor(0.1, requires_grad=True)
    w = torch.tensor(0.5)
    mo.minimize(
        lambda w, _: Cube.apply(w), SGD(lr=lr), w, None, steps=1, differentiate=mo.FirstOrder()
    ).params.backward()
    torch.testing.assert_close(lr.grad, -torch.tensor(3 * 0.5**2))


@each_memory
def test_jacobian_and_vmap_over_the_step_size(mode: str) -> None:
    params, batches, meta = start()

    def final(lr: Tensor) -> Tensor:
        return mo.minimize(
            regression,
            Adam(lr=lr),
            params,
            batches,
            meta=meta,
            differentiate=mo.Backprop(memory=mode),
        ).params["w"]

    lr = torch.tensor(0.05, requires_grad=True)
    w, *_ = by_hand(
        regression,
        VARIANTS[5].formula,
        {"lr": lr, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "eps_root": 0.0},
        leaf(params),
        rows(batches),
        meta,
        tree.map(torch.zeros_like, memory(params, ("mean", "square"))),
    )
    wanted = torch.stack(
        [torch.autograd.grad(entry, lr, retain_graph=True)[0] for entry in w["w"].flatten()]
    ).reshape(3, 2)
    assert_close(jacrev(final)(lr.detach()), wanted, EXACT)

    rates = torch.tensor([0.01, 0.05, 0.1])
    assert_close(vmap(final)(rates), torch.stack([final(rate) for rate in rates]), 1e-12)
    assert_close(vmap(jacrev(final))(rates)[1], wanted, EXACT)
    hessians = vmap(jacrev(jacrev(final)))(rates)
    assert_close(hessians, torch.stack([jacrev(jacrev(final))(rate) for rate in rates]), EXACT)


@each_memory
def test_forward_mode_passes_through_the_loop(mode: str) -> None:
    params, batches, meta = start()

    def final(lr: Tensor) -> Tensor:
        rule = mo.Backprop(memory=mode)  # type: ignore[arg-type]
        return mo.minimize(
            regression, SGD(lr=lr, momentum=0.9), params, batches, meta=meta, differentiate=rule
        ).params["w"]

    assert_close(jacfwd(final)(torch.tensor(0.1)), jacrev(final)(torch.tensor(0.1)), EXACT)
    forward_over_reverse = jacfwd(jacrev(final))
    if mode == "steps":  # a Function with `jvp` cannot be compiled; reverse over reverse is exact
        with pytest.raises(NotImplementedError, match="must implement the jvp function"):
            forward_over_reverse(torch.tensor(0.1))
    else:
        assert_close(
            forward_over_reverse(torch.tensor(0.1)), jacrev(jacrev(final))(torch.tensor(0.1)), EXACT
        )


class Penalised(nn.Module):
    """A loss with a parameter and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(-1.0))
        self.register_buffer("offset", torch.tensor(0.2))

    def forward(self, w: Tensor, target: Tensor) -> Tensor:
        return ((w - target) ** 2).sum() + self.strength.exp() * ((w - self.offset) ** 4).sum()


@each_memory
@pytest.mark.parametrize("rule", [mo.Backprop, mo.FirstOrder])
def test_a_loss_that_is_a_module_is_differentiated_in_its_parameters(mode: str, rule: type) -> None:
    loss = Penalised()
    w, targets = torch.randn(3), torch.randn(6, 3)
    out = mo.minimize(loss, SGD(lr=0.05), w, targets, differentiate=rule(memory=mode))
    (found,) = torch.autograd.grad(outer(out.params, (), out.losses), loss.strength)

    weights, losses = w.clone().requires_grad_(), []
    for target in targets:
        losses.append(
            ((weights - target) ** 2).sum() + loss.strength.exp() * ((weights - 0.2) ** 4).sum()
        )
        (g,) = torch.autograd.grad(losses[-1], weights, create_graph=True)
        weights = weights - 0.05 * (g.detach() if rule is mo.FirstOrder else g)
    (wanted,) = torch.autograd.grad(outer(weights, (), torch.stack(losses)), loss.strength)
    assert_close(found, wanted, EXACT)


@each_memory
def test_a_loss_module_inside_func_grad(mode: str) -> None:
    """`functional_call` on the loss puts other parameters in.

    They are seen through the closure check.
    """
    loss, w, targets = Penalised(), torch.randn(3), torch.randn(6, 3)

    def value(strength: Tensor) -> Tensor:
        return torch.func.functional_call(
            Runner(loss, mode), {"loss.strength": strength}, (w, targets)
        )

    found = grad(value)(loss.strength.detach())
    (wanted,) = torch.autograd.grad(Runner(loss, "full")(w, targets), loss.strength)
    assert_close(found, wanted, EXACT)


@each_memory
def test_a_loss_module_with_a_layer_in_several_places_and_tied_weights(mode: str) -> None:
    """`functional_call` on its own would lose the gradient.

    It would leave other tensors in the module.
    """

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
            other.weight = layer.weight
            self.layers, self.again, self.other = (
                nn.ModuleList([layer, nn.Tanh(), layer]),
                layer,
                other,
            )

        def forward(self, w: Tensor, _: None) -> Tensor:
            for layer in (*self.layers, self.again, self.other):
                w = layer(w)
            return w.square().sum()

    loss = Shared()
    before = [(name, id(p)) for name, p in loss.named_parameters(remove_duplicate=False)]
    for rule in (mo.Backprop(memory=mode), mo.Backprop()):  # type: ignore[arg-type]
        out = mo.minimize(loss, SGD(lr=0.1), torch.ones(3, 2), None, steps=3, differentiate=rule)
        gradients = torch.autograd.grad(out.losses.sum(), list(loss.parameters()))
        if rule == mo.Backprop(memory=mode):  # type: ignore[arg-type]
            found = gradients
    assert_close(found, gradients, 1e-12)
    assert [(name, id(p)) for name, p in loss.named_parameters(remove_duplicate=False)] == before


class Runner(nn.Module):
    """A module around a whole inner loop, as a meta-learner often is."""

    def __init__(self, loss: nn.Module, mode: str):
        super().__init__()
        self.loss, self.mode = loss, mode

    def forward(self, w: Tensor, targets: Tensor) -> Tensor:
        rule = mo.Backprop(memory=self.mode)  # type: ignore[arg-type]
        return mo.minimize(self.loss, SGD(lr=0.05), w, targets, differentiate=rule).losses.sum()


@each_memory
def test_one_batch_for_every_step_equals_that_batch_repeated(mode: str) -> None:
    params, batches, meta = start()
    one = leaf(tree.index(batches, 0))
    rule = mo.Backprop(memory=mode)
    same = mo.minimize(regression, SGD(lr=0.1), params, one, steps=5, meta=meta, differentiate=rule)
    rows = tree.map(lambda t: t.expand(5, *t.shape), one)
    repeated = mo.minimize(regression, SGD(lr=0.1), params, rows, meta=meta, differentiate=rule)
    assert_close(same.params, repeated.params, 1e-13)
    found, wanted = [torch.autograd.grad(run.losses.sum(), one) for run in (same, repeated)]
    assert_close(found, wanted, EXACT)


@each_memory
def test_two_halves_joined_by_opt_state_equal_the_whole(mode: str) -> None:
    params, batches, meta = start()
    params = leaf(params)
    rule, optimizer = mo.Backprop(memory=mode), Adam(lr=0.05)
    whole = mo.minimize(regression, optimizer, params, batches, meta=meta, differentiate=rule)
    first = mo.minimize(
        regression,
        optimizer,
        params,
        tree.index(batches, slice(0, 2)),
        meta=meta,
        differentiate=rule,
    )
    rest = tree.index(batches, slice(2, 4))
    second = mo.minimize(
        regression,
        optimizer,
        first.params,
        rest,
        meta=meta,
        opt_state=first.opt_state,
        differentiate=rule,
    )
    assert_close((second.params, second.opt_state), (whole.params, whole.opt_state), 1e-13)
    gradients = [
        torch.autograd.grad(outer(run.params, (), run.losses[-1:]), list(params.values()))
        for run in (second, whole)
    ]
    assert_close(*gradients, EXACT)


@each_memory
@pytest.mark.parametrize("rule", [mo.Backprop, mo.FirstOrder])
def test_random_numbers_are_those_of_a_plain_loop(mode: str, rule: type) -> None:
    """Dropout draws once a step, in order; looking for closures leaves no trace in the stream."""
    layer, x = nn.Dropout(0.4), torch.randn(8)

    def loss(w: Tensor, _: None) -> Tensor:
        return layer(w * x).square().sum()

    w = torch.randn(8)
    torch.manual_seed(3)
    out = mo.minimize(loss, SGD(lr=0.01), w, None, steps=5, differentiate=rule(memory=mode))
    after = torch.rand(1)
    torch.manual_seed(3)
    for t in range(5):
        weights = w.clone().requires_grad_()
        value = loss(weights, None)
        assert_close(out.losses[t], value.detach(), 1e-13)
        w = w - 0.01 * torch.autograd.grad(value, weights)[0]
    assert_close(out.params, w, 1e-13)
    assert torch.equal(after, torch.rand(1))


def noisy(w: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.dropout(w * x, 0.4).square().sum()


@pytest.mark.parametrize("rule", [mo.Backprop, mo.FirstOrder])
def test_a_rebuilt_step_draws_the_same_dropout_mask(rule: type) -> None:
    """Trap 5: new noise on the way back would give a silently wrong gradient."""
    rates, xs = torch.rand(3) / 10, torch.randn(5, 8)

    def final(lr: Tensor, mode: str) -> Tensor:
        out = mo.minimize(noisy, SGD(lr=lr), torch.ones(8), xs, differentiate=rule(memory=mode))
        return out.params.square().sum() + out.losses.sum()

    def under_a_seed(function: object) -> list[Tensor]:
        gradients = []
        for mode in MODES:
            torch.manual_seed(3)
            gradients.append(function(mode))  # type: ignore[operator]
        return gradients

    def backward(mode: str) -> Tensor:
        lr = rates[0].clone().requires_grad_()
        (g,) = torch.autograd.grad(final(lr, mode), lr, create_graph=True)
        return torch.stack([g, *torch.autograd.grad(g, lr)])

    assert_close(*under_a_seed(backward), 1e-12)
    assert_close(*under_a_seed(lambda mode: grad(final)(rates[0], mode)), 1e-12)
    for randomness in ("same", "different"):
        assert_close(
            *under_a_seed(
                lambda mode, r=randomness: vmap(lambda lr: grad(final)(lr, mode), randomness=r)(
                    rates
                )
            ),
            1e-12,
        )


def test_going_back_leaves_the_random_stream_alone() -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    out = mo.minimize(
        noisy,
        SGD(lr=lr),
        torch.ones(8),
        torch.randn(5, 8),
        differentiate=mo.Backprop(memory="steps"),
    )
    before = torch.get_rng_state()
    out.losses.sum().backward()
    assert torch.equal(before, torch.get_rng_state())


@each_memory
def test_inputs_are_left_as_they_were(mode: str) -> None:
    params, batches, meta = leaf(start())
    optimizer = Adam(lr=nn.Parameter(torch.tensor(0.1)))
    state = optimizer.init(params)
    before = tree.map(torch.clone, (params, batches, meta, state, optimizer.state_dict()))
    rule = mo.Backprop(memory=mode)
    mo.minimize(
        regression, optimizer, params, batches, meta=meta, opt_state=state, differentiate=rule
    ).losses.sum().backward()
    after = (params, batches, meta, state, optimizer.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(tree.leaves(before), tree.leaves(after), strict=True)
    )


def test_without_gradients_no_graph_is_built() -> None:
    params, batches, meta = leaf(start())
    for context in (torch.no_grad, torch.inference_mode):
        for mode in MODES:
            with context():
                out = mo.minimize(
                    regression,
                    SGD(lr=0.1),
                    params,
                    batches,
                    meta=meta,
                    differentiate=mo.Backprop(memory=mode),
                )
            assert not any(tensor.requires_grad for tensor in tree.leaves(tuple(out)))
            assert out.losses[-1] < out.losses[0]


RULES_IN_INFERENCE = {
    "full": mo.Backprop(),
    "steps": mo.Backprop("steps"),
    "Revolve": mo.Backprop(mo.Revolve(2)),
    "forward products": mo.Backprop("steps", hvp="forward"),
    "ForwardMode": mo.ForwardMode(),
    "Implicit": mo.Implicit(mo.Direct()),
    "FiniteDifference": mo.FiniteDifference(),
    "SAMA": mo.SAMA(),
}


@pytest.mark.parametrize("rule", RULES_IN_INFERENCE)
@pytest.mark.parametrize("inside", [False, True], ids=["tensors made before", "and in it"])
def test_transforms_in_inference_mode_are_right(rule: str, inside: bool) -> None:
    """Torch leaves inference mode in a transform, but not below it, and says that it does.

    A loop that runs below it as one operation took gradients of zero there.
    """

    def slopes(meta: Tensor, start: Tensor, batches: Tensor) -> dict[str, Any]:
        def value(meta: Tensor, batches: Tensor) -> Tensor:
            out = mo.minimize(
                lambda w, x, meta: ((w - meta - x) ** 2).sum(),
                SGD(0.1),
                start,
                batches,
                meta=meta,
                differentiate=RULES_IN_INFERENCE[rule],
            )
            return out.params.sum() ** 2

        first = grad_and_value(value, argnums=(0, 1))
        return {
            "first": first(meta, batches),
            "second": grad(lambda meta: first(meta, batches)[0][0])(meta),
            "batched": vmap(first, (0, None))(meta.expand(2), batches),
        }

    given = torch.tensor(1.3), torch.zeros(2), torch.ones(3, 2)
    expected = slopes(*given)
    with torch.inference_mode():
        if inside:
            given = torch.tensor(1.3), torch.zeros(2), torch.ones(3, 2)
        assert_close(slopes(*given), expected, 1e-12)


@pytest.mark.parametrize("shape", [(), (0,), (3, 1, 2)])
@each_memory
def test_a_bare_tensor_of_any_shape(shape: tuple[int, ...], mode: str) -> None:
    w = torch.randn(shape, requires_grad=True)
    out = mo.minimize(
        lambda w, _: (w**2).sum(),
        SGD(lr=0.1),
        w,
        None,
        steps=3,
        differentiate=mo.Backprop(memory=mode),
    )
    assert_close(out.params, 0.8**3 * w, 1e-12)
    (g,) = torch.autograd.grad(out.params.sum(), w)
    assert_close(g, torch.full(shape, 0.8**3), 1e-12)


@each_memory
def test_lists_tuples_and_nested_trees(mode: str) -> None:
    params = [torch.randn(2), (torch.randn(()), {"a": [torch.randn(1, 2)]})]
    out = mo.minimize(
        lambda p, _: tree.sum_leaves(lambda t: t.square().sum(), p),
        Adam(lr=0.1),
        params,
        None,
        steps=3,
        differentiate=mo.Backprop(memory=mode),
    )
    assert (
        tree.flatten(out.params)[1]
        == tree.flatten(params)[1]
        == tree.flatten(out.opt_state["slots"]["mean"])[1]
    )
    assert isinstance(out.params, list)
    assert isinstance(out.params[1], tuple)


@each_memory
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_parameters_keep_their_dtype(dtype: torch.dtype, mode: str) -> None:
    params = {"low": torch.randn(3).to(dtype), "high": torch.randn(2)}
    lr = torch.tensor(0.1, requires_grad=True)

    def loss(p: dict[str, Tensor], _: None) -> Tensor:
        return p["low"].double().square().sum() + p["high"].square().sum()

    out = mo.minimize(
        loss, Adam(lr=lr), params, None, steps=3, differentiate=mo.Backprop(memory=mode)
    )
    assert {k: p.dtype for k, p in out.params.items()} == {"low": dtype, "high": torch.float64}
    assert {k: p.dtype for k, p in out.opt_state["slots"]["square"].items()} == {
        "low": dtype,
        "high": torch.float64,
    }
    out.losses[-1].backward()
    assert torch.isfinite(lr.grad)
    assert lr.grad < 0


@each_memory
def test_autocast_holds_in_the_loop_and_on_the_way_back(mode: str) -> None:
    w = torch.randn(4, 4, dtype=torch.float32, requires_grad=True)
    x = torch.randn(5, 4, dtype=torch.float32)
    seen: list[torch.dtype] = []

    def loss(w: Tensor, _: None) -> Tensor:
        seen.append((x @ w).dtype)
        return (x @ w).float().square().mean()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mo.minimize(
            loss, SGD(lr=0.01), w, None, steps=3, differentiate=mo.Backprop(memory=mode)
        )
    (found,) = torch.autograd.grad(out.losses[-1], w)  # outside autocast, as torch recommends
    assert set(seen) == {torch.bfloat16}
    assert out.params.dtype == torch.float32
    plain = mo.minimize(loss, SGD(lr=0.01), w, None, steps=3)
    (exact,) = torch.autograd.grad(plain.losses[-1], w)
    # bfloat16 rounds by 2^-8 a product
    assert torch.linalg.norm(found - exact) < 0.05 * torch.linalg.norm(exact)


def test_loops_in_threads_do_not_disturb_each_other() -> None:
    """Each with its own optimizer: `functional_call` patches the module it calls while it runs."""
    params, batches, meta = start()

    def run(mode: str) -> Tensor:
        optimizer = Adam(lr=nn.Parameter(torch.tensor(0.1)))
        out = mo.minimize(
            regression,
            optimizer,
            params,
            batches,
            meta=meta,
            differentiate=mo.Backprop(memory=mode),
        )
        return torch.autograd.grad(out.losses.sum(), optimizer.lr)[0]

    alone = run("full")
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, MODES * 4):
            assert_close(found, alone, 1e-12)


def test_one_optimizer_object_serves_several_loops() -> None:
    """Optimizers hold no state of a run: the gradient of two loops is the sum of theirs."""
    params, batches, meta = start()
    optimizer = Adam(lr=nn.Parameter(torch.tensor(0.1)))
    first, second = [
        mo.minimize(regression, optimizer, params, batches, meta=meta + shift).losses.sum()
        for shift in (0, 1)
    ]
    apart = [
        torch.autograd.grad(value, optimizer.lr, retain_graph=True)[0] for value in (first, second)
    ]
    assert_close(torch.autograd.grad(first + second, optimizer.lr)[0], apart[0] + apart[1], EXACT)


@each_memory
@pytest.mark.parametrize("rule", [mo.Backprop, mo.FirstOrder])
def test_a_batch_or_meta_may_hold_more_than_tensors(mode: str, rule: type) -> None:
    w = torch.ones(3, requires_grad=True)

    def loss(w: Tensor, batch: tuple[str, Tensor, None], meta: dict[str, object]) -> Tensor:
        name, x, nothing = batch
        assert name == "digits"
        assert nothing is None
        return meta["gain"] * (w * x).square().sum()  # type: ignore[operator]

    batch = ("digits", torch.ones(3), None)
    out = mo.minimize(
        loss,
        SGD(0.1),
        w,
        batch,
        steps=2,
        meta={"gain": 0.5, "power": 2},
        differentiate=rule(memory=mode),
    )
    assert_close(out.params, 0.81 * w, 1e-14)
    (g,) = torch.autograd.grad(out.params.sum(), w)
    assert_close(g, torch.full((3,), 0.81 if rule is mo.Backprop else 1.0), 1e-14)
    rows = vmap(
        grad(
            lambda w: mo.minimize(
                loss,
                SGD(0.1),
                w,
                batch,
                steps=2,
                meta={"gain": 0.5},
                differentiate=rule(memory=mode),
            ).params.sum()
        )
    )
    assert_close(rows(w.detach().expand(2, 3)), g.expand(2, 3), 1e-14)


class LossRate(mo.Schedule):
    """A rate that follows the loss and remembers the last one: gain * loss + last / 10."""

    def __init__(self, gain: nn.Parameter):
        super().__init__()
        self.gain = gain

    def init(self, like: Tensor) -> dict[str, Tensor]:
        return {"last": torch.zeros_like(like.sum())}

    def forward(
        self, state: dict[str, Tensor], *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert loss is not None
        return self.gain * loss + state["last"] / 10, {"last": loss}


@each_memory
@pytest.mark.parametrize("rule", [mo.Backprop, mo.FirstOrder])
def test_a_schedule_that_observes_the_loss(mode: str, rule: type) -> None:
    """Exact through what the schedule sees and remembers.

    To first order that is a constant, as the gradient is.
    """
    start, gain = torch.tensor([1.0, -0.5], requires_grad=True), nn.Parameter(torch.tensor(0.02))
    out = mo.minimize(
        lambda w, _: (w**4).sum() + w.sum(),
        SGD(lr=LossRate(gain)),
        start,
        None,
        steps=4,
        differentiate=rule(memory=mode),
    )
    found = two_derivatives(outer(out.params, (), out.losses), [start, gain])

    w, last, losses = start, torch.zeros(()), []
    for _ in range(4):
        losses.append((w**4).sum() + w.sum())
        (g,) = torch.autograd.grad(losses[-1], w, create_graph=True)
        seen, g = (losses[-1].detach(), g.detach()) if rule is mo.FirstOrder else (losses[-1], g)
        w, last = w - (gain * seen + last / 10) * g, seen
    assert_close(found, two_derivatives(outer(w, (), torch.stack(losses)), [start, gain]), EXACT)


def test_the_learned_tensors_of_a_partial_loss_are_its_arguments() -> None:
    """`functools.partial` over what does not require grad is an ordinary loss."""
    target = torch.randn(3)
    loss = functools.partial(lambda target, w, batch: (w - target).square().sum(), target)
    out = mo.minimize(loss, SGD(lr=0.25), torch.zeros(3), None, steps=2)
    assert_close(out.params, 0.75 * target, 1e-12)


@pytest.mark.parametrize("memory", ["full", "steps"])
def test_a_loss_module_with_batch_norm_keeps_its_statistics(memory: str) -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, params: Tensor, batch: Tensor) -> Tensor:
            return self.norm(batch * params).square().sum() + params.square().sum()

    loss = Penalised()
    rule = mo.Backprop(memory=memory)  # type: ignore[arg-type]
    out = mo.minimize(loss, SGD(0.1), torch.ones(3), torch.randn(2, 5, 3), differentiate=rule)
    out.params.sum().backward()
    assert loss.norm.weight.grad.abs().sum() > 0
    assert torch.equal(loss.norm.running_mean, torch.zeros(3))
