"""`compile=True` against the eager loop.

Equal values, one compilation for every length, and a warning without a compiler.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_evolution_estimators import Regression
from torch import Tensor, nn
from torch_versions import is_mended

import metaopt as mo
from metaopt import tree
from metaopt.compiled import compile_whole
from metaopt.differentiate import Rule
from metaopt.tasks.episode import Episode
from optimizers import SGD, Adam, LSTMOptimizer
from optimizers.schedules import Cosine, LSTMSchedule

Made = tuple[Callable[..., Tensor], dict[str, Tensor]]


def needs_compiler(cls: type) -> type:
    """Mark slow tests that compile; the warnings are of torch's compiler."""
    has_none = shutil.which("g++") is None and shutil.which("clang++") is None
    for mark in (
        pytest.mark.slow,
        pytest.mark.skipif(has_none, reason="needs a C++ compiler"),
        pytest.mark.filterwarnings(
            "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
        ),
    ):
        cls = mark(cls)
    return cls


@pytest.fixture
def no_recompilation() -> Iterator[Callable[[], None]]:
    """Call it, and from there on a recompilation of what this test has compiled is an error."""
    torch._dynamo.reset()
    before = torch._dynamo.config.error_on_recompile

    def forbid() -> None:
        torch._dynamo.config.error_on_recompile = True

    yield forbid
    torch._dynamo.config.error_on_recompile = before


