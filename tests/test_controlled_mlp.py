"""The small learned optimizer: its definition once more, its kernel, what it has to know."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import metaopt as mo
from optimizers import SGD, Accumulate, Adam, ControlledMLP, Grouped, LSTMSchedule, PerTensor
from optimizers.learned import controlled_mlp_kernel as kernel
from optimizers.muon import orthogonalized

SHAPES = {"w": (6, 4), "b": (4,), "k": (3, 2, 2, 2), "s": ()}


def trained(seed: int = 0, **options: bool) -> ControlledMLP:
    """Return one whose networks all have a part."""
    optimizer = ControlledMLP(steps=20, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in optimizer.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return optimizer


def history(steps: int, seed: int = 0) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Return gradients and losses of some steps."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()},
            torch.tensor(2.0 - 0.3 * t + 0.02 * t * t),
        )
        for t in range(steps)
    ]


def run(optimizer: ControlledMLP, given: list[tuple[dict[str, Tensor], Tensor]]) -> mo.tree.Tree:
    like = given[0][0]
    params = {name: 0.3 * torch.cos(leaf) for name, leaf in like.items()}
    state = optimizer.init(params)
    for grads, loss in given:
        updates, state = optimizer(grads, state, params, loss=loss)
        params = mo.apply_updates(params, updates)
    return params


def by_hand(o: ControlledMLP, given: list[tuple[dict[str, Tensor], Tensor]]) -> dict[str, Tensor]:
    """The docstring's formulas, one tensor at a time."""
    params = {name: 0.3 * torch.cos(leaf) for name, leaf in given[0][0].items()}
    m = {name: [torch.zeros_like(p)] * 3 for name, p in params.items()}
    v, row, col = (dict.fromkeys(params, 0.0) for _ in range(3))
    T, fast, slow, first = 20, 0.0, 0.0, 0.0

    def rms(x: Tensor) -> Tensor:
        return x.square().mean().sqrt()

    for t, (grads, loss) in enumerate(given):
        first = loss if t == 0 else first
        fast = loss if t == 0 else 0.9 * fast + 0.1 * loss
        slow = loss if t == 0 else 0.98 * slow + 0.02 * loss
        x, length = t / T, (math.log(T) - 5) / 2
        for name, g in grads.items():
            p, matrix = params[name], g.reshape(len(g), -1) if g.ndim > 1 else g.reshape(-1, 1)
            m[name] = [d * a + (1 - d) * g for d, a in zip((0.5, 0.9, 0.99), m[name], strict=True)]
            v[name] = 0.98 * v[name] + 0.02 * g**2
            row[name] = 0.98 * row[name] + 0.02 * (matrix**2).mean(1, keepdim=True)
            col[name] = 0.98 * col[name] + 0.02 * (matrix**2).mean(0, keepdim=True)
            relative = (v[name] / v[name].mean() + 1e-4).rsqrt()
            factor = (row[name] * col[name]).rsqrt().reshape(g.shape)
            moved = [g, *m[name]]
            raw = [*moved, *(a * relative for a in moved), m[name][1] * factor]
            raw += [p, v[name].rsqrt().clamp(max=10), torch.ones_like(g)]
            f = torch.stack([a / rms(a) for a in raw]).reshape(12, -1)
            tau = torch.tensor([1, x, x * x, math.tanh(t / 10), length])
            hidden = (o.feature_weight @ f + (o.time_weight @ tau)[:, None]).relu()
            d = o.direct @ f + o.direction_weight @ hidden
            if g.ndim > 1:
                d = orthogonalized(d.view(matrix.shape), (3.4445, -4.7750, 2.0315), 1e-7, 4)
            spread = v[name].mean().sqrt()
            floor = 0.01 * first
            h = [1, x, x**4, 1 - math.tanh(t / (T / 20 + 3)), length]
            h += [(rms(p) ** 2 + 1e-4).sqrt().log() / 2]
            h += [(rms(m[name][k]) / spread).log() for k in (1, 2)]
            h += [((fast + floor) / (slow + floor)).log()]
            h += [((fast + floor) / (first + floor)).log() / 2]
            h += [math.log(matrix.shape[1]) / 3, math.log(matrix.shape[0]) / 3, float(g.ndim < 2)]
            h = torch.stack([torch.as_tensor(a, dtype=g.dtype) for a in h])
            bend = torch.tanh(o.control_weight @ h + o.control_bias)
            s = -4.6 + (2 * (o.control @ h + o.step_weight @ bend)).clamp(-8, 8)
            params = {**params, name: p - s.exp() * (d / rms(d)).reshape(p.shape)}
    return params


