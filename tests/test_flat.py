"""Updates on tensors joined to one.

The same numbers and derivatives as one tensor after another, in every transform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import metaopt as mo
from metaopt import tree
from metaopt.optimizer.flat import (
    LEAST_TENSORS,
    MOST_ENTRIES,
    MOST_TOGETHER,
    is_joinable,
    prefers_joined,
)
from optimizers import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    ClipNorm,
    Constant,
    Grouped,
    Lion,
    LSTMOptimizer,
    Masked,
    MLPOptimizer,
    Muon,
    NAdam,
    NNAdam,
    RAdam,
    RMSprop,
    Rprop,
    WeightDecay,
)

_ADAM = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-2, "eps_root": 1e-3, "weight_decay": 0.05}
_DECAY = {"weight_decay": 0.05}
# Every class that says it is joinable, in each of its forms.
CASES: dict[str, tuple[type[mo.Optimizer], dict[str, Any]]] = {
    "adam": (Adam, _ADAM),
    "adam-plain": (Adam, {}),
    "adam-amsgrad": (Adam, _ADAM | {"amsgrad": True}),
    "adamw": (AdamW, _ADAM),
    "adamw-amsgrad": (AdamW, _ADAM | {"amsgrad": True}),
    "nadam": (NAdam, _ADAM | {"momentum_decay": 0.05}),
    "nadam-decoupled": (NAdam, _ADAM | {"decoupled_weight_decay": True}),
    "radam": (RAdam, _ADAM),
    "radam-decoupled": (RAdam, _ADAM | {"betas": (0.8, 0.9), "decoupled_weight_decay": True}),
    "rmsprop": (RMSprop, {"lr": 0.02, "alpha": 0.9, "eps": 1e-2}),
    "rmsprop-all": (
        RMSprop,
        {"lr": 0.02, "alpha": 0.9, "eps": 1e-2, "momentum": 0.7, "centered": True, **_DECAY},
    ),
    "adagrad": (Adagrad, {"lr": 0.1, "eps": 1e-2}),
    "adagrad-all": (
        Adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-2, **_DECAY},
    ),
    "adadelta": (Adadelta, {"lr": 1.0, "rho": 0.8, "eps": 1e-2, **_DECAY}),
    "adamax": (Adamax, {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-2, **_DECAY}),
    "rprop": (Rprop, {"lr": 0.1, "etas": (0.5, 1.2), "step_sizes": (0.03, 0.2)}),
    "lion": (Lion, {"lr": 0.1, "betas": (0.8, 0.95)}),
    "lion-decay": (Lion, {"lr": 0.1, "betas": (0.8, 0.95), **_DECAY}),
}
each_case = pytest.mark.parametrize("name", CASES)


def build(name: str) -> mo.Optimizer:
    """Return an optimizer whose numbers are all tensors, to be differentiated."""
    kind, options = CASES[name]
    return kind(**{key: _as_tensor(value) for key, value in options.items()})


def _as_tensor(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_as_tensor, value))
    return torch.tensor(value) if isinstance(value, float) else value


def start() -> dict[str, Tensor]:
    """Return parameters of many kinds.

    Matrices, a transposed one, vectors, a scalar, an empty and a complex one.
    """
    params = {str(i): torch.randn(2, i + 1) for i in range(5)}
    params |= {
        "transposed": torch.randn(2, 3).T,
        "vector": torch.randn(4),
        "scalar": torch.randn(()),
        "empty": torch.randn(0, 3),
    }
    return params | {"complex": torch.randn(2, dtype=torch.complex128)}


def curve(params: dict[str, Tensor], shift: Tensor) -> Tensor:
    """A loss that couples all parameters.

    Its gradient is 0 in the first entry of the vector all the time.
    """
    real = {name: torch.view_as_real(p) if p.is_complex() else p for name, p in params.items()}
    reach = (
        sum(p.sin().sum() for name, p in real.items() if name != "vector")
        + real["vector"][1:].sin().sum()
    )
    return (reach - shift).square() + sum(
        ((p - shift) ** 2).sum() for name, p in real.items() if name != "vector"
    )


@contextmanager
def ways(joined: bool) -> Iterator[list[int]]:
    """While entered, all updates are made in one way.

    Yields the number of tensors that each saw.
    """
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        if not joined:
            patch.setattr("metaopt.optimizer.flat.prefers_joined", lambda lists: False)
        for kind in {kind for kind, _ in CASES.values()}:
            name = "direction" if kind.update is mo.Optimizer.update else "update"
            patch.setattr(kind, name, counted(getattr(kind, name), seen))
        yield seen


def counted(update: Callable[..., Any], seen: list[int]) -> Callable[..., Any]:
    def call(self: mo.Optimizer, grads: list[Tensor], *rest: Any) -> Any:
        seen.append(len(grads))
        return update(self, grads, *rest)

    return call


def both(run: Callable[[], Any]) -> tuple[Any, Any]:
    """Return what `run` gives with tensors joined and one by one, having seen that it did."""
    results = []
    for joined in (True, False):
        with ways(joined) as seen:
            results.append(run())
        assert seen  # a loop that is run again with a graph ran without one first, one by one
        assert any(count == 1 for count in seen) == joined
    return results[0], results[1]


def real(leaves: Any) -> list[Tensor]:
    return [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in tree.leaves(leaves)]


# Sums over all entries, in other orders: some 2^-53 for each, and the roots of Adam divide by
# numbers down to 0.03.
TOLERANCE = 1e-12


@pytest.mark.usefixtures("float64")
class TestEquality:
    @each_case
    def test_values_and_two_derivatives_in_everything(self, name: str) -> None:
        optimizer, first, shifts = build(name), start(), torch.randn(3)
        before = optimizer.init(first)
        memory = tree.map(lambda m: m + 0.3 if m.is_floating_point() else m, before)
        weights = [torch.randn_like(leaf) for leaf in real(first)]

        def run() -> Any:
            inputs = tree.map(
                lambda leaf: leaf.detach().clone().requires_grad_(leaf.dtype != torch.int64),
                (dict(optimizer.named_buffers()), first, memory),
            )
            variables = [leaf for leaf in tree.leaves(inputs) if leaf.requires_grad]
            hyper, params, state = inputs
            for shift in shifts:
                grads = dict(
                    zip(
                        params,
                        torch.autograd.grad(
                            curve(params, shift), list(params.values()), create_graph=True
                        ),
                        strict=True,
                    )
                )
                updates, state = functional_call(optimizer, hyper, (grads, state, params))
                params = mo.apply_updates(params, updates)
            value = sum((w * leaf).sum() for w, leaf in zip(weights, real(params), strict=True))
            value = value + sum(
                leaf.square().sum() for leaf in real(state) if leaf.is_floating_point()
            )
            once = torch.autograd.grad(value, variables, create_graph=True, materialize_grads=True)
            twice = torch.autograd.grad(
                sum(g.square().sum() for g in real(list(once))), variables, materialize_grads=True
            )
            return (params, state, once), twice

        (found, again), (expected, expected_again) = both(run)
        assert_close(found, expected, TOLERANCE)
        assert_close(again, expected_again, 10 * TOLERANCE)  # of squares of derivatives of some 100

    @each_case
    def test_under_vmap_with_shared_initial_parameters(self, name: str) -> None:
        optimizer, first, shifts = build(name), start(), torch.randn(4, 2)

        def task(shifts: Tensor) -> Tensor:
            out = mo.minimize(curve, optimizer, first, shifts)
            return (
                sum(leaf.square().sum() for leaf in real((out.params, out.opt_state["slots"])))
                + out.losses.sum()
            )

        def task_gradient(shifts: Tensor) -> tuple[Tensor, Tensor]:
            return grad(task)(shifts), jvp(task, (shifts,), (torch.ones_like(shifts),))[1]

        assert_close(*both(lambda: vmap(task_gradient)(shifts)), TOLERANCE)

    @pytest.mark.parametrize("memory", ["full", "steps", mo.Revolve(2)], ids=str)
    def test_in_every_kind_of_loop(self, memory: Any) -> None:
        first, shifts, lr = start(), torch.randn(4), nn.Parameter(torch.tensor(0.1))

        def run() -> Any:
            params = tree.map(lambda leaf: leaf.detach().clone().requires_grad_(), first)
            out = mo.minimize(curve, Adam(lr), params, shifts, differentiate=mo.Backprop(memory))
            return torch.autograd.grad(out.losses.sum(), [lr, *params.values()])

        assert_close(*both(run), TOLERANCE)

    def test_a_state_goes_on_in_the_other_way(self) -> None:
        first, shifts = start(), torch.randn(6)
        with ways(joined=False):
            expected = mo.minimize(curve, Adam(0.1), first, shifts)
        params, state = first, None
        for i, joined in enumerate((True, False, True)):
            with ways(joined) as seen:
                params, state, *_ = mo.minimize(
                    curve, Adam(0.1), params, shifts[2 * i : 2 * i + 2], opt_state=state
                )
            assert seen == [1 if joined else len(first)] * 2
        assert_close((params, state), (expected.params, expected.opt_state), TOLERANCE)

    def test_deployed(self) -> None:
        """As `torch.optim` does, on its own tensors."""
        found, expected = (
            [torch.linspace(-1, 1, i + 1).requires_grad_() for i in range(9)] for _ in range(2)
        )
        ours, theirs = AdamW(0.1).as_torch(found), torch.optim.AdamW(expected, 0.1)
        with ways(joined=True) as seen:
            for params, optimizer in ((found, ours), (expected, theirs)):
                for _ in range(5):
                    optimizer.zero_grad()
                    sum((p - 0.3).square().sum() for p in params).backward()
                    optimizer.step()
        assert seen == [9] * 5  # without a graph there are kernels for lists
        assert_close(found, expected, TOLERANCE)

    def test_compiled_code_goes_one_by_one(self) -> None:
        optimizer, params = Adam(0.1), {str(i): torch.randn(3) for i in range(9)}
        state = optimizer.init(params)
        with ways(joined=True) as seen:
            expected = optimizer(params, state, params)
            found = torch.compile(optimizer, backend="eager", fullgraph=True)(params, state, params)
        assert seen == [1, 9]
        assert_close(found, expected, TOLERANCE)


class Doubled(Adam):
    """An update that looks at whole tensors, of a class that inherits from a joinable one."""

    def update(self, grads: Any, *rest: Any) -> Any:
        return super().update([g / g.norm() for g in grads], *rest)


def lists(count: int, entries: int) -> list[list[Tensor]]:
    return [[torch.zeros(entries).expand(entries) for _ in range(count)] for _ in range(3)]


class TestWhere:
    """Which updates are made on joined tensors."""

    def test_many_small_tensors(self) -> None:
        assert prefers_joined(lists(LEAST_TENSORS, 5))
        with torch.no_grad():
            assert not prefers_joined(lists(LEAST_TENSORS, 5))
        assert not prefers_joined(lists(LEAST_TENSORS - 1, 5))
        assert prefers_joined(lists(LEAST_TENSORS, MOST_ENTRIES))
        assert not prefers_joined(lists(LEAST_TENSORS, MOST_ENTRIES + 1))
        together = MOST_TOGETHER // MOST_ENTRIES
        assert prefers_joined(lists(together, MOST_ENTRIES))
        assert not prefers_joined(lists(together + 1, MOST_ENTRIES))

    def test_all_rows_of_vmap_count(self) -> None:
        found = []

        def see(x: Tensor) -> Tensor:
            found.append(prefers_joined([[x] * LEAST_TENSORS]))
            return x

        vmap(see)(torch.zeros(2, MOST_ENTRIES // 2))
        vmap(see)(torch.zeros(2, MOST_ENTRIES // 2 + 1))
        vmap(vmap(see))(torch.zeros(2, 2, MOST_ENTRIES // 4 + 1))
        assert found == [True, False, False]

    @pytest.mark.parametrize(
        "odd",
        [
            torch.zeros(5, dtype=torch.float64),
            torch.zeros(5, device="meta"),
            torch.zeros(6),
            torch.zeros(5).to_sparse(),
            torch.zeros(5).as_subclass(type("Own", (Tensor,), {})),
        ],
        ids=["dtype", "device", "shape", "sparse", "class"],
    )
    def test_not_where_tensors_differ(self, odd: Tensor) -> None:
        alike = lists(LEAST_TENSORS, 5)
        for i in range(3):
            different = [list(leaves) for leaves in alike]
            different[i][-1] = odd
            assert not prefers_joined(different)

    def test_mixed_precision_goes_one_by_one(self) -> None:
        params = {
            str(i): torch.full((3,), i + 1.0, dtype=[torch.float32, torch.float64][i % 2])
            for i in range(10)
        }
        optimizer = Adam(0.1)
        with ways(joined=True) as seen:
            updates, after = optimizer(params, optimizer.init(params), params)
        assert seen == [10]
        for name, update in updates.items():
            assert update.dtype == after["slots"]["mean"][name].dtype == params[name].dtype
            assert_close(
                update, torch.full_like(update, -0.1), 1e-5
            )  # the first step of Adam is lr; 1 - 0.999 is off by 3e-5 in float32

    def test_a_list_may_have_a_precision_of_its_own(self) -> None:
        params = {str(i): torch.full((3,), i + 1.0) for i in range(10)}
        optimizer = Adam(0.1)
        state = optimizer.init(tree.map(torch.Tensor.double, params))
        with ways(joined=True) as seen:
            updates, after = optimizer(params, state, params)
        assert seen == [1]
        assert {leaf.dtype for leaf in tree.leaves((updates, after["slots"]))} == {torch.float64}

    def test_rates_of_single_entries_go_one_by_one(self) -> None:
        params = {str(i): torch.ones(3) for i in range(10)}
        for lr in (torch.tensor([0.1, 0.2, 0.3]), Constant(torch.tensor([0.1, 0.2, 0.3]))):
            optimizer = Adam(lr)
            with ways(joined=True) as seen:
                updates, _ = optimizer(params, optimizer.init(params))
            assert seen == [10]
            # the first step of Adam is lr
            assert_close(updates["9"], -torch.tensor([0.1, 0.2, 0.3]), 1e-5)

    def test_a_state_of_other_parameters_is_a_clear_error(self) -> None:
        params = {str(i): torch.ones(3, 2) for i in range(10)}
        optimizer = Adam()
        state = optimizer.init(tree.map(torch.t, params))
        with pytest.raises(
            ValueError,
            match=r"this Adam for these parameters, with the memory 'mean' of shape \(3, 2\), got "
            r"\(2, 3\)",
        ):
            optimizer(params, state)

    def test_behind_transforms_each_part_by_itself(self) -> None:
        params = {f"{kind}{i}": torch.ones(2) for kind in "ab" for i in range(9)}
        optimizer = ClipNorm(
            1.0, WeightDecay(0.1, Grouped({"a*": Adam(), "*": Masked(Lion(), "*")}))
        )
        with ways(joined=True) as seen:
            optimizer(params, optimizer.init(params), params)
        assert seen == [1, 1]

    @pytest.mark.parametrize(
        "kind",
        [SGD, ASGD, Muon, LSTMOptimizer, MLPOptimizer, NNAdam, ClipNorm, Grouped, Masked, Doubled],
    )
    def test_not_by_optimizers_that_look_at_tensors_or_gain_nothing(
        self, kind: type[mo.Optimizer]
    ) -> None:
        assert not is_joinable(kind)

    def test_all_others_were_compared(self) -> None:
        known = {
            kind
            for kind in vars(__import__("optimizers")).values()
            if isinstance(kind, type) and is_joinable(kind)
        }
        assert known == {kind for kind, _ in CASES.values()}


def test_a_subclass_says_for_itself_that_it_is_joinable() -> None:
    """It may change what `update` calls; here each tensor's gradient is divided by its norm."""

    class Normalized:
        def update(self, grads: list[Tensor], *rest: Any) -> Any:
            return super().update([g / g.norm() for g in grads], *rest)  # type: ignore[misc]

    class Mixed(Normalized, Adam):
        pass

    class Helped(Adam):
        def _adam(self, grads: list[Tensor], *rest: Any) -> Any:
            return super()._adam([g / g.norm() for g in grads], *rest)

    params = [
        torch.randn(3, 2, generator=torch.Generator().manual_seed(i)) for i in range(LEAST_TENSORS)
    ]
    for kind in (Mixed, Helped):
        optimizer = kind(0.1, eps=1.0)
        several, one = [
            optimizer(leaves, optimizer.init(leaves), leaves)[0][0]
            for leaves in (params, params[:1])
        ]
        assert_close(several, one, 1e-7)
