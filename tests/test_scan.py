"""The differentiable loop itself, and loops inside loops."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from peak_memory import printed
from problems import assert_close, two_derivatives
from torch import Tensor
from torch.func import grad, jacrev, vmap

import metaopt as mo
from metaopt.scan import scan
from optimizers import SGD, Adam

pytestmark = pytest.mark.usefixtures("float64")

MODES = ["full", "steps"]
each_memory = pytest.mark.parametrize("mode", MODES)


def rotate(
    inputs: dict[str, Tensor], carry: tuple[Tensor, Tensor], x: dict[str, Tensor]
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """A step with an integer in its carry and in its rows.

    It also has one input that some steps leave alone.
    """
    position, count = carry
    after = torch.sin(inputs["a"] * position + x["shift"]) + count * inputs["b"] * x["choice"]
    return (after, count + 1), (after * position).sum()


def rotation(mode: str) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    inputs = {"a": torch.randn(3, requires_grad=True), "b": torch.randn(3, requires_grad=True)}
    position = torch.randn(3, requires_grad=True)
    xs = {
        "shift": torch.randn(6, 3, requires_grad=True),
        "choice": torch.tensor([0, 1, 1, 0, 1, 0]),
    }
    (last, count), outs = scan(rotate, inputs, (position, torch.tensor(1)), xs, 6, mode)  # type: ignore[arg-type]
    assert int(count) == 7
    return [inputs["a"], inputs["b"], position, xs["shift"]], (
        last.square() * torch.arange(1.0, 4)
    ).sum() + outs.square().sum()


def test_integers_in_carry_and_rows_have_no_derivative_and_break_none() -> None:
    kept, rebuilt = [two_derivatives(value, inputs) for inputs, value in map(rotation, MODES)]
    assert_close(rebuilt, kept, 1e-12)


def test_one_row_of_one_step_receives_its_own_cotangent() -> None:
    """d out_t / d x_s is triangular in time."""
    xs = torch.randn(4)

    def outs(xs: Tensor, mode: str) -> Tensor:
        return scan(
            lambda a, c, x: (a * c + x, torch.sin(a * c + x)),
            torch.tensor(0.7),
            torch.tensor(0.3),
            xs,
            4,
            mode,
        )[1]  # type: ignore[arg-type]

    jacobian = jacrev(outs)(xs, "steps")
    assert_close(jacobian, jacrev(outs)(xs, "full"), 1e-13)
    assert torch.equal(jacobian, jacobian.tril())
    assert (jacobian.diagonal() != 0).all()


@each_memory
def test_a_carry_that_a_step_returns_unchanged(mode: str) -> None:
    """A Function may not return an input, nor one tensor twice."""
    a, w = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    (same, twice, again), outs = scan(
        lambda a, c, _: ((c[0], c[0], c[0] * a), c[2] * a), a, (w, w, w), (), 3, mode
    )  # type: ignore[arg-type]
    assert_close(
        [same, twice, again, outs], [w, w, a * w, torch.stack([a * w, a * a * w, a * a * w])], 1e-14
    )
    found = torch.autograd.grad(same + twice + again + outs.sum(), [a, w])
    assert_close(
        list(found), [torch.tensor(3.0 + 3 + 12 + 12), torch.tensor(1.0 + 1 + 2 + 2 + 4 + 4)], 1e-14
    )


@each_memory
def test_one_tensor_in_several_places_of_a_result(mode: str) -> None:
    """A schedule that remembers the loss returns it twice.

    In the carry and as the step's output.
    """
    a = torch.tensor(0.5, requires_grad=True)

    def step(
        a: Tensor, carry: tuple[Tensor, Tensor], _: tuple
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        after = torch.sin(a * carry[0])
        return (after, after), after

    (first, second), outs = scan(step, a, (torch.ones(()), torch.ones(())), (), 3, mode)  # type: ignore[arg-type]
    x = torch.ones(())
    for _ in range(3):
        x = torch.sin(a * x)
    assert_close([first, second, outs[-1]], [x, x, x], 1e-14)
    assert_close(
        torch.autograd.grad(first + second + outs[-1], a)[0],
        3 * torch.autograd.grad(x, a)[0],
        1e-13,
    )


@each_memory
def test_complex_tensors_are_differentiated(mode: str) -> None:
    """z_{t+1} = i a z_t + x_t.

    A complex carry, a complex input and complex rows, both derivatives by hand-unrolled autograd.
    """
    a, z = torch.randn(2, dtype=torch.complex128).unbind()
    a, z, xs = (
        leaf.clone().requires_grad_() for leaf in (a, z, torch.randn(4, dtype=torch.complex128))
    )

    def step(a: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        after = 1j * a * z + x
        return after, after.abs().square()

    last, outs = scan(step, a, z, xs, 4, mode)  # type: ignore[arg-type]
    by_hand, total = z, torch.zeros(())
    for x in xs:
        by_hand = 1j * a * by_hand + x
        total = total + by_hand.abs().square()

    def derivatives(value: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(value, [a, z, xs], create_graph=True)
        return [
            *first,
            *torch.autograd.grad(sum(g.abs().square().sum() for g in first), [a, z, xs]),
        ]

    assert_close(derivatives(outs.sum() + last.real), derivatives(total + by_hand.real), 1e-12)


@each_memory
def test_what_is_not_used_gets_no_gradient(mode: str) -> None:
    used, unused = torch.tensor(2.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    last, _ = scan(
        lambda inputs, c, _: (c * inputs[0], c), (used, unused), torch.tensor(1.0), (), 3, mode
    )  # type: ignore[arg-type]
    found = torch.autograd.grad(last, [used, unused], allow_unused=True)
    assert_close(found[0], torch.tensor(12.0), 1e-14)
    assert found[1] is None or found[1] == 0


def quartic(w: Tensor, target: Tensor, penalty: Tensor) -> Tensor:
    return ((w - target) ** 2).sum() + penalty.exp() * (w**4).sum()


def nested(top: Tensor, modes: tuple[str, str, str], rule: type = mo.Backprop) -> Tensor:
    """Three loops, each learning for the one below.

    The lowest fits w, the middle one learns its penalty through it, the top one learns the start of
    both.
    """
    target = torch.tensor([0.5, -1.0])

    def middle_loss(penalty: Tensor, _: None, top: Tensor) -> Tensor:
        low = mo.minimize(
            quartic,
            Adam(lr=0.05),
            top * target,
            target,
            steps=2,
            meta=penalty,
            differentiate=rule(memory=modes[0]),
        )
        return (low.params - 0.3).square().sum() + low.losses.sum() + penalty**2

    def top_loss(start: Tensor, _: None, top: Tensor) -> Tensor:
        mid = mo.minimize(
            middle_loss,
            SGD(lr=0.1, momentum=0.5),
            start,
            None,
            steps=2,
            meta=top,
            differentiate=rule(memory=modes[1]),
        )
        return mid.params.square() + mid.losses.sum()

    out = mo.minimize(
        top_loss,
        SGD(lr=0.1),
        torch.tensor(-1.0),
        None,
        steps=2,
        meta=top,
        differentiate=rule(memory=modes[2]),
    )
    return out.params.square() + out.losses.sum()


def nested_by_hand(top: Tensor) -> Tensor:
    """The same three loops, written out with `torch.autograd`."""
    target = torch.tensor([0.5, -1.0])

    def gradient(value: Tensor, at: Tensor) -> Tensor:
        return torch.autograd.grad(value, at, create_graph=True)[0]

    def middle_loss(penalty: Tensor) -> Tensor:
        w = top * target
        mean, square, total = torch.zeros(2), torch.zeros(2), torch.zeros(())
        for t in (1, 2):
            loss = quartic(w, target, penalty)
            g = gradient(loss, w)
            mean, square, total = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2, total + loss
            w = w - 0.05 * mean / (1 - 0.9**t) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        return (w - 0.3).square().sum() + total + penalty**2

    def top_loss(start: Tensor) -> Tensor:
        penalty, velocity, total = start, torch.zeros(()), torch.zeros(())
        for _ in range(2):
            loss = middle_loss(penalty)
            velocity, total = 0.5 * velocity + gradient(loss, penalty), total + loss
            penalty = penalty - 0.1 * velocity
        return penalty.square() + total

    start, total = torch.tensor(-1.0, requires_grad=True), torch.zeros(())
    for _ in range(2):
        loss = top_loss(start)
        start, total = start - 0.1 * gradient(loss, start), total + loss
    return start.square() + total


@pytest.mark.parametrize("modes", list(itertools.product(MODES, repeat=3)), ids="-".join)
def test_three_levels_equal_autograd_through_everything(modes: tuple[str, str, str]) -> None:
    points = torch.tensor([0.8, 1.3])
    wanted = []
    for point in points:
        top = point.clone().requires_grad_()
        wanted.append(torch.autograd.grad(nested_by_hand(top), top)[0])
    # 2 x 2 x 2 steps and three derivatives: the terms are of order 10 and cancel to some 1e-12.
    top = points[0].clone().requires_grad_()
    assert_close(torch.autograd.grad(nested(top, modes), top)[0], wanted[0], 1e-10)
    assert_close(grad(nested)(points[0], modes), wanted[0], 1e-10)
    assert_close(vmap(lambda top: grad(nested)(top, modes))(points), torch.stack(wanted), 1e-10)


@pytest.mark.parametrize("modes", list(itertools.product(MODES, repeat=3)), ids="-".join)
def test_second_derivative_of_two_levels(modes: tuple[str, str, str]) -> None:
    """The Hessian of a meta-loss, by `grad(grad)` and by double backward."""
    low, high, _ = modes
    target = torch.tensor([0.5, -1.0])

    def value(top: Tensor) -> Tensor:
        def upper(penalty: Tensor, _: None, top: Tensor) -> Tensor:
            rule = mo.Backprop(memory=low)  # type: ignore[arg-type]
            return (
                mo.minimize(
                    quartic,
                    SGD(lr=0.05),
                    top * target,
                    target,
                    steps=2,
                    meta=penalty,
                    differentiate=rule,
                )
                .params.square()
                .sum()
            )

        return mo.minimize(
            upper,
            SGD(lr=0.1),
            torch.tensor(-1.0),
            None,
            steps=2,
            meta=top,
            differentiate=mo.Backprop(memory=high),
        ).params  # type: ignore[arg-type]

    def by_hand(top: Tensor) -> Tensor:
        penalty = torch.tensor(-1.0, requires_grad=True)
        for _ in range(2):
            w = top * target
            for _ in range(2):
                w = w - 0.05 * (2 * (w - target) + penalty.exp() * 4 * w**3)
            penalty = (
                penalty - 0.1 * torch.autograd.grad(w.square().sum(), penalty, create_graph=True)[0]
            )
        return penalty

    top = torch.tensor(0.8, requires_grad=True)
    wanted = two_derivatives(by_hand(top), [top])
    assert_close(two_derivatives(value(top), [top]), wanted, 1e-10)
    assert_close(grad(value)(top.detach()), wanted[0][0], 1e-10)
    # one entry: linspace(-1, 1.3, 1) = -1
    assert_close(-grad(grad(value))(top.detach()), wanted[1][0], 1e-10)


@pytest.mark.parametrize("modes", list(itertools.product(MODES, repeat=2)), ids="-".join)
def test_first_order_nested_in_first_order(modes: tuple[str, str]) -> None:
    """Inside a first-order outer loop the inner one still gives the outer loss its gradient."""

    def upper(penalty: Tensor, _: None) -> Tensor:
        rule = mo.FirstOrder(memory=modes[0])  # type: ignore[arg-type]
        return mo.minimize(
            quartic,
            SGD(lr=0.05),
            torch.ones(2),
            torch.zeros(2),
            steps=2,
            meta=penalty,
            differentiate=rule,
        ).losses.sum()

    start = torch.tensor(-1.0, requires_grad=True)
    out = mo.minimize(
        upper, SGD(lr=0.1), start, None, steps=1, differentiate=mo.FirstOrder(memory=modes[1])
    )  # type: ignore[arg-type]

    w, total = torch.ones(2), torch.zeros(())
    for _ in range(2):
        total = total + quartic(w, torch.zeros(2), start)
        w = (w - 0.05 * (2 * w + start.exp() * 4 * w**3)).detach()
    (inner,) = torch.autograd.grad(total, start)
    assert_close(out.params, start - 0.1 * inner, 1e-12)
    assert_close(torch.autograd.grad(out.params, start)[0], torch.tensor(1.0), 1e-12)


@pytest.mark.slow
@each_memory
def test_a_compiled_loop_equals_the_eager_one(mode: str) -> None:
    """An outer `fullgraph` compile sees through both memory modes.

    This backend needs no C++ compiler.
    """

    def value(w: Tensor) -> Tensor:
        return mo.minimize(
            quartic,
            Adam(lr=0.1),
            w,
            torch.ones(3),
            steps=3,
            meta=torch.tensor(-1.0),
            differentiate=mo.Backprop(memory=mode),
        ).losses.sum()  # type: ignore[arg-type]

    w = torch.randn(3)
    compiled = torch.compile(grad(value), fullgraph=True, backend="aot_eager")
    assert_close(compiled(w), grad(value)(w), 1e-12)


MEMORY_PROGRAM = """
import sys, torch, metaopt as mo
from optimizers import SGD
torch.set_num_threads(1)
memory, steps = sys.argv[1], int(sys.argv[2])
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
net = mo.functional(model)
batch = torch.randn(512, 64), torch.randn(512, 1)
loss = lambda params, batch: (net(params, batch[0]) - batch[1]).square().mean()
def task_loss(params, task, steps=steps):
    rule = mo.Backprop(memory=memory)
    return mo.minimize(loss, SGD(0.01), params, task, steps=steps, differentiate=rule).losses.sum()
