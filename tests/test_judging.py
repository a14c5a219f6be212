"""Judging over families, torch optimizers as baselines, trained weights and their cards."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt as mo
import optimizers
from metaopt.meta_training.judging import Outcome, Runs
from metaopt.optimizer import Optimizer
from optimizers import SGD, Adam, ControlledMLP, trained

WINE = mo.tasks.Supervised(mo.tasks.MLP((4,)), mo.tasks.Classes("wine"), 8)


@pytest.mark.usefixtures("float64")
def test_any_torch_optimizer_is_a_baseline() -> None:
    """Its curves are those of ours that equals it; and those of a class that couples parameters."""
    report = mo.evaluate(
        {
            "ours": Adam(0.03),
            "torch": lambda params: torch.optim.Adam(params, 0.03),
            "sgd": SGD(0.1, momentum=0.9),
            "torch sgd": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
        },
        mo.tasks.Quadratics(4),
        horizon=12,
        seeds=3,
    )
    for ours, other in (("ours", "torch"), ("sgd", "torch sgd")):
        torch.testing.assert_close(
            report.curves[ours].double(), report.curves[other].double(), rtol=1e-5, atol=1e-6
        )
    rate, _ = mo.tune(
        lambda lr: lambda params: torch.optim.SGD(params, lr),
        (1e-4, 1e-2, 10.0),
        mo.tasks.Quadratics(4),
        horizon=12,
        seeds=3,
    )
    assert rate == 1e-2
    with pytest.raises(TypeError, match=r"function from a list of parameters .* returns int"):
        mo.evaluate({"": lambda params: 3}, mo.tasks.Quadratics(2), horizon=2, seeds=2)


def constant(losses: list[list[float]]) -> Outcome:
    runs = Runs(1.0, torch.tensor(losses), None)
    return Outcome(runs, runs, runs)


def test_scores_and_interquartile_means() -> None:
    """Two families, four seeds; ratios .5 and 2 in one of them, all .5 in the other."""
    rows = torch.rand(4, 20, generator=torch.Generator().manual_seed(0)) + 1
    better, mixed = (0.5 * rows).tolist(), (torch.tensor([0.5, 0.5, 2.0, 2.0])[:, None] * rows)
    judgement = mo.Judgement(
        {
            "first": {"Adam": constant(rows.tolist()), "new": constant(better)},
            "second": {"Adam": constant(rows.tolist()), "new": constant(mixed.tolist())},
        },
        "Adam",
    )
    assert judgement.score("new", "Adam") == (1, 1, 0)
    assert judgement.score("Adam", "new", "final") == (0, 1, 1)
    assert judgement.score("new", "Adam", untuned=True) == (1, 1, 0)
    # six of eight ratios are .5: the middle four are all .5
    at, low, high = judgement.interquartile("new")
    assert math.isclose(at, 0.5, rel_tol=1e-6)
    assert low <= at <= high <= 2
    assert judgement.interquartile("Adam")[0] == 1
    assert judgement.as_dict()["first"]["new"]["mean"]["mean"] < 1
    assert "second" in judgement.table("final")
    assert "new, untuned" in judgement.table()


def test_speed_and_divergence() -> None:
    falling = [[10.0 - 0.1 * t for t in range(100)]] * 2
    faster = [[10.0 - 0.2 * t for t in range(50)] + [0.0] * 50] * 2
    worse = [[1.0 + t for t in range(100)]] * 2
    outcomes = {"Adam": constant(falling), "fast": constant(faster), "bad": constant(worse)}
    judgement = mo.Judgement({"one": outcomes}, "Adam")
    # the reference's last tenth has the mean 10 - 9.45; in means over five steps 10 - .2 (t + 2)
    assert judgement.speed("fast") == {"one": (math.ceil((9.45 / 0.2) - 2) + 5) / 100}
    assert judgement.speed("bad")["one"] > judgement.speed("fast")["one"] - 1
    assert "100.0%" in judgement.summary().splitlines()[-1]


def test_publishing_adds_to_what_is_known(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    judging = importlib.import_module("judging")
    places = {
        "docs/pages/get-started.md": ["carrying over"],
        "docs/pages/results/learned-optimizers.md": ["carrying over", "specialists"],
    }
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "docs" / "pages" / "results").mkdir(parents=True)
    for name, markers in places.items():
        (tmp_path / name).write_text("".join(f"<!-- {m} -->\n<!-- /{m} -->\n" for m in markers))
    low, high = constant([[1.0, 1.0]] * 2), constant([[2.0, 2.0]] * 2)
    adam = dict.fromkeys(("Adam", "Adam, cosine"), high._replace(own=None))
    first = {family: {**adam, "small": low} for family in ("wine", "conv")}
    judging.publish(mo.Judgement(first, "Adam"), tmp_path)
    second = {family: {**adam, "lstm": constant([[3.0, 3.0]] * 2)} for family in ("wine", "conv")}
    judging.publish(mo.Judgement(second, "Adam"), tmp_path)

    page = (tmp_path / "docs/pages/results/learned-optimizers.md").read_text()
    general, special = page.split("<!-- specialists -->")
    assert "| wine | 2.0000 | 2.0000 | 1.0000 |" in general
    assert "lstm" not in general
    assert "| wine | 2.0000 | 2.0000 | 3.0000 | 3.0000 |" in special
    assert "| mean, against Adam | 0-0-2 | 0-0-2 |" in special
    figures = json.loads((tmp_path / judging.FIGURES).read_text())
    assert figures["summary"]["Adam"]["against each, mean"] == {
        "Adam": [0, 2, 0],
        "Adam, cosine": [0, 2, 0],
        "small": [0, 0, 2],
        "lstm": [2, 0, 0],
    }
    with pytest.raises(ValueError, match=r"over all families, got none of \['wine'\]"):
        judging.publish(mo.Judgement({"conv": second["conv"]}, "Adam"), tmp_path)

    contenders = {name: mo.Contender(lambda lr, _: Adam(lr), (1.0, 2.0)) for name in ("Adam", "x")}
    recorded = {"Adam": {"mean": {"rate": 0.1}, "final": {"rate": 0.1}}}
    known = judging.at_recorded_rates(contenders, recorded)
    assert [known[name].rates for name in contenders] == [(0.1,), (1.0, 2.0)]


def test_a_family_is_judged_with_rates_that_are_tuned_on_other_tasks(tmp_path) -> None:
    contenders = {
        "Adam": mo.Contender(lambda lr, steps: Adam(lr), (1e-4, 0.03, 1e4)),
        "SGD of torch": mo.Contender(
            lambda lr, steps: lambda params: torch.optim.SGD(params, lr), (1e-4, 0.3)
        ),
        "learned": mo.Contender(lambda lr, steps: ControlledMLP(lr), (0.3, 1.0), own=1.0),
    }
    family = mo.tasks.Supervised(mo.tasks.MLP((8,)), mo.tasks.Classes(), 16)
    outcomes = mo.judge_family(contenders, family, 20, tuning_seeds=2, seeds=3)
    assert outcomes["Adam"].mean.rate == outcomes["Adam"].final.rate == 0.03
    assert outcomes["SGD of torch"].own is None
    assert outcomes["learned"].own.rate == 1.0
    expected = mo.evaluate({"": Adam(0.03)}, family, horizon=20, seeds=3).curves[""]
    torch.testing.assert_close(outcomes["Adam"].mean.losses, expected)
    assert outcomes["Adam"].mean.accuracy.shape == (3,)
    assert outcomes["Adam"].mean.accuracy.mean() > 0.3
    mo.Judgement({"digits": outcomes}, "Adam").plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="`rates` must hold at least one"):
        mo.Contender(lambda lr, steps: Adam(lr), ())


@pytest.mark.parametrize("name", optimizers.trained_names())
def test_shipped_weights_are_those_of_their_cards(name: str) -> None:
    card = optimizers.read_card(name)
    assert all(len(text) > 10 for text in vars(card).values())
    assert isinstance(optimizers.load_trained(name), Optimizer)


def test_an_unknown_name_and_a_card_of_other_weights(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"no trained optimizer 'smal'; there are .*small"):
        optimizers.load_trained("smal")
    with pytest.raises(ValueError, match=r"'lstm' takes no number of steps, got steps=9"):
        optimizers.load_trained("lstm", steps=9)
    monkeypatch.setattr(trained, "FOLDER", tmp_path)
    ControlledMLP().save(tmp_path / "mine.safetensors")
    card = trained.Card("a", "b", "c", "d", 'of "two"\nlines', "f", "0" * 64)
    card.write(tmp_path / "mine.toml")
    assert trained.Card.read(tmp_path / "mine.toml") == card
    with pytest.raises(ValueError, match=r"mine.safetensors has the SHA-256 .* card says 0000"):
        optimizers.load_trained("mine")
    (tmp_path / "mine.toml").write_text('summary = "a"\n')
    with pytest.raises(ValueError, match=r"must have .*'sha256'.*got \['summary'\]"):
        optimizers.load_trained("mine")


def loop(model: nn.Module, make: Any, steps: int, **options: Any) -> list[float]:
    """Train on scikit-learn's digits, in the plain way."""
    x, y = mo.tasks.examples.digits_part(True)
    opt = make(model)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        rows = torch.randint(len(y), (64,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.get("autocast", False)):
            loss = F.cross_entropy(model(x[rows]), y[rows])
        opt.zero_grad()
        loss.backward()
        opt.step(loss=loss)
        losses.append(loss.item())
    return losses


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def deployed(model: nn.Module) -> torch.optim.Optimizer:
    return optimizers.load_trained("small", steps=100).as_torch(model.parameters())


def test_a_shipped_optimizer_trains_digits_in_a_plain_loop() -> None:
    losses = loop(network(), deployed, 100)
    adam = loop(network(), lambda model: Adam(0.01).as_torch(model.parameters()), 100)
    assert sum(losses) < 0.8 * sum(adam)
    assert sum(losses[-10:]) / 10 < 0.15


def test_with_autocast_a_scheduler_groups_and_frozen_parameters() -> None:
    assert sum(loop(network(), deployed, 100, autocast=True)[-10:]) / 10 < 0.2
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    groups = [
        {"params": model[0].parameters(), "lr": 0.5},
        {"params": [*model[2].parameters(), *model[4].parameters()]},
    ]
    opt = optimizers.load_trained("small", steps=50).as_torch(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 - t / 50)
    losses = loop(model, lambda _: opt, 1)
    schedule.step()
    assert [group["lr"] for group in opt.param_groups] == [0.5 * 0.98, 0.98]
    losses += loop(model, lambda _: opt, 49)
    assert torch.equal(model[0].weight, before)
    assert sum(losses[-10:]) / 10 < 0.5 * losses[0]


def test_a_state_dict_goes_on_where_it_was() -> None:
    """And a closure does what `loss=` does."""
    model, twin = network(), network()
    opt, other = deployed(model), deployed(twin)

    def closure_of(model: nn.Module, opt: torch.optim.Optimizer) -> Any:
        def closure() -> Tensor:
            opt.zero_grad()
            loss = model(torch.ones(3, 64)).square().mean()
            loss.backward()
            return loss

        return closure

    for _ in range(3):
        opt.step(closure_of(model, opt))
        loss = closure_of(twin, other)()
        assert other.step(loss=loss) is loss
    resumed = deployed(twin)
    resumed.load_state_dict(other.state_dict())
    opt.step(closure_of(model, opt))
    resumed.step(loss=closure_of(twin, resumed)())
    for one, another in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, another)
    with pytest.raises(ValueError, match="takes a closure or the loss, got both"):
        opt.step(closure_of(model, opt), loss=1.0)
    with pytest.raises(ValueError, match=r"looks at the loss, got None.*step\(loss=loss\)"):
        opt.step()