@pytest.mark.usefixtures("float64")
def test_it_is_what_its_docstring_says() -> None:
    optimizer = trained()
    ours, expected = run(optimizer, history(6)), by_hand(optimizer, history(6))
    for name, leaf in expected.items():
        # roots are of x + 1e-16, and the logarithm of a loss of (its size + 1e-8)
        torch.testing.assert_close(ours[name], leaf, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("orthogonal", [True, False])
def test_derivatives_in_all_weights_against_finite_differences(orthogonal: bool) -> None:
    optimizer, given = trained(orthogonal=orthogonal), history(3)
    theta = dict(optimizer.named_parameters())
    generator = torch.Generator().manual_seed(2)
    along = {name: torch.randn(p.shape, generator=generator) for name, p in theta.items()}

    def loss(shift: float) -> Tensor:
        moved = copy.deepcopy(optimizer)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p.add_(shift * along[name])
        return sum(leaf.square().sum() for leaf in run(moved, given).values())  # type: ignore[return-value]

    value = sum(leaf.square().sum() for leaf in run(optimizer, given).values())
    grads = torch.autograd.grad(value, list(theta.values()))
    slope = sum((g * a).sum() for g, a in zip(grads, along.values(), strict=True))
    difference = (loss(1e-6) - loss(-1e-6)) / 2e-6
    torch.testing.assert_close(slope, difference.detach(), rtol=1e-6, atol=1e-8)
    assert all(grad.abs().sum() > 0 for grad in grads)


needs_kernel = pytest.mark.skipif(
    kernel.load_native(kernel.SOURCE) is None, reason="there is no C++ compiler"
)


@needs_kernel
@pytest.mark.parametrize("orthogonal", [True, False])
def test_the_kernel_equals_the_definition(orthogonal: bool, monkeypatch) -> None:
    """Up to rounding in float32, over nested vmaps with weights of their own."""
    pairs = [trained(seed, orthogonal=orthogonal) for seed in range(4)]
    theta = {
        name: torch.stack([p.detach() for p in ps]).unflatten(0, (2, 2))
        for (name, _), *ps in [
            ((name, None), *(dict(o.named_parameters())[name] for o in pairs))
            for name, _ in pairs[0].named_parameters()
        ]
    }
    given = history(5)

    def one(theta: dict[str, Tensor]) -> mo.tree.Tree:
        return torch.func.functional_call(Runner(pairs[0]), theta, (given,))

    class Runner(nn.Module):
        def __init__(self, optimizer: ControlledMLP):
            super().__init__()
            self.optimizer = optimizer

        def forward(self, given: list[tuple[dict[str, Tensor], Tensor]]) -> mo.tree.Tree:
            return run(self.optimizer, given)

    theta = {f"optimizer.{name}": leaf for name, leaf in theta.items()}
    calls = []
    step = kernel.step
    monkeypatch.setattr(kernel, "step", lambda *given: calls.append(0) or step(*given))
    with torch.no_grad():
        fast = vmap(vmap(one))(theta)
        assert len(calls) == len(given)
        monkeypatch.setattr(kernel, "is_usable", lambda *_: False)
        slow = vmap(vmap(one))(theta)
    for name, leaf in slow.items():
        assert leaf.std(0).max() > 1e-4  # the weights are different, and so are the results
        torch.testing.assert_close(fast[name], leaf, rtol=2e-5, atol=2e-6, msg=name)


@needs_kernel
def test_the_kernel_is_not_used_where_something_is_differentiated() -> None:
    optimizer, flat = trained(), torch.zeros(3)
    with torch.no_grad():
        assert kernel.is_usable(flat)
        assert not kernel.is_usable(flat.double())
        assert vmap(lambda x: torch.tensor(kernel.is_usable(x)))(flat[None]).all()
        seen = []
        torch.func.grad(lambda x: seen.append(kernel.is_usable(x)) or x.sum())(flat)
        torch.func.jvp(lambda x: seen.append(kernel.is_usable(x)) or x, (flat,), (flat,))
        assert seen == [False, False]
    assert not kernel.is_usable(flat)
    grads, loss = history(1)[0]
    params = {name: leaf.requires_grad_() for name, leaf in history(1, 3)[0][0].items()}
    updates, _ = optimizer(grads, optimizer.init(params), params, loss=loss)
    assert all(update.requires_grad for update in updates.values())


def test_without_a_compiler_the_definition_is_used(monkeypatch) -> None:
    from metaopt import native

    monkeypatch.setenv("METAOPT_NATIVE", "0")
    assert native._find_compiler() is None
    monkeypatch.delenv("METAOPT_NATIVE")
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert native._find_compiler() is None


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path) -> None:
    from metaopt import native

    broken = tmp_path / "broken.cpp"
    broken.write_text("this is no C++")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if native._find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    with pytest.warns(UserWarning, match=r"(?s)broken.cpp could not be .*METAOPT_NATIVE=0"):
        assert native.load_native(broken) is None