def made(dropout: float = 0.0, *, deep: bool = True) -> Made:
    """Return a new loss function and new parameters of the same network."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 2)]
    net = mo.functional(nn.Sequential(*(layers if deep else [nn.Linear(3, 2)])))

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net(params, batch[0]), batch[1])

    return loss_fn, net.params


def batches(steps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, 8, 3, generator=generator, dtype=torch.get_default_dtype())
    return x, torch.randint(2, (steps, 8), generator=generator)


def gradients(
    optimizer: mo.Optimizer,
    rule: Rule,
    steps: int,
    *,
    compile: bool,
    dropout: float = 0.0,
    deep: bool = True,
    create_graph: bool = False,
) -> list:
    """Return the losses and the derivative of their sum with respect to all parameters.

    These are the optimizer's and the network's.
    """
    loss_fn, params = made(dropout, deep=deep)
    torch.manual_seed(2)
    out = mo.minimize(
        loss_fn, optimizer, params, batches(steps), differentiate=rule, compile=compile
    )
    value = out.losses.sum() + sum(p.square().sum() for p in out.params.values())
    return [
        out.losses.detach(),
        *torch.autograd.grad(
            value, [*optimizer.parameters(), *params.values()], create_graph=create_graph
        ),
    ]


def assert_equal(found: list, expected: list, tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * (1 + other.abs().max())


@needs_compiler
class TestEquality:
    """Compiled code orders sums differently: 1e-12 in float64, 1e-5 in float32."""

    @pytest.mark.parametrize(
        "rule",
        [mo.Backprop(), mo.Backprop("steps"), mo.Backprop(mo.Revolve(2)), mo.FirstOrder()],
        ids=["full", "steps", "revolve", "first-order"],
    )
    def test_a_step_and_its_pullback_are_compiled_once_for_every_length(
        self, rule: Rule, no_recompilation: Callable[[], None], float64: None
    ) -> None:
        """Adam counts its steps, and the count must not be compiled in."""
        optimizer = Adam(lr=nn.Parameter(torch.tensor(0.1)))
        for steps in (3, 7):
            assert_equal(
                gradients(optimizer, rule, steps, compile=True),
                gradients(optimizer, rule, steps, compile=False),
                1e-12,
            )
            no_recompilation()

    @pytest.mark.parametrize(
        ("optimizer", "layout"),
        [(SGD(0.1, momentum=0.9), torch.contiguous_format), (Adam(0.1), torch.channels_last)],
        ids=["momentum-contiguous", "adam-channels-last"],
    )
    def test_one_compiled_step_is_for_all(
        self,
        layout: torch.memory_format,
        optimizer: mo.Optimizer,
        no_recompilation: Callable[[], None],
    ) -> None:
        """The first step meets parameters and a state without a graph, the later ones do not."""
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)
        ).to(memory_format=layout)
        net = mo.functional(model)
        x, y = torch.randn(5, 2, 4, 4).to(memory_format=layout), torch.tensor([0, 1, 1, 0, 1])

        def gradient(compile: bool) -> tuple[Tensor, ...]:
            def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
                return F.cross_entropy(net(params, batch[0]), batch[1])

            out = mo.minimize(loss_fn, optimizer, net.params, (x, y), steps=3, compile=compile)
            return torch.autograd.grad(loss_fn(out.params, (x, y)), list(net.params.values()))

        no_recompilation()
        assert_equal(list(gradient(True)), list(gradient(False)), 1e-5)
        gradient(True)

    def test_a_sum_with_a_scaled_product_of_matrices(self) -> None:
        """Before 2.15 torch makes `addmm` of it and forgets the scale.

        That is the reason for the second way in `scaled_sum`.
        """
        x, y = torch.randn(3, 3), torch.randn(3, 3)
        assert_equal(
            [compile_whole(lambda x, y: tree.scaled_sum(x, -0.1, x @ y))(x, y)],
            [x - 0.1 * (x @ y)],
            1e-5,
        )
        torch_s = torch.compile(lambda x, y: torch.add(x, x @ y, alpha=-0.1), fullgraph=True)
        mended = is_mended("the compiler forgets the scale of a sum with a product of matrices")
        assert_equal([torch_s(x, y)], [x + (-0.1 if mended else 1.0) * (x @ y)], 1e-5)

    @pytest.mark.parametrize("whole", [True, False], ids=["meta-gradient", "inner-step"])
    def test_a_loop_over_tasks_is_compiled_once(
        self, whole: bool, no_recompilation: Callable[[], None]
    ) -> None:
        """For all tasks, for every call with other episodes.

        And for parameters of a module as for plain tensors.
        """
        torch.manual_seed(0)
        net = mo.functional(
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        )

        def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(net(params, batch[0]), batch[1])

        def task_loss(params: dict[str, Tensor], task: Episode, compile: bool = False) -> Tensor:
            return loss_fn(
                mo.minimize(
                    loss_fn, SGD(lr=0.4), params, task.support, steps=2, compile=compile
                ).params,
                task.query,
            )

        inner = functools.partial(task_loss, compile=True)
        meta_gradient = mo.meta_grad(task_loss if whole else inner, compile=whole, chunk_size=1)
        plain = {name: param.detach().clone() for name, param in net.params.items()}
        no_recompilation()
        for params in (
            net.params,
            net.params,
            plain,
            {name: param.clone() for name, param in net.params.items()},
        ):
            tasks = Episode(support=batches(3), query=batches(3))
            tasks = Episode(*((torch.randn_like(x), y) for x, y in tasks))
            found, losses = meta_gradient(params, tasks)
            expected, _ = mo.meta_grad(task_loss, chunk_size=1)(params, tasks)
            assert_equal([*found.values()], [*expected.values()], 1e-5)
            assert losses.shape == (3,)

    def test_the_lstm_step_and_its_pullback_in_float32(
        self, no_recompilation: Callable[[], None]
    ) -> None:
        """Wide enough for vector instructions; once for every length too."""
        optimizer = LSTMOptimizer(hidden_size=20)
        rule = mo.FirstOrder("steps")
        for steps in (3, 5):
            assert_equal(
                gradients(optimizer, rule, steps, compile=True),
                gradients(optimizer, rule, steps, compile=False),
                1e-5,
            )
            no_recompilation()

    def test_adam_and_a_learned_schedule(self) -> None:
        optimizer = Adam(lr=LSTMSchedule())
        rule = mo.Backprop()
        assert_equal(
            gradients(optimizer, rule, 4, compile=True),
            gradients(optimizer, rule, 4, compile=False),
            1e-5,
        )

    @pytest.mark.parametrize("memory", ["steps", mo.Revolve(2)], ids=["steps", "revolve"])
    def test_second_derivatives_through_a_compiled_loop(
        self, memory: object, float64: None
    ) -> None:
        optimizer, rule = SGD(lr=nn.Parameter(torch.tensor(0.1)), momentum=0.9), mo.Backprop(memory)

        def seconds(*, compile: bool) -> list[Tensor]:
            # one layer: its loss has all derivatives too, in smaller graphs
            first = gradients(optimizer, rule, 4, compile=compile, deep=False, create_graph=True)
            return [
                *first,
                *torch.autograd.grad(
                    sum(g.square().sum() for g in first[1:]), [*optimizer.parameters()]
                ),
            ]

        assert_equal(seconds(compile=True), seconds(compile=False), 1e-11)

    def test_those_of_a_loop_compiled_as_a_whole_are_refused(self) -> None:
        optimizer, rule = Adam(lr=nn.Parameter(torch.tensor(0.1))), mo.Backprop()
        first = gradients(optimizer, rule, 2, compile=True, deep=False, create_graph=True)
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            torch.autograd.grad(first[1], [*optimizer.parameters()])

    def test_a_whole_loop_is_one_graph_for_an_outer_compiler(self) -> None:
        """With Adam and a learnable schedule.

        The derivative in the schedule and in the initial parameters is included. What counts is
        what the compiler sees, so no code is generated.
        """
        optimizer = Adam(lr=Cosine(nn.Parameter(torch.tensor(0.1)), steps=2))
        loss_fn, params, rows = *made(), batches(2)

        def value() -> Tensor:
            return mo.minimize(loss_fn, optimizer, params, rows).losses.sum()

        learned = [*optimizer.parameters(), *params.values()]
        seen = torch.compile(value, fullgraph=True, backend="aot_eager")
        found, expected = (torch.autograd.grad(f(), learned) for f in (seen, value))
        assert_equal([*found], [*expected], 1e-5)

    def test_dropout_draws_what_it_draws_uncompiled(self) -> None:
        optimizer = SGD(lr=nn.Parameter(torch.tensor(0.1)))
        rule = mo.Backprop("steps")
        found = gradients(optimizer, rule, 4, compile=True, dropout=0.5)
        assert_equal(found, gradients(optimizer, rule, 4, compile=False, dropout=0.5), 1e-5)

    def test_complex_parameters(self) -> None:
        params, target, *shifts = torch.randn(4, 3, dtype=torch.complex128)

        def loss_fn(w: Tensor, batch: None) -> Tensor:
            return (w * w - target).abs().square().sum()

        def task_loss(w: Tensor, shift: Tensor) -> Tensor:
            return loss_fn(mo.minimize(loss_fn, SGD(lr=0.1), w + shift, None, steps=2).params, None)

        found, expected = (
            mo.meta_grad(task_loss, compile=c)(params, torch.stack(shifts)) for c in (True, False)
        )
        assert_equal(list(found), list(expected), 1e-12)

    def test_without_gradients_one_step_is_compiled(
        self, no_recompilation: Callable[[], None]
    ) -> None:
        for steps in (2, 5):
            loss_fn, params = made()
            with torch.no_grad():
                found, expected = [
                    mo.minimize(loss_fn, Adam(), params, batches(steps), compile=c).losses
                    for c in (True, False)
                ]
            assert_equal([found], [expected], 1e-5)
            no_recompilation()

    def test_a_graph_break_is_an_error(self) -> None:
        _, params = made()

        def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            torch._dynamo.graph_break()
            return params["0.weight"].sum()

        with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
            mo.minimize(
                loss_fn,
                SGD(lr=0.1),
                params,
                batches(3),
                differentiate=mo.Backprop("steps"),
                compile=True,
            )


@needs_compiler
def test_differences_of_a_loss_with_running_statistics(float64: None) -> None:
    """A loss that draws nothing is evaluated twice, not batched, which batch norm refuses."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    net, x, y = mo.functional(model), torch.randn(6, 3), torch.randn(6, 1)

    def loss(params: Any, batch: Any, meta: Tensor, buffers: Any) -> tuple[Tensor, Any]:
        out, after = net.with_buffers(params, buffers, batch[0])
        return ((out - meta * batch[1]) ** 2).mean(), after

    def slope(*, compile: bool) -> Tensor:
        meta = torch.tensor(0.5, requires_grad=True)
        end = mo.minimize(
            loss,
            SGD(0.1),
            net.params,
            (x, y),
            steps=2,
            meta=meta,
            buffers=net.buffers,
            differentiate=mo.FiniteDifference(1e-3),
            compile=compile,
        ).params
        return torch.autograd.grad(sum((p**2).sum() for p in end.values()), meta)[0]

    # rounding, divided by the radius
    assert_equal([slope(compile=True)], [slope(compile=False)], 1e-9)