one = tuple(leaf[None] for leaf in batch)
mo.meta_grad(lambda params, task: task_loss(params, task, 2))(net.params, one)
before = peak()
mo.meta_grad(task_loss)(net.params, one)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_steps_bounds_the_memory_of_a_meta_gradient() -> None:
    """`torch.func.grad` records the backward pass.

    Unless that is undone, "steps" keeps as much as "full".
    """
    grown = {memory: printed(MEMORY_PROGRAM, memory, 150) for memory in ("full", "steps")}
    assert grown["full"] > 25_000  # KiB; measured 46,000
    # measured 7,000: 150 states of 17 KiB and one step's graph
    assert grown["steps"] < grown["full"] / 4


def test_a_state_that_is_no_tensor_is_refused() -> None:
    """A plain loop may carry a Python number.

    A rebuilt one would see the number of another step.
    """

    def step(
        inputs: Tensor, carry: tuple[Tensor, int], _: tuple[()]
    ) -> tuple[tuple[Tensor, int], Tensor]:
        value, count = carry
        return (value * inputs, count + 1), value.sum()

    start = torch.ones(2, requires_grad=True)
    (_, count), _ = scan(step, torch.tensor(0.5), (start, 0), (), 3, "full")
    assert count == 3
    for memory, compile in (("steps", False), ("full", True)):
        with pytest.raises(
            TypeError, match=r"must be tensors to be kept from step to step, got int at \[1\]"
        ):
            scan(step, torch.tensor(0.5), (start, 0), (), 3, memory, compile=compile)


@pytest.mark.parametrize("mode", ["steps", mo.Revolve(2)], ids=str)
@pytest.mark.parametrize(
    ("after", "what"),
    [
        (lambda a, b: {"b": b, "a": a}, "the same names in another order.* in the same order"),
        (lambda a, b: {"a": a}, r"missing \[\"\['b'\]\"\], unknown \[\]"),
        (lambda a, b: {"a": a, "b": [b]}, r"missing \[\"\['b'\]\"\], unknown \[\"\['b'\]\[0\]\"\]"),
    ],
    ids=["order", "names", "nesting"],
)
def test_a_step_returns_the_carry_in_the_structure_in_which_it_got_it(
    mode: str, after: Any, what: str
) -> None:
    def step(inputs: Tensor, carry: dict[str, Tensor], x: None) -> tuple[Any, Tensor]:
        a, b = carry["a"] * inputs, carry["b"]
        return after(a, b), a.sum()

    inputs = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(
        ValueError,
        match=f"`the carry that a step returns` does not have the expected structure: {what}",
    ):
        scan(step, inputs, {"a": torch.ones(1), "b": torch.ones(1)}, (), 3, mode)
