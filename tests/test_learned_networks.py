"""Learned optimizers with several networks or layouts, against their equations written out."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import metaopt as mo
from optimizers import RNNMLP, AdafactorMLP, Adam, LSTMOptimizer, MLPOptimizer, NNAdam
from optimizers.learned import blocks

SHAPES = {
    "matrix": (3, 5),
    "tall": (5, 3),
    "square": (3, 3),
    "vector": (4,),
    "scalar": (),
    "cube": (2, 4, 3),
}
SHAPES |= {"kernel": (3, 2, 3, 3), "empty": (0, 2)}


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


class AdafactorByHand:
    """The features of one tensor, a stack with 39 entries for each coordinate."""

    def __init__(self, optimizer: AdafactorMLP, w: Tensor) -> None:
        self.optimizer, self.t = optimizer, 0
        self.m = [torch.zeros_like(w)] * 3
        self.v = torch.zeros_like(w)
        self.squares: list[Any] = [0.0] * 3

    def decays(self, initial: list[float], shift: Tensor) -> list[Tensor]:
        return [1 - (1 - d) * (10 * s).exp() for d, s in zip(initial, shift, strict=True)]

    def factored(
        self, g: Tensor, decay: Tensor, before: Any
    ) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
        """Return (memory, R, C as large as g, factors of g and of a momentum)."""
        squares = g**2 + 1e-30
        if g.ndim < 2:
            v = decay * before + (1 - decay) * squares
            return v, v, v, (v + 1e-9).clamp(min=1e-9) ** -0.5, (v + 1e-6) ** -0.5
        row_axis, column_axis = sorted(range(g.ndim), key=lambda axis: g.shape[axis])[-2:]
        R, C = squares.mean(column_axis, keepdim=True), squares.mean(row_axis, keepdim=True)
        R, C = ((1 - decay) * new for new in (R, C))
        if not isinstance(before, float):
            R, C = (decay * old + new for old, new in zip(before, (R, C), strict=True))
        ratio = R / (R.mean(row_axis, keepdim=True) + 1e-9)
        root = (ratio.clamp(min=1e-9) * C.clamp(min=1e-9)) ** -0.5
        return (R, C), R.expand_as(g), C.expand_as(g), root, root

    def update(self, g: Tensor, w: Tensor) -> Tensor:
        o, each = self.optimizer, [0.9, 0.99, 0.999]
        *momentum, square = self.decays([*each, 0.999], o.moment_shift)
        self.m = [d * m + (1 - d) * g for d, m in zip(momentum, self.m, strict=True)]
        self.v = square * self.v + (1 - square) * g**2
        r = (self.v + 1e-6) ** -0.5
        found = [
            self.factored(g, d, v)
            for d, v in zip(self.decays(each, o.factor_shift), self.squares, strict=True)
        ]
        self.squares = [one[0] for one in found]
        features = [g, w, *self.m, self.v, r, *[m * r for m in self.m]]
        features += [g * one[3] for one in found] + [
            m * one[4] for m, one in zip(self.m, found, strict=True)
        ]
        for average in (1, 2):
            features += [one[average] for one in found] + [
                (one[average] + 1e-8) ** -0.5 for one in found
            ]
        features = [x / ((x**2).mean() + 1e-5) ** 0.5 for x in features]
        horizons = [1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000]
        features += [torch.full_like(g, math.tanh(self.t / h - 1)) for h in horizons]
        self.t += 1
        x = torch.stack(features, dim=-1)
        x = F.linear(x, o.input_weight, o.input_bias[:, 0]).relu()
        x = F.linear(x, o.hidden_weight, o.hidden_bias[:, 0]).relu()
        direction, sharpness = F.linear(x, o.output_weight, o.output_bias[:, 0]).unbind(-1)
        return -1e-3 * direction * (1e-3 * sharpness).exp()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("recorded", [False, True])
def test_adafactor_mlp_equals_its_features_written_out(
    dtype: torch.dtype, tolerance: float, recorded: bool
) -> None:
    """Relative to the largest entry of an update: the same sums in another order."""
    optimizer = AdafactorMLP(hidden_size=4, seed=3).to(dtype)
    assert sum(p.numel() for p in optimizer.parameters()) == 197
    with torch.no_grad():
        for shift in (optimizer.moment_shift, optimizer.factor_shift):
            shift.uniform_(-0.05, 0.05)
    params = tensors(0, dtype)
    state = optimizer.init(params)
    by_hand = {name: AdafactorByHand(optimizer, w) for name, w in params.items()}
    for t in (1, 2, 3):
        grads = mo.tree.map(lambda g: 0.1 * g, tensors(t, dtype))
        with torch.set_grad_enabled(recorded):
            updates, state = optimizer(grads, state, params)
        with torch.no_grad():
            expected = {name: by_hand[name].update(grads[name], params[name]) for name in SHAPES}
        largest = max(u.abs().max() for u in expected.values() if u.numel())
        for name in SHAPES:
            assert updates[name].shape == expected[name].shape
            assert ((updates[name] - expected[name]).abs() < tolerance * largest).all()


@pytest.mark.parametrize("kind", [NNAdam, RNNMLP])
def test_untrained_they_are_adam(kind: Any) -> None:
    optimizer, params = kind().double(), tensors(0)
    state, reference = optimizer.init(params), Adam(1e-3)
    expected_state = reference.init(params)
    for t in range(1, 30):
        grads = tensors(t)
        updates, state = optimizer(grads, state, params)
        expected, expected_state = reference(grads, expected_state, params)
        for name in SHAPES:
            torch.testing.assert_close(updates[name], expected[name], rtol=1e-12, atol=0)


LEARNED: dict[str, Any] = {
    "lstm": lambda: LSTMOptimizer(3),
    "mlp": lambda: MLPOptimizer(4),
    "adafactor-mlp": AdafactorMLP,
    "rnn-mlp": lambda: RNNMLP(4, 3),
    "nn-adam": lambda: NNAdam(3),
}
each_learned = pytest.mark.parametrize("name", LEARNED)


def moved(name: str) -> mo.Optimizer:
    """An optimizer in float64 away from its start, where layers are zero and relus bend."""
    optimizer: mo.Optimizer = LEARNED[name]().double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in optimizer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=0.1)
    return optimizer


@each_learned
def test_forward_mode_equals_backward_mode(name: str) -> None:
    """The slope of all updates of two steps along one direction, to rounding."""
    optimizer, params, first = moved(name), tensors(0), tensors(1)

    def total(grads: Any) -> Tensor:
        updates, state = optimizer(grads, optimizer.init(params), params)
        updates = mo.tree.map(torch.add, updates, optimizer(grads, state, params)[0])
        return sum((u.sin().sum() for u in updates.values()), start=torch.zeros(()))

    direction = tensors(2)
    _, tangent = torch.func.jvp(total, (first,), (direction,))
    slopes = torch.func.grad(total)(first)
    expected = sum((slopes[key] * direction[key]).sum() for key in SHAPES)
    torch.testing.assert_close(tangent, expected, rtol=1e-10, atol=1e-14)


@each_learned
def test_derivatives_are_finite_at_zero(name: str) -> None:
    """Of the first and second order, at zero gradients and parameters."""
    optimizer = moved(name)
    params = mo.tree.map(torch.zeros_like, tensors(0))

    def total(grads: Any, params: Any) -> Tensor:
        updates, state = optimizer(grads, optimizer.init(params), params)
        updates = mo.tree.map(torch.add, updates, optimizer(grads, state, params)[0])
        return sum((u.sin().sum() for u in updates.values()), start=torch.zeros(()))

    def slopes(grads: Any) -> Tensor:
        found = torch.func.grad(total, argnums=(0, 1))(grads, params)
        return sum((g.sin().sum() for g in mo.tree.leaves(found)), start=torch.zeros(()))

    for found in (torch.func.grad(total)(params, params), torch.func.grad(slopes)(params)):
        assert all(leaf.isfinite().all() for leaf in mo.tree.leaves(found))


@each_learned
def test_deployed_in_groups_it_resumes_from_its_state_dict(name: str) -> None:
    """Two groups with factors on their updates; a copy that is loaded half way ends the same."""

    def deploy(weights: dict[str, Tensor]) -> tuple[list[Any], Any]:
        own = [torch.nn.Parameter(w.clone()) for w in weights.values()]
        groups = [{"params": own[:3], "lr": 0.5}, {"params": own[3:]}]
        return own, optimizer.as_torch(groups)  # type: ignore[arg-type]

    def step(own: list[Any], deployed: Any, seed: int) -> None:
        for parameter, grad in zip(own, tensors(seed).values(), strict=True):
            parameter.grad = grad
        deployed.step()

    optimizer = moved(name)
    own, deployed = deploy(tensors(0))
    for seed in (1, 2):
        step(own, deployed, seed)
    copy, resumed = deploy(dict(zip(SHAPES, (w.detach() for w in own), strict=True)))
    resumed.load_state_dict(deployed.state_dict())
    halves = tensors(0)
    for parameters, one in ((own, deployed), (copy, resumed)):
        step(parameters, one, 3)
    assert all(torch.equal(a, b) for a, b in zip(own, copy, strict=True))
    first = dict(list(halves.items())[:3])
    grads = {key: tensors(1)[key] for key in first}
    updates, _ = optimizer(grads, optimizer.init(first), first)
    own, deployed = deploy(tensors(0))
    step(own, deployed, 1)
    for parameter, (key, update) in zip(own, updates.items(), strict=False):
        torch.testing.assert_close(parameter.detach(), halves[key] + 0.5 * update.detach())


@pytest.mark.parametrize("kind", [AdafactorMLP, RNNMLP, NNAdam])
def test_they_ask_for_what_they_need(kind: Any) -> None:
    grads = {"w": torch.ones(3)}
    with pytest.raises(ValueError, match=f"`{kind.__name__}` needs `params` because"):
        kind()(grads, kind().init(grads))
    with pytest.raises(ValueError, match="`hidden_size` must be a positive integer, got 0"):
        kind(0)


def test_a_large_tensor_in_blocks_equals_the_same_in_one(monkeypatch: Any) -> None:
    """Blocks of 16 entries, cut along the first axis: the sums of squares are added up."""
    optimizer = moved("adafactor-mlp")
    params, grads = tensors(0), tensors(1)

    def run() -> Any:
        _, state = optimizer(grads, optimizer.init(params), params)
        return optimizer(grads, state, params)

    whole = run()
    monkeypatch.setattr(blocks, "ENTRIES", 16)
    monkeypatch.setattr(sys.modules[AdafactorMLP.__module__], "MOST_KEPT", 0)
    torch.testing.assert_close(run(), whole, rtol=1e-12, atol=1e-15)
