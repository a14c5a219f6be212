"""Our optimizers as `torch.optim.Optimizer`."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

import metaopt as mo
from optimizers import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Cosine,
    Grouped,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
)

pytestmark = pytest.mark.usefixtures("float64")  # torch's ASGD rounds its rate to the default dtype
KINDS = {
    "sgd": (lambda: SGD(0.05, 0.9), lambda p: torch.optim.SGD(p, 0.05, 0.9)),
    "adam": (lambda: Adam(0.05), lambda p: torch.optim.Adam(p, 0.05)),
    "adamw": (lambda: AdamW(0.05), lambda p: torch.optim.AdamW(p, 0.05)),
    "rmsprop": (
        lambda: RMSprop(0.01, momentum=0.5),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    ),
    "adamax": (
        lambda: Adamax(0.05, weight_decay=0.1),
        lambda p: torch.optim.Adamax(p, 0.05, weight_decay=0.1),
    ),
    "nadam": (
        lambda: NAdam(0.05, weight_decay=0.1),
        lambda p: torch.optim.NAdam(p, 0.05, weight_decay=0.1),
    ),
    "radam": (
        lambda: RAdam(0.05, weight_decay=0.1),
        lambda p: torch.optim.RAdam(p, 0.05, weight_decay=0.1),
    ),
    "adagrad": (
        lambda: Adagrad(0.05, weight_decay=0.1),
        lambda p: torch.optim.Adagrad(p, 0.05, weight_decay=0.1),
    ),
    "adadelta": (
        lambda: Adadelta(0.05, weight_decay=0.1),
        lambda p: torch.optim.Adadelta(p, 0.05, weight_decay=0.1),
    ),
    "asgd": (
        lambda: ASGD(0.05, lambd=0.3, weight_decay=0.1),
        lambda p: torch.optim.ASGD(p, 0.05, lambd=0.3, weight_decay=0.1),
    ),
    "rprop": (lambda: Rprop(0.01), lambda p: torch.optim.Rprop(p, 0.01)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def model_and_data() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    return (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(),
        torch.randn(8, 3).double(),
        torch.randn(8, 1).double(),
    )


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    steps: int,
    scheduler: Any = None,
) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(loss.detach())
        elif scheduler is not None:
            scheduler.step()
        losses.append(float(loss.detach()))
    return losses


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=0.1, total_steps=12, cycle_momentum=False
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [3, 7], 0.5),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, 8),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 9, 2.0),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "average": lambda o: swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (epoch + 1)),
    "warmup": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[4],
    ),
}


# torch's own SequentialLR passes it
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
@each_kind
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_learning_rate_schedulers_act_as_on_torchs_own(kind: str, schedule: str) -> None:
    ends = []
    for build in (KINDS[kind][0]().as_torch, KINDS[kind][1]):
        model, x, y = model_and_data()
        optimizer = build(model.parameters())
        train(model, optimizer, x, y, 12, SCHEDULERS[schedule](optimizer))
        ends.append(([p.detach() for p in model.parameters()], optimizer.param_groups[0]["lr"]))
    assert_close(ends[0], ends[1], 1e-12)


CYCLES = {
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 4),
}


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "adamax", "nadam", "radam", "rmsprop"])
@pytest.mark.parametrize("cycle", CYCLES)
def test_the_momentum_may_be_cycled(kind: str, cycle: str) -> None:
    """A case of groups that said `beta1` where schedulers look for `betas`.

    OneCycleLR's default refused every Adam.
    """
    ends = []
    for build in (KINDS[kind][0]().as_torch, KINDS[kind][1]):
        model, x, y = model_and_data()
        optimizer = build(model.parameters())
        train(model, optimizer, x, y, 12, CYCLES[cycle](optimizer))
        group = optimizer.param_groups[0]
        ends.append(
            (
                [p.detach() for p in model.parameters()],
                group["lr"],
                group.get("betas", group.get("momentum")),
            )
        )
    assert_close(ends[0], ends[1], 1e-12)


@pytest.mark.parametrize("kind", ["adagrad", "adadelta", "asgd", "rprop"])
def test_without_momentum_there_is_nothing_to_cycle(kind: str) -> None:
    for build in (KINDS[kind][0]().as_torch, KINDS[kind][1]):
        optimizer = build([nn.Parameter(torch.ones(2))])
        with pytest.raises(ValueError, match="optimizer must support momentum or beta"):
            CYCLES["one-cycle"](optimizer)


def test_every_scheduler_of_torch_is_tried() -> None:
    names = {
        "LRScheduler",
        "Optimizer",
        "ReduceLROnPlateau",
        "CyclicLR",
        "OneCycleLR",
        "SequentialLR",
    }
    public = {name for name in lr_scheduler.__all__ if name not in names}
    tried = {
        type(make(SGD(0.1, 0.9).as_torch([nn.Parameter(torch.ones(1))]))).__name__
        for make in SCHEDULERS.values()
    }
    assert public <= tried


def test_a_pair_and_its_items_are_the_same() -> None:
    weights = [nn.Parameter(torch.ones(1)) for _ in range(4)]
    optimizer = Adam(0.1, (0.8, 0.9)).as_torch(
        [
            {"params": weights[0], "betas": (0.5, 0.6)},
            {"params": weights[1], "beta1": 0.7},
            {"params": weights[2]},
        ]
    )
    first, second, third = optimizer.param_groups
    assert (first["beta1"], first["beta2"], first["betas"]) == (0.5, 0.6, (0.5, 0.6))
    assert second["betas"] == (0.7, 0.9)
    assert third["betas"] == (0.8, 0.9)
    first["betas"] = [0.1, 0.2]
    assert (first["beta1"], first["beta2"]) == (0.1, 0.2)
    first["beta2"] = 0.3
    assert first["betas"] == (0.1, 0.3)
    first.update(betas=(0.3, 0.4))
    first |= {"beta1": 0.2}
    assert first["betas"] == (0.2, 0.4)
    assert first.setdefault("betas", None) == (0.2, 0.4)
    assert first.setdefault("initial_lr", 0.5) == 0.5
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin.param_groups[0]["betas"] = (0.6, 0.7)
        assert twin.param_groups[0]["beta1"] == 0.6
        assert first["betas"] == (0.2, 0.4)
    again = Adam(0.1).as_torch([{"params": weight} for weight in weights[:3]])
    again.load_state_dict(optimizer.state_dict())
    assert [group["betas"] for group in again.param_groups] == [(0.2, 0.4), (0.7, 0.9), (0.8, 0.9)]
    again.param_groups[0]["betas"] = (0.6, 0.7)
    assert again.param_groups[0]["beta2"] == 0.7
    assert Rprop(0.1, etas=(0.4, 1.3)).as_torch(weights).defaults["etas"] == (0.4, 1.3)
    assert "betas" not in Adam(0.1, (Cosine(0.9, 5), 0.9)).as_torch(weights).defaults
    with pytest.raises(
        ValueError,
        match=r"A parameter group has betas=\(0.5, 0.6\) and beta1=0.4, which is one of them. Give "
        r"it once",
    ):
        optimizer.add_param_group({"params": weights[3], "betas": (0.5, 0.6), "beta1": 0.4})
    with pytest.raises(
        ValueError,
        match=r"`betas` of a parameter group must be 2 numbers \(beta1, beta2\), got 0.5",
    ):
        optimizer.add_param_group({"params": weights[3], "betas": 0.5})


def test_a_state_without_pairs_loads() -> None:
    """Files that were written before groups had `betas`."""
    weight = nn.Parameter(torch.ones(1))
    state = Adam(0.1, (0.5, 0.6)).as_torch([weight]).state_dict()
    del state["param_groups"][0]["betas"]
    optimizer = Adam(0.1).as_torch([weight])
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.6)


def test_a_group_may_say_where_a_scheduler_began() -> None:
    """What torch asks for to resume a scheduler by hand, with `last_epoch`."""
    rates = []
    for build in (SGD(0.1).as_torch, lambda p: torch.optim.SGD(p, 0.1)):
        optimizer = build([{"params": [nn.Parameter(torch.ones(1))], "initial_lr": 0.4}])
        lr_scheduler.StepLR(optimizer, 2, 0.5, last_epoch=3)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1]


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_gradients_act_as_dense_ones(kind: str) -> None:
    """A case of an embedding with sparse=True: all but SGD failed inside of torch.

    torch's SGD and Adagrad take them.
    """
    x = torch.tensor([[0, 2, 2], [4, 0, 2]])
    ends = []
    for sparse, build in ((True, KINDS[kind][0]().as_torch), (False, KINDS[kind][1])):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Flatten(), nn.Linear(9, 1))
        optimizer = build(model.parameters())
        train(model, optimizer, x, torch.ones(2, 1), 8)
        assert model[0].weight.grad.is_sparse == sparse
        ends.append([p.detach() for p in model.parameters()])
    assert_close(ends[0], ends[1], 1e-12)


def test_torchs_own_sparse_sgd_is_equal() -> None:
    ends = []
    for build in (SGD(0.1, 0.9).as_torch, lambda p: torch.optim.SGD(p, 0.1, 0.9)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(9, 1))
        train(
            model,
            build(model.parameters()),
            torch.tensor([[0, 2, 2], [4, 0, 2]]),
            torch.ones(2, 1),
            8,
        )
        ends.append([p.detach() for p in model.parameters()])
    assert_close(ends[0], ends[1], 1e-12)


@each_kind
def test_groups_have_options_of_their_own(kind: str) -> None:
    ends = []
    for build in (KINDS[kind][0]().as_torch, KINDS[kind][1]):
        model, x, y = model_and_data()
        decay = {} if kind == "rprop" else {"weight_decay": 0.1}
        optimizer = build(
            [{"params": model[0].parameters(), "lr": 0.02, **decay}, {"params": [model[2].weight]}]
        )
        train(model, optimizer, x, y, 3)
        optimizer.add_param_group({"params": model[2].bias, "lr": 0.001})
        train(model, optimizer, x, y, 3)
        ends.append([p.detach() for p in model.parameters()])
    assert_close(ends[0], ends[1], 1e-12)


@each_kind
def test_resuming_from_a_file_is_bit_for_bit(kind: str) -> None:
    model, x, y = model_and_data()
    optimizer = KINDS[kind][0]().as_torch(model.parameters())
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 20)
    train(model, optimizer, x, y, 5, scheduler)
    file = io.BytesIO()
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        },
        file,
    )
    file.seek(0)
    train(model, optimizer, x, y, 5, scheduler)

    saved = torch.load(file, weights_only=True)
    again, *_ = model_and_data()
    again.load_state_dict(saved["model"])
    resumed = KINDS[kind][0]().as_torch(again.parameters())
    resumed_scheduler = lr_scheduler.CosineAnnealingLR(resumed, 20)
    resumed_scheduler.load_state_dict(saved["scheduler"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, x, y, 5, resumed_scheduler)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_float32_memory_resumes_on_a_model_of_another_dtype_as_it_was() -> None:
    """Torch casts a state to the dtype of its parameter.

    Ours is per group and keeps what was saved, the int64 step too.
    """
    model = nn.Linear(2, 1)
    optimizer = Adam(0.1).as_torch(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    resumed = Adam(0.1).as_torch(model.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    leaves = [mo.tree.leaves(o.state_dict()["state"]) for o in (optimizer, resumed)]
    assert [(leaf.dtype, leaf.tolist()) for leaf in leaves[0]] == [
        (leaf.dtype, leaf.tolist()) for leaf in leaves[1]
    ]


def test_a_loaded_state_is_a_copy() -> None:
    model, x, y = model_and_data()
    optimizer = Adam(0.1).as_torch(model.parameters())
    train(model, optimizer, x, y, 2)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, x, y, 2)
    twin = Adam(0.1).as_torch(model.parameters())
    twin.load_state_dict(state)
    before = copy.deepcopy(state)
    train(model, twin, x, y, 2)
    assert_close(state, before, 0)


def test_the_closure_is_called_once_with_gradients_enabled() -> None:
    model, x, y = model_and_data()
    optimizer = Adam(0.1).as_torch(model.parameters())
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.requires_grad
    assert optimizer.step() is None


def test_a_parameter_without_gradient_keeps_its_value_and_memory() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = Adam(0.1, weight_decay=0.5).as_torch([a, b])
    a.grad, b.grad = torch.ones(2), torch.ones(3)
    optimizer.step()
    kept, memory = b.detach().clone(), copy.deepcopy(optimizer.state_dict())
    b.grad = None
    optimizer.step()
    assert torch.equal(b, kept)
    assert (a < 0.85).all()
    name = next(iter(memory["state"]))
    slots = [state["state"][name]["slots"]["mean"] for state in (memory, optimizer.state_dict())]
    assert torch.equal(slots[0]["1"], slots[1]["1"])
    assert not torch.equal(slots[0]["0"], slots[1]["0"])


def test_a_step_without_any_gradient_does_nothing() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = AdamW(0.1).as_torch([w])
    optimizer.step()
    assert torch.equal(w, torch.ones(2))
    assert optimizer.state_dict()["state"] == {}


def test_frozen_parameters_stay() -> None:
    model, x, y = model_and_data()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = AdamW(0.1).as_torch(model.parameters())
    losses = train(model, optimizer, x, y, 10)
    assert torch.equal(model[0].weight, before)
    assert losses[-1] < losses[0]


def test_named_parameters_are_accepted_and_named() -> None:
    model, x, y = model_and_data()
    optimizer = Adam(0.05).as_torch(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    train(model, optimizer, x, y, 2)
    twin = Adam(0.05).as_torch(model.named_parameters())
    twin.load_state_dict(optimizer.state_dict())


def test_what_is_deployed_is_a_frozen_copy() -> None:
    lr = nn.Parameter(torch.tensor(0.5))
    optimizer = SGD(lr=lr)
    w = nn.Parameter(torch.ones(1))
    deployed = optimizer.as_torch([w])
    assert deployed.param_groups[0]["lr"] == 0.5
    lr.data.fill_(100.0)
    w.grad = torch.ones(1)
    deployed.step()
    assert w.tolist() == [0.5]
    assert lr.grad is None
    assert lr.requires_grad


def test_a_step_size_per_weight_is_a_group_option() -> None:
    w = nn.Parameter(torch.ones(2))
    deployed = SGD(lr=nn.Parameter(torch.tensor([0.5, 0.25]))).as_torch([w])
    w.grad = torch.ones(2)
    deployed.step()
    assert w.tolist() == [0.5, 0.75]


def test_hooks_deepcopy_and_repr_of_torch_work() -> None:
    model, x, y = model_and_data()
    optimizer = Adam(0.05).as_torch(model.parameters())
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(model, optimizer, x, y, 1)
    assert seen == ["before", "after"]
    assert "lr: 0.05" in repr(optimizer)
    pair = copy.deepcopy((model, optimizer))
    losses = [train(*couple, x, y, 3) for couple in ((model, optimizer), pair)]
    assert losses[0] == losses[1]


def test_gradient_scaling_works() -> None:
    """`torch.amp.GradScaler` unscales `.grad` through `param_groups`."""
    w = nn.Parameter(torch.ones(2))
    optimizer = SGD(0.5).as_torch([w])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(w.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert w.tolist() == [0.5, 0.5]


def test_zero_grad_sets_to_none() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = SGD(0.5).as_torch([w])
    w.grad = torch.ones(2)
    optimizer.zero_grad()
    assert w.grad is None


def test_an_unknown_group_option_is_an_error() -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(
        ValueError,
        match=r"SGD has no option \['beta1'\] for a parameter group; it has \['dampening', 'lr'",
    ):
        SGD(0.1).as_torch([{"params": [w], "beta1": 0.5}])


def test_a_state_that_does_not_fit_is_an_error_and_changes_nothing() -> None:
    model, x, y = model_and_data()
    optimizer = Adam(0.05).as_torch(model.parameters())
    train(model, optimizer, x, y, 1)
    state = optimizer.state_dict()
    narrow = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    for other, message in [
        (
            SGD(0.07).as_torch(model.parameters()),
            r"saved from another optimizer: group 0 lacks \['dampening', 'momentum'\], which SGD "
            r"has",
        ),
        (
            Adam(0.07).as_torch([model[0].weight]),
            r"`state_dict\['state'\]\['group 0'\]` does not have the expected structure",
        ),
        (
            Adam(0.07).as_torch(narrow.parameters()),
            r"another model: the memory of group 0 has a tensor of shape \(4, 3\), expected \(4, "
            r"2\)",
        ),
        (
            Adam(0.07).as_torch([{"params": [p]} for p in model.parameters()]),
            "different number of parameter groups|structure",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert other.param_groups[0]["lr"] == 0.07
        assert other.state == {}


def test_pickling_keeps_what_is_needed_to_go_on() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = Adam(0.5).as_torch([w])
    w.grad = torch.ones(2)
    optimizer.step()
    twin = pickle.loads(pickle.dumps(optimizer))
    (v,) = twin.param_groups[0]["params"]
    v.grad = torch.ones(2)
    optimizer.step()
    twin.step()
    assert torch.equal(v, w)


def test_named_parameters_keep_their_names_for_groups() -> None:
    """`Grouped` sees what the user calls the parameters.

    The state is kept under these names.
    """
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = Grouped({"*.bias": SGD(0.0), "*": SGD(0.5, 0.9)}).as_torch(model.named_parameters())
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = torch.zeros_like(parameter) if name.endswith("bias") else -0.5 * parameter.grad
        torch.testing.assert_close(parameter, before[name] + moved, rtol=1e-6, atol=0)


def test_momentum_that_starts_later_needs_memory() -> None:
    weight = nn.Parameter(torch.zeros(2))
    for kind in (SGD, RMSprop):
        optimizer = kind(0.1).as_torch([weight])
        weight.grad = torch.ones(2)
        optimizer.step()
        optimizer.param_groups[0]["momentum"] = 0.9
        with pytest.raises(
            ValueError, match=f"{kind.__name__}: momentum=0.9, but `state` was made without"
        ):
            optimizer.step()


def test_computed_and_shaped_rates_deploy() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    SGD((nn.Parameter(torch.tensor(0.0)) - 1).exp()).as_torch([weight]).step()
    torch.testing.assert_close(weight.detach(), torch.full((2,), -(torch.tensor(-1.0).exp())))
    shaped = SGD(torch.tensor([1.0, 2.0])).as_torch([weight])
    assert shaped.param_groups[0]["lr"] == 1.0
    lr_scheduler.StepLR(shaped, 1, gamma=0.5)
    shaped.step()
    torch.testing.assert_close(
        weight.detach(), torch.tensor([-1.0, -2.0]) - torch.tensor(-1.0).exp()
    )