def test_it_must_be_told_the_number_of_steps_and_the_loss() -> None:
    grads, loss = history(1)[0]
    untold = ControlledMLP()
    with pytest.raises(ValueError, match=r"must know the number of steps.*mo.with_steps"):
        untold(grads, untold.init(grads), grads, loss=loss)
    told = mo.with_steps(untold, 7)
    told(grads, told.init(grads), grads, loss=loss)
    with pytest.raises(ValueError, match=r"ControlledMLP looks at the loss, got None.*step\(loss"):
        told(grads, told.init(grads), grads)
    with pytest.raises(ValueError, match="`steps` must be a positive integer, got 0"):
        mo.with_steps(untold, 0)
    with pytest.raises(ValueError, match="ControlledMLP: `steps` must be a positive integer"):
        ControlledMLP(steps=0)


def test_with_steps_tells_what_was_not_told_and_shares_parameters() -> None:
    inside, outside = ControlledMLP(), Adam(LSTMSchedule(0.1, 30))
    told = mo.with_steps(inside, 5)
    assert (told.steps, inside.steps) == (5, None)
    assert told.direct is inside.direct
    assert mo.with_steps(told, 9).steps == 5
    assert mo.with_steps(outside, 9).lr.steps == 30
    value = run(told, history(2))["w"].sum()
    value.backward()
    assert inside.control.grad.abs().sum() > 0
    with torch.no_grad():  # what is lent to one is not seen by the other
        *given, loss = partial_given()
        torch.func.functional_call(told, {"direct": torch.ones(12)}, tuple(given), {"loss": loss})
    assert inside.direct[0] == 0


def partial_given() -> tuple[mo.tree.Tree, ...]:
    grads, loss = history(1)[0]
    optimizer = ControlledMLP(steps=5)
    return grads, optimizer.init(grads), {n: torch.zeros_like(g) for n, g in grads.items()}, loss


def tree_state(scale: tuple[int, int]) -> tuple[dict[str, Tensor], mo.tree.Tree]:
    grads = {"w": torch.randn(scale)}
    return grads, ControlledMLP(steps=5).init(grads)


