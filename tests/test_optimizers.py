"""The optimizers: equal to `torch.optim`, pure, and differentiable where it is hardest."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import VARIANTS, Variant, assert_close
from torch import Tensor, nn
from torch.func import grad, vmap

import metaopt as mo
from metaopt import tree
from optimizers import SGD, Adam, AdamW, ClipNorm, Cosine, Grouped, RMSprop

OURS_AND_TORCHS: list[
    tuple[str, Callable[[], mo.Optimizer], Callable[..., torch.optim.Optimizer]]
] = [
    ("sgd", lambda: SGD(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    ("sgd-momentum", lambda: SGD(0.1, 0.9), lambda p: torch.optim.SGD(p, 0.1, 0.9)),
    (
        "sgd-dampening",
        lambda: SGD(0.1, 0.9, dampening=0.3, weight_decay=0.02),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, 0.3, 0.02),
    ),
    (
        "sgd-nesterov",
        lambda: SGD(0.1, 0.9, weight_decay=0.02, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.02, nesterov=True),
    ),
    ("adam", lambda: Adam(0.05), lambda p: torch.optim.Adam(p, 0.05)),
    (
        "adam-decay",
        lambda: Adam(0.05, (0.8, 0.95), weight_decay=0.02),
        lambda p: torch.optim.Adam(p, 0.05, (0.8, 0.95), weight_decay=0.02),
    ),
    (
        "adamw",
        lambda: AdamW(0.05, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    ),
    ("adamw-defaults", lambda: AdamW(), lambda p: torch.optim.AdamW(p)),
    ("rmsprop", lambda: RMSprop(), lambda p: torch.optim.RMSprop(p)),
    (
        "rmsprop-all",
        lambda: RMSprop(0.02, 0.9, weight_decay=0.02, momentum=0.7, centered=True),
        lambda p: torch.optim.RMSprop(p, 0.02, 0.9, weight_decay=0.02, momentum=0.7, centered=True),
    ),
    (
        "rmsprop-momentum",
        lambda: RMSprop(0.02, momentum=0.7),
        lambda p: torch.optim.RMSprop(p, 0.02, momentum=0.7),
    ),
]
each_pair = pytest.mark.parametrize(
    ("ours", "theirs"),
    [pair[1:] for pair in OURS_AND_TORCHS],
    ids=[pair[0] for pair in OURS_AND_TORCHS],
)
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {
        "matrix": torch.randn(4, 3, dtype=dtype),
        "vector": torch.randn(3, dtype=dtype),
        "scalar": torch.randn((), dtype=dtype),
    }


def curve(params: dict[str, Tensor], shift: Tensor) -> Tensor:
    """A loss whose gradient changes size and sign, and is 0 in one entry all the time."""
    hidden = torch.tanh(params["matrix"][:, 1:].sum(-1) + shift.to(params["matrix"].dtype))
    return (hidden**2).sum() + (params["vector"] * params["scalar"] - 0.5).square().sum()


# Rounding may differ by an operation: 50 steps of 2^-53 and 2^-24, through Adam's division by
# sqrt(v) in the worst case.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-5)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("deployed", [False, True], ids=["pure", "as_torch"])
@each_pair
def test_fifty_steps_equal_torch_optim(
    ours: Callable[[], mo.Optimizer],
    theirs: Callable[..., torch.optim.Optimizer],
    dtype: torch.dtype,
    tolerance: float,
    deployed: bool,
) -> None:
    start, shifts = tensors(dtype), torch.randn(50, dtype=torch.float64)

    def run(optimizer_of: Callable[[list[Tensor]], torch.optim.Optimizer]) -> dict[str, Tensor]:
        params = {name: p.clone().requires_grad_() for name, p in start.items()}
        optimizer = optimizer_of(list(params.values()))
        for shift in shifts:
            optimizer.zero_grad()
            curve(params, shift).backward()
            optimizer.step()
        return tree.map(torch.Tensor.detach, params)

    found = run(ours().as_torch) if deployed else mo.minimize(curve, ours(), start, shifts).params
    assert_close(found, run(theirs), tolerance)
    assert all((found[name] != start[name]).any() for name in start)


@each_pair
def test_bits_are_the_same_under_vmap_with_shared_initial_params(
    ours: Callable[[], mo.Optimizer], theirs: Callable[..., torch.optim.Optimizer]
) -> None:
    """Trap 16: `init` sees parameters without the batch, the gradients have it."""
    del theirs
    start, shifts = tensors(), torch.randn(3, 6, dtype=torch.float64)

    def run(shifts: Tensor) -> tuple:
        return tuple(mo.minimize(curve, ours(), start, shifts))

    batched = vmap(run)(shifts)
    for i in range(3):
        assert_close(tree.index(batched, i), run(shifts[i]), 1e-13)


@each_pair
def test_one_update_is_pure(
    ours: Callable[[], mo.Optimizer], theirs: Callable[..., torch.optim.Optimizer]
) -> None:
    del theirs
    optimizer, params, grads = ours(), tensors(), tensors()
    state = optimizer.init(params)
    _, state = optimizer(grads, state, params)
    everything = (params, grads, state, dict(optimizer.state_dict()))
    before, versions = (
        tree.map(torch.clone, everything),
        [leaf._version for leaf in tree.leaves(everything)],
    )
    random = torch.get_rng_state()
    first, after = optimizer(grads, state, params)
    assert [leaf._version for leaf in tree.leaves(everything)] == versions
    assert all(
        torch.equal(a, b) for a, b in zip(tree.leaves(before), tree.leaves(everything), strict=True)
    )
    assert torch.equal(random, torch.get_rng_state())
    second, again = optimizer(grads, state, params)
    assert all(
        torch.equal(a, b)
        for a, b in zip(tree.leaves((first, after)), tree.leaves((second, again)), strict=True)
    )
    memory = {leaf.data_ptr() for leaf in tree.leaves(everything)}
    assert not memory & {leaf.data_ptr() for leaf in tree.leaves((first, after))}, (
        "a result must not share memory with an input"
    )


@pytest.mark.usefixtures("float64")
@each_variant
@pytest.mark.parametrize("steps", [1, 3])
def test_meta_gradients_are_finite_where_the_gradient_is_zero(variant: Variant, steps: int) -> None:
    """Traps 12 and 13, with default eps.

    One weight never has a gradient, one starts at a stationary point.
    """
    values = {k: v for k, v in variant.values.items() if k not in ("eps", "eps_root")}
    h = {name: nn.Parameter(torch.tensor(value)) for name, value in values.items()}
    w = torch.tensor([1.0, 0.0, 0.5], requires_grad=True)
    gain = torch.tensor([1.0, 1.0, 0.0], requires_grad=True)

    def loss(w: Tensor, _: None, gain: Tensor) -> Tensor:
        return (gain * w**2).sum()

    out = mo.minimize(loss, variant.build(h), w, None, steps=steps, meta=gain)
    inputs = [w, gain, *h.values()]
    first = torch.autograd.grad(
        out.params.sum() + out.losses.sum(), inputs, create_graph=True, allow_unused=True
    )
    assert first[0] is not None
    for g in first:
        assert g is None or torch.isfinite(g).all()
    total = sum(g.sum() for g in first if g is not None)
    for g in torch.autograd.grad(total, inputs, allow_unused=True):
        assert g is None or torch.isfinite(g).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [Adam, AdamW, RMSprop], ids=lambda kind: kind.__name__)
def test_gradcheck_of_one_update_including_an_exact_zero(kind: type[mo.Optimizer]) -> None:
    """Every tensor argument of an update.

    At the zero entry the memory is positive, as it is after any nonzero gradient.
    """
    grads = torch.tensor([0.3, 0.0, -0.7], requires_grad=True)
    params = torch.randn(3, requires_grad=True)
    square = (torch.rand(3) + 0.5).requires_grad_()
    lr = torch.tensor(0.1, requires_grad=True)

    def update(grads: Tensor, params: Tensor, square: Tensor, lr: Tensor) -> Tensor:
        optimizer = kind(lr=lr, weight_decay=0.1)  # type: ignore[call-arg]
        state = optimizer.init(params)
        state = {**state, "step": torch.tensor(4), "slots": {**state["slots"], "square": square}}
        return optimizer(grads, state, params)[0]

    assert torch.autograd.gradcheck(update, (grads, params, square, lr))
    assert torch.autograd.gradgradcheck(update, (grads, params, square, lr))


@pytest.mark.usefixtures("float64")
def test_the_gradient_of_beta2_is_the_true_one() -> None:
    """Trap 13: d/d beta2 of one Adam step is 0 by bias correction; of two steps, the formula's."""

    def final(beta2: Tensor, steps: int) -> Tensor:
        out = mo.minimize(
            lambda w, _: (w**4).sum(),
            Adam(0.1, (0.9, beta2)),
            torch.tensor([1.0, -2.0]),
            None,
            steps=steps,
        )
        return out.params.sum()

    beta2 = torch.tensor(0.99)
    assert_close(grad(final)(beta2, 1), torch.tensor(0.0), 1e-12)
    h = 1e-5  # central difference: error of order h^2
    assert_close(grad(final)(beta2, 2), (final(beta2 + h, 2) - final(beta2 - h, 2)) / (2 * h), 1e-8)
    assert grad(final)(beta2, 2).abs() > 1e-4


