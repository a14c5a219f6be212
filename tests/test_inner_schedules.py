"""Schedules of the inner rate in `scripts/maml.py` and `scripts/reptile.py`."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import metaopt as mo
from metaopt import tree
from metaopt.tasks.sinusoid import Sinusoids, sinusoid_mlp
from optimizers import SGD


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))


@pytest.mark.parametrize("per_tensor", [False, True])
def test_reptile_moves_to_the_adapted_weights_and_its_schedule_down_the_query_loss(
    float64: None, per_tensor: bool
) -> None:
    """Against a loop of autograd, of two tasks."""
    reptile = importlib.import_module("reptile")
    model = sinusoid_mlp(hidden_size=4)
    net = mo.functional(model)
    config = reptile.ReptileConfig(
        schedule="per-step", inner_steps=3, inner_lr=0.05, per_tensor=per_tensor
    )
    inner = reptile.inner_of(config, net.params)
    inner.double()
    tasks = Sinusoids().sample(torch.Generator().manual_seed(0), 2, shots=5, queries=4)

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        return F.mse_loss(net(params, batch[0]), batch[1])

    gradient = mo.meta_grad(reptile.reptile_loss(loss, config, inner), learn=inner)
    (grads, of_inner), losses = gradient(net.params, tasks)

    rates = dict(inner.named_parameters())
    ends, queries = [], []
    for i in range(2):
        task = tree.index(tasks, i)
        w = {name: leaf.detach().requires_grad_() for name, leaf in net.params.items()}
        for t in range(3):
            g = torch.autograd.grad(loss(w, task.support), list(w.values()), create_graph=True)
            each = list(rates.values()) if per_tensor else [rates["lr.values"]] * len(w)
            w = {name: p - r[t] * d for (name, p), d, r in zip(w.items(), g, each, strict=True)}
        ends.append(w)
        queries.append(loss(w, task.query))
    torch.testing.assert_close(losses, torch.stack(queries).detach(), rtol=1e-12, atol=0)
    for name, one in grads.items():
        expected = net.params[name] - (ends[0][name] + ends[1][name]) / 2
        torch.testing.assert_close(one, expected.detach(), rtol=1e-10, atol=1e-14)
    slopes = torch.autograd.grad(torch.stack(queries).mean(), list(rates.values()))
    for name, slope in zip(rates, slopes, strict=True):
        torch.testing.assert_close(of_inner[name], slope, rtol=1e-10, atol=1e-14)
        assert slope.abs().min() > 0


@pytest.mark.parametrize("script", ["maml", "reptile"])
def test_the_schedule_is_trained_saved_and_used(script: str, tmp_path: Path) -> None:
    module = importlib.import_module(script)
    kind = module.SinusoidConfig if script == "maml" else module.ReptileConfig
    config = kind(
        schedule="gp",
        per_tensor=script == "maml",
        inner_steps=2,
        max_steps=4,
        pretrain_steps=2,
        test_tasks=20,
        test_steps=(0, 2),
        meta_batch=3,
        out=tmp_path,
    )
    run = module.run_sinusoid if script == "maml" else module.run
    scores = run(config)["MAML" if script == "maml" else "Reptile"]
    assert scores.shape == (20, 2)
    inner = SGD.load(tmp_path / "inner.safetensors")
    values = [one for name, one in inner.named_parameters() if name.endswith("values")]
    assert len(values) == (6 if script == "maml" else 1)
    assert all(one.abs().max() > 1e-3 for one in values)


def test_the_comparison_writes_paired_differences(tmp_path: Path) -> None:
    """Seeds that tune are not those that are reported; a reported one trains as it does alone."""
    module = importlib.import_module("compare_inner_rates")
    config = module.Config(
        "reptile",
        kinds=("mlp",),
        per_tensor=("per-step",),
        rates=(0.01, 0.02),
        schedule_lrs=(0.01,),
        inner_steps=2,
        max_steps=4,
        tuning_seeds=1,
        seeds=2,
        test_tasks=10,
        compile=False,
        out=tmp_path,
        json=tmp_path / "found.json",
    )
    module.main(config)
    (entry,) = json.loads((tmp_path / "found.json").read_text()).values()
    tuned = {name: one for name, one in entry["tuning"].items() if name.startswith("constant")}
    assert len(tuned) == 2
    best = min(tuned, key=lambda name: tuned[name][0])
    (name, constant), *learned = entry["rows"].items()
    assert name == best
    assert constant["difference"] == 0
    assert [row.split(",")[:2] for row, _ in learned] == [
        ["mlp", " one for all tensors"],
        ["per-step", " one for each tensor"],
    ]
    for _, row in learned:
        assert row["difference"] == pytest.approx(row["error"] - constant["error"], abs=1e-5)
    rate = module.Rate("per-step", True, float(best.split(", ")[1]), 0.01)
    alone = module.train_and_test(config, rate, [1]).test.mean()
    assert learned[1][1]["seeds"][1] == pytest.approx(float(alone), abs=1e-4)


def test_the_interval_of_known_differences() -> None:
    module = importlib.import_module("compare_inner_rates")
    reference = torch.tensor([[1.0, 3.0], [2.0, 4.0], [0.0, 0.0]])
    found = module.describe(reference + torch.tensor([[-1.0], [-2.0], [-3.0]]), reference)
    # of -1, -2, -3: standard deviation 1; the 97.5 % point of t with two degrees is 4.3027
    assert found["difference"] == pytest.approx(-2.0)
    assert found["± difference"] == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert found["seeds"] == [1.0, 1.0, -3.0]


def test_a_training_that_diverges_has_the_error_inf(tmp_path: Path) -> None:
    module = importlib.import_module("compare_inner_rates")
    options = {"max_steps": 2, "test_tasks": 3, "compile": False, "out": tmp_path}
    config = module.Config("maml", **options)
    errors = module.train_and_test(config, module.Rate("none", False, 1e30), [0])
    assert errors.validation.isinf().all()
    with pytest.raises(ValueError, match=r"`seeds` must be at least 2.* got 1 and 2"):
        module.Config("maml", seeds=1)