def test_what_calls_the_kernels_is_compiled_for_real_tensors_on_a_cpu() -> None:
    kinds: dict[bool, list[object]] = {native: [] for native in (True, False)}

    def pretend(
        fn: Callable[..., Tensor], *, options: dict[str, Any], **_: object
    ) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            kinds[options.get("cpp_wrapper", False)].append(args)
            return fn(*args)

        return call

    real, odd = torch.ones(2), [torch.ones(2, device="meta"), torch.ones(2, dtype=torch.complex64)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", pretend)
        fast = compile_whole(lambda tensors, other: None)
        fast([real], 3)
        for tensor in odd:
            fast([real, {"a": tensor}], 3)
    assert (len(kinds[True]), len(kinds[False])) == (1, 2)


def test_more_shapes_than_torch_remembers_by_itself() -> None:
    """The step that all losses share meets torch's limit of 8 compiled versions soon."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        fast = compile_whole(lambda x: x.sin() + 1)
    for length in range(1, 12):
        assert_equal([fast(torch.ones(length))], [torch.ones(length).sin() + 1], 0.0)


class Noisy(Regression):
    """The same with noise on the inputs, which both halves of a pair have alike."""

    def loss(self, w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return super().loss(w, (x + 0.1 * torch.randn_like(x), y))


def train(make: Any, family: mo.TaskFamily, *, compile: bool, steps: int) -> list[Any]:
    """Return theta after each outer step, over the end of an episode."""
    optimizer = SGD(lr=nn.Parameter(torch.tensor(0.05)), momentum=0.5)
    training = mo.MetaTraining(
        optimizer, family, estimator=make(compile=compile), outer=Adam(0.01), horizon=5
    )
    found = []
    for _ in range(steps):
        found += [training.step()["loss"], optimizer.lr.detach().clone()]
    return found


@needs_compiler
class TestEstimators:
    @pytest.mark.usefixtures("float64")
    @pytest.mark.parametrize(
        ("family", "make"),
        [
            (Noisy(), lambda **more: mo.PES(0.1, pairs=2, window=2, stagger=False, **more)),
            (Regression(), lambda **more: mo.TruncatedBackprop(window=2, tasks=2, **more)),
        ],
        ids=["PES", "TruncatedBackprop"],
    )
    def test_equal_to_the_eager_one_with_one_compiled_step(
        self, family: Any, make: Any, no_recompilation: Callable[[], None]
    ) -> None:
        """Sums in another order: 1e-10. A window has two steps, the last of an episode one."""
        train(make, family, compile=True, steps=1)
        no_recompilation()
        pairs = zip(*[train(make, family, compile=c, steps=4) for c in (True, False)], strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_inside_a_transform_the_outermost_function_is_to_be_compiled() -> None:
    loss_fn, params = made()

    def outer(lr: Tensor) -> Tensor:
        return mo.minimize(loss_fn, SGD(lr=lr), params, batches(3), compile=True).losses.sum()

    with pytest.raises(ValueError, match="Compile the outermost function instead"):
        torch.func.grad(outer)(torch.tensor(0.1))


@pytest.mark.slow
def test_without_a_compiler_it_warns_once_and_runs() -> None:
    program = """
import warnings, torch, metaopt as mo
from optimizers import SGD
warnings.simplefilter("ignore", DeprecationWarning)
net = mo.functional(torch.nn.Linear(2, 1))
loss_fn = lambda params, batch: net(params, batch).square().mean()
def run(c):
    rule = mo.Backprop("steps")
    batches = torch.ones(3, 4, 2)
    return mo.minimize(loss_fn, SGD(.1), net.params, batches, differentiate=rule, compile=c)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", RuntimeWarning)
    found = [run(True).losses, run(True).losses]
    found[0].sum().backward()
messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
assert len(messages) == 1 and "found no compiler" in messages[0] and "g++" in messages[0], messages
assert torch.equal(found[0], run(False).losses) and torch.equal(found[1], found[0])
"""
    subprocess.run(
        [sys.executable, "-c", program], check=True, env={**os.environ, "CXX": "/nonexistent"}
    )