@each_pair
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_low_and_finite(
    ours: Callable[[], mo.Optimizer],
    theirs: Callable[..., torch.optim.Optimizer],
    dtype: torch.dtype,
) -> None:
    del theirs
    optimizer, params = ours(), {"a": torch.randn(3).to(dtype), "b": torch.randn(())}
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer({"a": params["a"], "b": params["b"]}, state, params)
        params = mo.apply_updates(params, updates)
    assert params["a"].dtype == dtype
    assert params["b"].dtype == torch.float32
    for slot in state["slots"].values():
        assert slot["a"].dtype == dtype
        assert slot["b"].dtype == torch.float32
    assert torch.isfinite(params["a"]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_wider_hyperparameter_does_not_widen_the_parameters(dtype: torch.dtype) -> None:
    """A 0-dim float64 tensor would promote 0-dim parameters and their memory."""
    optimizer = Adam(
        lr=nn.Parameter(torch.tensor(0.1, dtype=torch.float64)),
        betas=(torch.tensor(0.9, dtype=torch.float64), 0.999),
    )
    params = {"scalar": torch.ones((), dtype=dtype), "vector": torch.ones(2, dtype=dtype)}
    state = optimizer.init(params)
    updates, after = optimizer(params, state, params)
    assert {
        leaf.dtype for leaf in tree.leaves((mo.apply_updates(params, updates), after["slots"]))
    } == {dtype}


@each_pair
@pytest.mark.parametrize(
    "params",
    [
        torch.ones(()),
        torch.ones(0),
        [torch.ones(2), (torch.ones(1, 1), {"x": torch.ones(())})],
        {"a": torch.ones(2, 0), "b": torch.ones(3)},
    ],
    ids=["scalar", "empty", "nested", "partly-empty"],
)
def test_any_tree_of_any_shapes(
    ours: Callable[[], mo.Optimizer], theirs: Callable[..., torch.optim.Optimizer], params: Any
) -> None:
    del theirs
    optimizer = ours()
    updates, state = optimizer(params, optimizer.init(params), params)
    assert tree.flatten(updates)[1] == tree.flatten(params)[1]
    for slot in state["slots"].values():
        assert tree.flatten(slot)[1] == tree.flatten(params)[1]
    for old, new in zip(
        tree.leaves(params), tree.leaves(mo.apply_updates(params, updates)), strict=True
    ):
        assert new.shape == old.shape
        assert (new < old).all()  # the gradient is 1 everywhere


def test_hyperparameters_are_found_as_parameters_and_buffers() -> None:
    optimizer = Adam(lr=nn.Parameter(torch.tensor(0.1)), betas=(torch.tensor(0.9), 0.999))
    assert set(dict(optimizer.named_parameters())) == {"lr"}
    assert set(dict(optimizer.named_buffers())) == {"beta1"}
    assert optimizer.double().lr.dtype == torch.float64
    assert torch.func.functional_call(
        optimizer,
        {"lr": torch.tensor(0.0), "beta1": torch.tensor(0.5)},
        (torch.ones(2), optimizer.init(torch.ones(2))),
    )[0].equal(torch.zeros(2))
    assert repr(optimizer).startswith("Adam(")


def test_a_hyperparameter_may_differ_from_weight_to_weight() -> None:
    """Meta-SGD: a step size of the parameter's own shape."""
    lr = nn.Parameter(torch.tensor([0.1, 0.0, 1.0]))
    out = mo.minimize(lambda w, _: w.sum(), SGD(lr=lr), torch.zeros(3), None, steps=2)
    assert_close(out.params.detach(), -2 * lr.detach(), 1e-7)
    assert_close(torch.autograd.grad(out.params.sum(), lr)[0], torch.full((3,), -2.0), 1e-7)


MOVERS: dict[str, Callable[[], mo.Optimizer]] = {
    "plain": lambda: SGD(0.1),
    "momentum": lambda: SGD(0.1, momentum=0.9, weight_decay=0.01),
    "dampened": lambda: SGD(0.1, momentum=0.9, dampening=0.5),
    "nesterov": lambda: SGD(0.1, momentum=0.9, nesterov=True),
    "learned": lambda: SGD(
        nn.Parameter(torch.tensor(0.1)), momentum=nn.Parameter(torch.tensor(0.9))
    ),
    "schedule": lambda: SGD(Cosine(0.1, steps=5)),
    "clipped": lambda: ClipNorm(0.1, SGD(0.1, momentum=0.9)),
    "grouped": lambda: Grouped({"*": SGD(0.1)}),
    "adam": lambda: Adam(0.1),
}


class TestMoved:
    """`moved` is `apply_updates` after `forward`."""

    @pytest.mark.parametrize("name", MOVERS)
    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128]
    )
    def test_it_is_the_update_applied(self, name: str, dtype: torch.dtype) -> None:
        optimizer, tolerance = MOVERS[name](), 20 * torch.finfo(dtype).eps
        params = {"w": torch.randn(3, 2).to(dtype), "b": torch.randn(()).to(dtype)}
        grads = {key: torch.randn(leaf.shape).to(dtype) for key, leaf in params.items()}
        state = optimizer.init(params)
        for _ in range(3):
            updates, expected = optimizer(grads, state, params)
            moved, state = optimizer.moved(grads, state, params)
            assert {leaf.dtype for leaf in moved.values()} == {dtype}
            assert_close(moved, mo.apply_updates(params, updates), tolerance)
            assert_close(state["slots"], expected["slots"], 0)
            assert state["step"] == expected["step"]
            params = moved

    def test_derivatives(self, float64: None) -> None:
        def end(rate: Tensor, decay: Tensor, w: Tensor, moves: bool) -> Tensor:
            optimizer = SGD(rate, momentum=decay, weight_decay=0.1)
            state = optimizer.init(w)
            for _ in range(3):
                if moves:
                    w, state = optimizer.moved(w**3, state, w)
                else:
                    updates, state = optimizer(w**3, state, w)
                    w = mo.apply_updates(w, updates)
            return w.sum()

        at = torch.tensor(0.1), torch.tensor(0.9), torch.randn(4)
        found, expected = (
            torch.func.jacrev(torch.func.grad(lambda *x, m=m: end(*x, m), (0, 1, 2)))(*at)
            for m in (True, False)
        )
        assert_close(found, expected, 1e-12)

    def test_a_subclass_that_updates_otherwise_moves_so_too(self) -> None:
        class Still(SGD):
            def update(self, grads: Any, params: Any, slots: Any, hyper: Any, step: Tensor) -> Any:
                return [torch.zeros_like(g) for g in grads], slots

        assert (
            Still(0.1)
            .moved(torch.ones(2), Still(0.1).init(torch.ones(2)), torch.ones(2))[0]
            .equal(torch.ones(2))
        )

    def test_a_hook_is_called(self) -> None:
        optimizer, seen = SGD(0.1), []
        optimizer.register_forward_hook(lambda *_: seen.append("after"))
        optimizer.moved(torch.ones(2), optimizer.init(torch.ones(2)), torch.ones(2))
        assert seen == ["after"]

    def test_a_wrong_shape(self) -> None:
        optimizer, params = SGD(0.1), torch.ones(2)
        with pytest.raises(
            ValueError, match=r"`grads` must have the shapes of `params`, got \(3, 2\) for \(2,\)"
        ):
            optimizer.moved(torch.ones(3, 2), optimizer.init(params), params)

    def test_parameters_are_needed(self) -> None:
        with pytest.raises(ValueError, match="`SGD` needs `params`"):
            SGD(0.1).moved(torch.ones(2), SGD(0.1).init(torch.ones(2)), None)