@needs_kernel
def test_the_kernel_refuses_the_state_of_other_parameters_and_other_dtypes() -> None:
    """It would read beyond the end of an array."""
    optimizer = ControlledMLP(steps=5)
    (_, state), (big, own) = tree_state((3, 2)), tree_state((4, 4))
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"memory 'momenta' of shape \(3, 16\), got \(3, 6\)"):
            optimizer(big, state, big, loss=torch.tensor(1.0))
        wide = mo.tree.map(lambda x: x.double() if x.is_floating_point() else x, own)
        assert not kernel.is_usable(big["w"], *wide["shared"].values())
    with pytest.raises(ValueError, match=r"`loss` must be a scalar .*\(1,\)"):
        optimizer(big, own, big, loss=torch.ones(1))


@needs_kernel
@pytest.mark.parametrize("what", ["loss", "params", "state"])
def test_the_kernel_under_vmap_over_one_argument_alone(what: str) -> None:
    optimizer, (grads, state) = ControlledMLP(steps=5), tree_state((3, 2))
    given = {"loss": torch.tensor(1.0), "params": grads, "state": state}
    rows = mo.tree.map(lambda x: torch.stack([x, 2 * x]), given[what])

    def update(row: Any) -> Tensor:
        seen = {**given, what: row}
        return optimizer(grads, seen["state"], seen["params"], loss=seen["loss"])[0]["w"]

    with torch.no_grad():
        both = vmap(update)(rows)
        for i in range(2):
            torch.testing.assert_close(both[i], update(mo.tree.index(rows, i)))


@needs_kernel
def test_losses_that_are_no_numbers_are_seen_alike(monkeypatch) -> None:
    """The first one is kept."""
    optimizer, (grads, state) = trained(), tree_state((3, 2))
    for bad in (math.inf, -math.inf, math.nan):
        found = []
        for usable in (True, False):
            monkeypatch.setattr(kernel, "is_usable", lambda *_, usable=usable: usable)
            with torch.no_grad():
                _, after = optimizer(grads, state, grads, loss=torch.tensor(2.0))
                updates, after = optimizer(grads, after, grads, loss=torch.tensor(bad))
            assert after["shared"]["losses"][0] == 2
            found.append(updates["w"])
        torch.testing.assert_close(*found, equal_nan=True, rtol=2e-5, atol=1e-7)


@needs_kernel
def test_sums_over_long_columns_are_exact() -> None:
    grads = {"b": 1 + torch.rand(3_000_000)}
    optimizer = ControlledMLP(steps=5)
    with torch.no_grad():
        _, after = optimizer(grads, optimizer.init(grads), grads, loss=torch.tensor(1.0))
    expected = 0.02 * grads["b"].double().square().mean()
    assert abs(after["shared"]["columns"][0] / expected - 1) < 1e-6


def test_a_damaged_library_is_compiled_again_and_no_home_is_no_error(monkeypatch, tmp_path) -> None:
    from metaopt import native

    if native._find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "metaopt").mkdir()
    monkeypatch.setattr(native, "load_native", native.load_native.__wrapped__)
    assert native.load_native(source).one() == 1
    (made,) = (tmp_path / "metaopt").glob("one-*.so")
    made.unlink()  # not overwritten: it is in use
    made.write_bytes(b"half a file")
    assert native.load_native(source).one() == 1

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.warns(UserWarning, match="home directory"):
        assert native.load_native(source) is None


def test_with_steps_in_several_places_and_behind_accumulate() -> None:
    inner = ControlledMLP()
    told = mo.with_steps(Grouped({"b": inner, "*": inner}), 10)
    found = [part for part in told.modules() if isinstance(part, ControlledMLP)]
    assert [part.steps for part in found] == [10]
    assert mo.with_steps(Accumulate(4, ControlledMLP()), 100).optimizer.steps == 25
    rates = SGD(PerTensor({"w": torch.zeros(2)}, 0.1))
    assert mo.with_steps(rates, 7).lr.steps is None
