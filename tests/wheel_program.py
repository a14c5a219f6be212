"""What a wheel must do where only what it requires is installed.

Run by `scripts/check_wheel.py`.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import metaopt as mo
import optimizers
from metaopt.optimizers import SGD, Adam, LSTMOptimizer

assert "site-packages" in mo.__file__
assert optimizers.SGD is SGD
assert importlib.metadata.version("torch-metaopt") == mo.__version__


def check_training(folder: Path) -> None:
    """A learned optimizer is trained, saved, loaded, compared and deployed."""
    training = mo.MetaTraining(
        LSTMOptimizer(4),
        mo.tasks.Quadratics(),
        estimator=mo.FullUnroll(),
        outer=Adam(1e-2),
        horizon=5,
    )
    mo.Trainer(training, max_steps=3, logger=mo.TensorBoardLogger(folder / "events")).fit()
    training.optimizer.save(folder / "weights.safetensors")
    loaded = mo.Optimizer.load(folder / "weights.safetensors")
    own, again = training.optimizer.state_dict(), loaded.state_dict()
    assert own.keys() == again.keys()
    assert all(torch.equal(own[name], again[name]) for name in own)
    report = mo.evaluate(
        {"learned": loaded, "SGD": SGD(0.1)}, mo.tasks.Quadratics(), horizon=5, seeds=2
    )
    assert "final loss" in report.table()
    model = torch.nn.Linear(2, 1)
    live = loaded.as_torch(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    live.step()
    check_missing(lambda: report.plot(folder / "plot.png"), "matplotlib")


def check_meta_gradient() -> None:
    """d/dw of (w - lr (w - 1) - 2)^2 / 2 at w = 0, lr = 0.5 is -1.5 * 0.5."""

    def task_loss(params: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        adapted = mo.minimize(
            lambda w, goal: (w - goal).square() / 2, SGD(0.5), params, task[0], steps=1
        ).params
        return (adapted - task[1]).square() / 2

    grads, _ = mo.meta_grad(task_loss)(torch.tensor(0.0), torch.tensor([[1.0, 2.0]]))
    assert grads.isclose(torch.tensor(-0.75))


def check_missing(use: Callable[[], object], package: str) -> None:
    """What needs the extra says so."""
    message = "nothing"
    try:
        use()
    except ModuleNotFoundError as error:
        message = str(error)
    assert f"needs {package}, which is not installed" in message, message
    assert 'pip install "torch-metaopt[scripts]"' in message, message


with tempfile.TemporaryDirectory() as folder:
    check_training(Path(folder))
check_meta_gradient()
check_missing(lambda: mo.tasks.DigitsMLP().sample(torch.Generator(), 1), "scikit-learn")