def test_a_state_without_the_schedules() -> None:
    params, state = torch.ones(2), SGD(0.1).init(torch.ones(2))
    with pytest.raises(
        ValueError, match=r"`state` must be that of this SGD, with the schedules \['lr'\], got \[\]"
    ):
        SGD(Cosine(0.1, steps=3))(params, state, params)


def test_a_spread_that_rounding_makes_negative() -> None:
    """Centered RMSprop subtracts a square from a mean of squares.

    The two are equal for a constant gradient.
    """
    optimizer, params = RMSprop(0.1, alpha=0.1, centered=True), torch.tensor([0.1, 0.3, 0.7, 1.1])
    state = optimizer.init(params)
    with torch.no_grad():
        for _ in range(40):
            updates, state = optimizer(params, state)
            assert updates.isfinite().all()


@pytest.mark.parametrize("kind", [Adam, AdamW, RMSprop])
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_a_tensor_for_eps(kind: type[mo.Optimizer], shape: tuple[int, ...]) -> None:
    """Without a graph as with one; the kernels for lists know scalars only."""
    eps, params = torch.full(shape, 1e-3), {"w": torch.ones(3), "b": torch.ones(3)}
    optimizer = kind(0.1, eps=eps)
    expected, _ = optimizer(params, optimizer.init(params), params)
    with torch.no_grad():
        found, _ = optimizer(params, optimizer.init(params), params)
    assert_close(found, {key: leaf.detach() for key, leaf in expected.items()}, 1e-6)


