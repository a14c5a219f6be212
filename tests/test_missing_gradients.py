"""A parameter without a gradient is not moved, its memory stays and its step is not counted.

What torch.optim does.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.optim import lr_scheduler

import metaopt as mo
from metaopt import tree
from optimizers import (
    ASGD,
    RNNMLP,
    SGD,
    Adadelta,
    Adafactor,
    AdafactorMLP,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    ClipNorm,
    ClipValue,
    Cosine,
    DecoupledWeightDecay,
    Grouped,
    Lion,
    LSTMOptimizer,
    LSTMSchedule,
    Masked,
    MLPOptimizer,
    NAdam,
    NNAdam,
    RAdam,
    RMSprop,
    Rprop,
    WeightDecay,
)

pytestmark = pytest.mark.usefixtures("float64")
SHAPES = ((3, 2), (2,), (), (2, 2), (4,))
STEPS = 90

# ours and torch's have the same names of arguments
EQUALS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (SGD, torch.optim.SGD, {"lr": 0.05}),
    "sgd-decay": (SGD, torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.1}),
    "sgd-momentum": (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "sgd-dampening": (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}),
    "sgd-nesterov": (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adam": (Adam, torch.optim.Adam, {"lr": 0.05}),
    "adam-amsgrad": (Adam, torch.optim.Adam, {"lr": 0.05, "amsgrad": True, "weight_decay": 0.1}),
    "adamw": (AdamW, torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    "adamax": (Adamax, torch.optim.Adamax, {"lr": 0.05, "weight_decay": 0.1}),
    "nadam": (NAdam, torch.optim.NAdam, {"lr": 0.05, "weight_decay": 0.1}),
    "nadamw": (
        NAdam,
        torch.optim.NAdam,
        {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "radam": (RAdam, torch.optim.RAdam, {"lr": 0.05, "weight_decay": 0.1}),
    "radamw": (
        RAdam,
        torch.optim.RAdam,
        {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "adagrad": (
        Adagrad,
        torch.optim.Adagrad,
        {"lr": 0.05, "lr_decay": 0.1, "initial_accumulator_value": 0.2},
    ),
    "adafactor": (Adafactor, torch.optim.Adafactor, {"lr": 0.05, "weight_decay": 0.1}),
    "adadelta": (Adadelta, torch.optim.Adadelta, {"lr": 0.5, "weight_decay": 0.1}),
    "rmsprop": (RMSprop, torch.optim.RMSprop, {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop-centered": (
        RMSprop,
        torch.optim.RMSprop,
        {"lr": 0.01, "momentum": 0.9, "centered": True},
    ),
    "asgd": (ASGD, torch.optim.ASGD, {"lr": 0.05, "lambd": 0.1, "t0": 20, "weight_decay": 0.1}),
    "rprop": (Rprop, torch.optim.Rprop, {"lr": 0.05}),
}
each_equal = pytest.mark.parametrize("name", EQUALS)


def start() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(steps: int = STEPS, share: float = 0.6) -> Iterator[list[Tensor | None]]:
    """Yield a gradient for each parameter, None at random.

    The last parameter has none at first, one step has none at all.
    """
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        draws = torch.rand(len(SHAPES), generator=generator).tolist()
        missing = [
            draw > share or step == 7 or (step < 5 and place == 4)
            for place, draw in enumerate(draws)
        ]
        noise = [torch.randn(shape, generator=generator) for shape in SHAPES]
        yield [None if none else g for none, g in zip(missing, noise, strict=True)]


def deploy(
    build: Callable[[Any], torch.optim.Optimizer], schedule: Any = None, steps: int = STEPS
) -> list[Tensor]:
    params = start()
    optimizer = build(params)
    scheduler = None if schedule is None else schedule(optimizer)
    for grads in gradients(steps):
        for param, g in zip(params, grads, strict=True):
            param.grad = g
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [param.detach() for param in params]


def run_pure(optimizer: mo.Optimizer, *, method: str, steps: int = STEPS) -> list[Tensor]:
    params: Any = {str(i): param.detach() for i, param in enumerate(start())}
    state = optimizer.init(params, per_parameter=True)
    for grads in gradients(steps):
        named = dict(zip(params, grads, strict=True))
        if method == "moved":
            params, state = optimizer.moved(named, state, params)
        else:
            updates, state = optimizer(named, state, params)
            assert [u is None for u in updates.values()] == [g is None for g in grads]
            params = mo.apply_updates(params, updates)
    return list(params.values())


@each_equal
def test_deployed_it_equals_torch(name: str) -> None:
    """A case of one step count a group.

    10 of 17 configurations left torch's trajectory, Rprop by .30 after 90 steps.
    """
    ours, theirs, options = EQUALS[name]
    assert_close(deploy(ours(**options).as_torch), deploy(lambda p: theirs(p, **options)), 1e-12)


@each_equal
@pytest.mark.parametrize("method", ["moved", "forward"])
def test_the_pure_optimizer_equals_torch(name: str, method: str) -> None:
    ours, theirs, options = EQUALS[name]
    assert_close(
        run_pure(ours(**options), method=method), deploy(lambda p: theirs(p, **options)), 1e-12
    )


@pytest.mark.parametrize("name", ["adam", "nadam", "asgd", "sgd-momentum", "rprop"])
def test_under_a_schedule_of_torch_too(name: str) -> None:
    """OneCycleLR moves lr and the first beta or momentum.

    Memory over all parameters (NAdam's product) differs between them.
    """
    ours, theirs, options = EQUALS[name]
    cycles = name in ("adam", "nadam", "sgd-momentum")

    def schedule(optimizer: Any) -> Any:
        return lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.1, total_steps=STEPS + 1, cycle_momentum=cycles
        )

    found = deploy(ours(**options).as_torch, schedule)
    assert_close(found, deploy(lambda p: theirs(p, **options), schedule), 1e-12)


@each_equal
def test_resuming_from_a_file_goes_on_as_if_nothing_had_been(name: str) -> None:
    ours, _, options = EQUALS[name]
    params, twins = start(), start()
    optimizer, twin = ours(**options).as_torch(params), ours(**options).as_torch(twins)
    for step, grads in enumerate(gradients(30)):
        if step == 12:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            twin.load_state_dict(torch.load(file, weights_only=True))
            for param, other in zip(params, twins, strict=True):
                other.data.copy_(param)
        for param, other, g in zip(params, twins, grads, strict=True):
            param.grad = other.grad = g
        optimizer.step()
        if step >= 12:
            twin.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_counts_that_do_not_fit_are_refused() -> None:
    params = start()
    optimizer = Adam(0.1).as_torch(params)
    params[0].grad = torch.ones(3, 2)
    optimizer.step()
    state = optimizer.state_dict()
    assert {name: int(count) for name, count in state["state"]["group 0"]["steps"].items()} == dict(
        zip("01234", (1, 0, 0, 0, 0))
    )
    other = Adam(0.1).as_torch(start()[:3])
    with pytest.raises(
        ValueError,
        match=r"`state_dict\['state'\]\['group 0'\]` does not have the expected structure",
    ):
        other.load_state_dict(state)
    broken = copy.deepcopy(state)
    broken["state"]["group 0"]["steps"]["0"] = torch.ones(2)
    with pytest.raises(
        ValueError, match=r"the memory of group 0 has a tensor of shape \(2,\), expected \(\)"
    ):
        Adam(0.1).as_torch(start()).load_state_dict(broken)


def test_parameters_with_one_history_make_their_step_in_one_call() -> None:
    """A frozen parameter, or a state read from a file, does not cost a call for each tensor."""

    class Counting(SGD):
        calls = 0

        def update(self, *args: Any) -> Any:
            type(self).calls += 1
            return super().update(*args)

    params = start()
    optimizer = Counting(0.1, 0.9).as_torch(params)
    for param in params[1:]:
        param.grad = torch.ones_like(param)
    for _ in range(2):
        optimizer.step()
    assert Counting.calls == 2
    resumed = Counting(0.1, 0.9).as_torch(params)
    resumed.load_state_dict(
        mo.tree.map(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, optimizer.state_dict()
        )
    )
    resumed.step()
    assert Counting.calls == 3


def test_the_structure_of_the_state_does_not_change() -> None:
    for optimizer in (
        NAdam(0.1),
        ClipNorm(1.0, Adam(Cosine(0.1, 5))),
        Grouped({"0": SGD(0.1, 0.5), "*": Adam()}),
        LSTMOptimizer(3),
        RNNMLP(4, 3),
    ):
        params = {str(i): param.detach() for i, param in enumerate(start())}
        state = optimizer.init(params, per_parameter=True)
        assert all(
            leaf.dtype == torch.int64 and leaf.shape == () for leaf in tree.leaves(state["steps"])
        )
        for grads in gradients(9):
            after = optimizer(dict(zip(params, grads, strict=True)), state, params)[1]
            assert tree.flatten(after)[1] == tree.flatten(state)[1]
            assert [leaf.shape for leaf in tree.leaves(after)] == [
                leaf.shape for leaf in tree.leaves(state)
            ]
            state = after
        assert int(state["step"]) == 9


@pytest.mark.parametrize(
    "optimizer", [SGD(0.1, 0.9, dampening=0.2), Adam(0.1), NAdam(0.1), ASGD(0.1), Rprop(0.1)]
)
def test_with_every_gradient_there_it_is_the_same_as_ever(optimizer: mo.Optimizer) -> None:
    params = {str(i): param.detach() for i, param in enumerate(start())}
    one, other = optimizer.init(params), optimizer.init(params, per_parameter=True)
    for grads in gradients(5, share=1.0):
        if None in [g if g is None else 0 for g in grads]:
            continue
        named = dict(zip(params, grads, strict=True))
        (plain, one), (each, other) = optimizer(named, one, params), optimizer(named, other, params)
        assert_close(plain, each, 0)


def test_counts_may_be_batched_and_differentiated() -> None:
    """A batch of states with different counts.

    The step's own bias correction for each row, and its derivative.
    """
    optimizer, params = Adam(0.1), {"a": torch.ones(2), "b": torch.ones(2)}
    states = []
    for steps in (1, 3):
        state = optimizer.init(params, per_parameter=True)
        for _ in range(steps):
            _, state = optimizer({"a": torch.ones(2), "b": None}, state, params)
        states.append(state)

    def after(state: Any, g: Tensor) -> Tensor:
        updates, _ = optimizer({"a": g, "b": 2 * g}, state, params)
        return torch.cat([updates["a"], updates["b"]]).sum()

    g = torch.tensor([0.5, -2.0])
    rows = vmap(grad(after, argnums=1), in_dims=(0, None))(tree.stack(states), g)
    assert_close(rows, torch.stack([grad(after, argnums=1)(state, g) for state in states]), 1e-12)
    assert (rows[0] != rows[1]).all()


@pytest.mark.parametrize(
    "optimizer", [NAdam(0.1), Grouped({"a": SGD(0.1, 0.9), "*": ClipNorm(1.0, Adam())})]
)
def test_it_compiles_as_a_whole(optimizer: mo.Optimizer) -> None:
    torch._dynamo.reset()
    params = {"a": torch.ones(3), "b": torch.ones(2)}

    def twice(state: Any, g: Tensor) -> Any:
        moved, state = optimizer.moved({"a": g, "b": None}, state, params)
        return optimizer.moved({"a": g, "b": g[:2]}, state, moved)

    state, g = optimizer.init(params, per_parameter=True), torch.tensor([0.3, -0.2, 0.5])
    assert_close(
        torch.compile(twice, fullgraph=True, backend="eager")(state, g), twice(state, g), 1e-12
    )


def test_complex_parameters_may_lack_a_gradient() -> None:
    weights = [nn.Parameter(torch.tensor([1 + 2j, 3 - 1j])), nn.Parameter(torch.tensor([0.5 - 1j]))]
    twins = copy.deepcopy(weights)
    pair = (
        Adam(0.1, weight_decay=0.1).as_torch(weights),
        torch.optim.Adam(twins, 0.1, weight_decay=0.1),
    )
    for step in range(12):
        for own in (weights, twins):
            for place, weight in enumerate(own):
                weight.grad = (
                    None if (step + place) % 3 == 0 else weight.detach().conj() * (step + 1j)
                )
        for optimizer in pair:
            optimizer.step()
    assert_close([w.detach() for w in weights], [w.detach() for w in twins], 1e-12)


# ---- what stands around other optimizers ----


def clipped_by_torch(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    def clip(*_: Any) -> None:
        for param in params:
            if param.grad is not None:
                param.grad.clamp_(-0.5, 0.5)

    optimizer = torch.optim.Adam(params, 0.05)
    optimizer.register_step_pre_hook(clip)
    return optimizer


def test_the_norm_is_that_of_the_gradients_that_are_there() -> None:
    params = {"a": torch.ones(2), "b": torch.ones(1)}
    optimizer = ClipNorm(1.0, SGD(1.0))
    updates, _ = optimizer(
        {"a": torch.tensor([3.0, 4.0]), "b": None},
        optimizer.init(params, per_parameter=True),
        params,
    )
    assert updates["b"] is None
    assert_close(updates["a"], torch.tensor([-0.6, -0.8]), 1e-12)


def test_clip_value_equals_torch() -> None:
    assert_close(deploy(ClipValue(0.5, Adam(0.05)).as_torch), deploy(clipped_by_torch), 1e-12)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (WeightDecay(0.1, SGD(0.05, 0.9)), SGD(0.05, 0.9, weight_decay=0.1)),
        (DecoupledWeightDecay(0.005, Adam(0.05)), AdamW(0.05, weight_decay=0.1)),
        (Grouped({"*": RMSprop(0.01)}), RMSprop(0.01)),
        (Masked(Adam(0.05), "*"), Adam(0.05)),
        (Grouped({"*": ClipValue(0.3, NAdam(0.05))}), ClipValue(0.3, Grouped({"*": NAdam(0.05)}))),
    ],
)
def test_transforms_pass_missing_gradients_on(one: mo.Optimizer, other: mo.Optimizer) -> None:
    assert_close(run_pure(one, method="moved"), run_pure(other, method="forward"), 1e-12)
    assert_close(deploy(one.as_torch), run_pure(other, method="forward"), 1e-12)


def test_groups_count_each_for_itself() -> None:
    found = run_pure(
        Grouped({"[01]": SGD(0.05, 0.9, dampening=0.3), "*": Adam(0.05)}), method="moved"
    )
    sgd = deploy(lambda p: torch.optim.SGD(p, 0.05, 0.9, dampening=0.3))
    adam = deploy(lambda p: torch.optim.Adam(p, 0.05))
    assert_close(found, sgd[:2] + adam[2:], 1e-12)


def test_masked_parameters_stay() -> None:
    found = run_pure(Masked(Adam(0.05), "0"), method="moved")
    assert_close(found[0], deploy(lambda p: torch.optim.Adam(p, 0.05))[0], 1e-12)
    assert_close(found[1:], [param.detach() for param in start()[1:]], 0)


@pytest.mark.parametrize(
    "optimizer",
    [LSTMOptimizer(4), MLPOptimizer(4), AdafactorMLP(), RNNMLP(4, 3), NNAdam(3), Lion(0.01)],
)
def test_every_parameter_has_a_memory_of_its_own(optimizer: mo.Optimizer) -> None:
    """Coordinatewise, or a tensor at a time.

    It is as if each parameter had been alone and had made its own steps only.
    """
    found = run_pure(optimizer, method="forward", steps=20)
    assert_close(deploy(optimizer.as_torch, steps=20), found, 1e-6)  # the networks are float32
    for place, param in enumerate(start()):
        alone = param.detach()
        state = optimizer.init(alone)
        for grads in gradients(20):
            if grads[place] is not None:
                updates, state = optimizer(grads[place], state, alone)
                alone = mo.apply_updates(alone, updates)
        assert_close(found[place], alone, 1e-6)


def test_a_learned_memory_is_divided_among_the_parameters_when_the_first_gradient_is_missing() -> (
    None
):
    """Three steps with all gradients, then one without the second.

    The others go on as if they had been alone.
    """
    optimizer = LSTMOptimizer(4)
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    deployed = optimizer.as_torch(params)
    alone, state = params[0].detach().clone(), optimizer.init(params[0])
    for step in range(5):
        params[0].grad = torch.tensor([0.3, -0.2]) * (step + 1)
        params[1].grad = torch.ones(3) if step < 3 else None
        updates, state = optimizer(params[0].grad, state, alone)
        alone = mo.apply_updates(alone, updates)
        deployed.step()
    assert_close(params[0].detach(), alone.detach(), 1e-6)


def test_a_schedule_counts_the_calls_and_sees_the_gradients_there_are() -> None:
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    optimizer = SGD(Cosine(1.0, 4))
    state = optimizer.init(params, per_parameter=True)
    _, state = optimizer({"a": torch.ones(2), "b": None}, state, params)
    _, state = optimizer({"a": None, "b": None}, state, params)
    updates, _ = optimizer({"a": None, "b": torch.ones(2)}, state, params)
    assert_close(updates["b"], torch.full((2,), -0.5), 1e-12)  # half way, at index 2
    learned = SGD(LSTMSchedule(0.1, steps=5))
    one, two = learned.init(params, per_parameter=True), learned.init(params, per_parameter=True)
    loss = torch.tensor(1.0)
    after = learned({"a": torch.ones(2), "b": None}, one, params, loss=loss)[1]["schedules"]
    zeros = learned({"a": torch.ones(2), "b": torch.zeros(2)}, two, params, loss=loss)[1][
        "schedules"
    ]
    assert_close(after, zeros, 1e-6)


def test_an_optimizer_taken_from_torch_goes_on_as_torch_does() -> None:
    for maximize in (False, True):
        params = start()
        live = torch.optim.NAdam(params, 0.05, maximize=maximize)
        every = list(gradients(40))
        for grads in every[:15]:
            for param, g in zip(params, grads, strict=True):
                param.grad = g
            live.step()
        pure = mo.from_torch(live)
        state = pure.init(params, per_parameter=True)
        found: Any = [param.detach().clone() for param in params]
        for grads in every[15:]:
            found, state = pure.moved(grads, state, found)
            for param, g in zip(params, grads, strict=True):
                param.grad = g
            live.step()
        assert_close(found, [param.detach() for param in params], 1e-12)
        counts = [int(live.state[param]["step"]) for param in params]
        assert [int(count) for count in tree.leaves(state["steps"])] != [int(state["step"])] * len(
            params
        )
        assert sorted(int(count) for count in tree.leaves(state["steps"])) == sorted(counts)


# ---- errors ----


@pytest.mark.parametrize(
    "optimizer",
    [SGD(0.1), ClipNorm(1.0, SGD(0.1)), Grouped({"*": SGD(0.1)}), Masked(SGD(0.1), "a")],
)
@pytest.mark.parametrize("missing", ["b", "ab"])
def test_none_without_a_count_for_each_is_an_error(optimizer: mo.Optimizer, missing: str) -> None:
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    grads = {name: None if name in missing else torch.ones(2) for name in params}
    where = r"\['a'\], \['b'\]" if missing == "ab" else r"\['b'\]"
    message = (
        rf"a gradient for every parameter, got None at {where}. Give zeros. .*"
        r"`optimizer.init\(params, per_parameter=True\)`"
    )
    for method in (optimizer, optimizer.moved):
        with pytest.raises(ValueError, match=message):
            method(grads, optimizer.init(params), params)


def test_memory_that_cannot_be_divided_is_an_error() -> None:
    class Coupled(mo.Optimizer):
        def slots(self, params: Any) -> Any:
            return {"gram": torch.zeros(len(params), len(params))}

        def update(self, grads: Any, params: Any, slots: Any, hyper: Any, step: Any) -> Any:
            return [-g for g in grads], slots

    params = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(
        ValueError,
        match=r"Coupled: the memory 'gram' over all parameters, of shape \(2, 2\), cannot be "
        r"divided",
    ):
        Coupled().init(params, per_parameter=True)


def test_a_forward_that_may_not_know_none_is_an_error() -> None:
    class Halved(SGD):
        def forward(self, grads: Any, state: Any, params: Any = None, *, loss: Any = None) -> Any:
            updates, state = super().forward(grads, state, params, loss=loss)
            return tree.map(lambda update: update / 2, updates), state

    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    weights[0].grad = torch.ones(2)
    with pytest.raises(
        ValueError,
        match="Halved defines `forward` itself, so a parameter without a gradient cannot be left "
        "out",
    ):
        Halved(0.1).as_torch(weights).step()
    weights[1].grad = torch.zeros(2)
    Halved(0.1).as_torch(weights).step()
    assert_close([w.detach() for w in weights], [torch.full((2,), 0.95), torch.ones(2)], 1e-12)