def test_what_cannot_be_judged_is_said() -> None:
    class Below(mo.tasks.Quadratics):
        def loss(self, params: Tensor, batch: Any) -> Tensor:
            return super().loss(params, batch) - 100

    adam = {"Adam": mo.Contender(lambda lr, steps: Adam(lr), (0.1,))}
    with pytest.raises(ValueError, match=r"must not be negative, got -.* of Below"):
        mo.judge_family(adam, Below(2), 3, tuning_seeds=1, seeds=2)
    with pytest.raises(ValueError, match=r"`seeds` must be .* 2, got 1"):
        mo.judge_family(adam, WINE, 3, seeds=1)
    wild = {"SGD": mo.Contender(lambda lr, steps: SGD(lr), (1e9,))}
    with pytest.warns(UserWarning, match="SGD diverged at each of its rates on Quadratics"):
        outcomes = mo.judge_family(wild, mo.tasks.Quadratics(9), 9, tuning_seeds=2, seeds=2)
    with pytest.raises(ValueError, match=r"got 'Adam'; there are \['SGD'\]"):
        mo.Judgement({"one": outcomes}, "Adam")
    with pytest.raises(ValueError, match=r"'SGD' has no rate of its own.*own=1.0"):
        mo.Judgement({"one": outcomes}, "SGD").score("SGD", "SGD", untuned=True)
    with pytest.raises(TypeError, match=r"LBFGS cannot be compared: its `step` wants"):
        mo.evaluate({"": torch.optim.LBFGS}, mo.tasks.Quadratics(2), horizon=2, seeds=2)


def test_a_transform_with_one_entry_that_is_no_number_says_so() -> None:
    """`TrustRatio`: its ratio fell to 1 for the others."""
    optimizer = optimizers.TrustRatio(0.1, SGD(1.0))
    params = {"w": torch.tensor([100.0, 100.0])}
    updates, _ = optimizer({"w": torch.tensor([1.0, math.nan])}, optimizer.init(params), params)
    assert updates["w"].isnan().all()