class TestMovedIsNoWayAroundACall:
    def halved(self, grads: Any, state: Any, params: Any = None, *, loss: Any = None) -> Any:
        updates, after = SGD.forward(self, grads, state, params, loss=loss)
        return updates / 2, after

    def moved(self, optimizer: mo.Optimizer) -> Tensor:
        return optimizer.moved(torch.ones(1), optimizer.init(torch.ones(1)), torch.ones(1))[0]

    def test_a_forward_of_the_instance(self) -> None:
        optimizer = SGD(0.5)
        optimizer.forward = types.MethodType(TestMovedIsNoWayAroundACall.halved, optimizer)
        assert self.moved(optimizer) == 0.75

    def test_a_call_of_the_class(self) -> None:
        class Halved(SGD):
            __call__ = TestMovedIsNoWayAroundACall.halved

        assert self.moved(Halved(0.5)) == 0.75

    def test_a_hook_on_all_modules(self) -> None:
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, output: (output[0] / 2, output[1])
        )
        try:
            assert self.moved(SGD(0.5)) == 0.75
        finally:
            handle.remove()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_the_kernels_for_lists_compute_the_same(variant: Variant, float64: None) -> None:
    """Without a graph they take the place of the operations that are differentiated."""
    optimizer = variant.build(variant.values)
    params = {
        "w": torch.randn(3, 2),
        "b": torch.randn(()),
        "none": torch.randn(0, 2),
        "complex": torch.randn(2, dtype=torch.complex128),
    }
    ends = []
    for graph in (True, False):
        torch.manual_seed(1)
        now, state = params, optimizer.init(params)
        with torch.set_grad_enabled(graph):
            for _ in range(5):
                grads = {key: torch.randn_like(leaf) for key, leaf in now.items()}
                now, state = optimizer.moved(grads, state, now)
        ends.append((now, state["slots"]))
    assert_close(ends[0], ends[1], 1e-12)


@pytest.mark.parametrize("count", [1, 3])
def test_an_update_with_too_few_or_too_many_tensors(count: int) -> None:
    class Odd(SGD):
        def update(self, grads: Any, params: Any, slots: Any, hyper: Any, step: Tensor) -> Any:
            return [torch.zeros(2)] * count, slots

    params = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(
        ValueError, match=f"Odd: `update` must return one tensor per parameter, 2, got {count}"
    ):
        Odd(0.1)(params, Odd(0.1).init(params), params)


def test_what_an_update_returns_is_left_as_it_is() -> None:
    class Same(SGD):
        def slots(self, params: Any) -> Any:
            return {"velocity": [torch.zeros_like(p) for p in params]}

        def update(self, grads: Any, params: Any, slots: Any, hyper: Any, step: Tensor) -> Any:
            return grads, {"velocity": grads}

    params = {"z": torch.ones(2, dtype=torch.complex64)}
    updates, state = Same(0.1)(params, Same(0.1).init(params), params)
    assert updates["z"].is_complex()
    assert state["slots"]["velocity"]["z"].shape == (2, 2)
