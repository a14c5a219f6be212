"""The learning rate of the learning rate, itself learned: three composed unrolls.

    python examples/learning_rate_of_learning_rate.py   # 40 meta-meta-steps, as in the results
    python examples/learning_rate_of_learning_rate.py --steps 3      # a look

- "learner", a network on the handwritten digits, makes SGD steps with a learning rate alpha;
- "rate" is the module that holds alpha: the learner's optimizer. It makes SGD steps, with a
  learning rate eta, to lower the loss after 5 steps of the learner;
- "rate of rate" is the module that holds eta: the optimizer of "rate". It lowers the loss after 3
  steps of "rate".

A level's optimizer may be the model of a level above: the graph sees that both are the same module.
Maclaurin, Duvenaud, Adams 2015 (arXiv:1502.03492) differentiate training by its hyperparameters;
Chandra et al. 2022 (arXiv:1909.13371) stack optimizers in this way, and find that the start matters
less with each one. Here both rates start badly on purpose: alpha = 0.003, eta = 1e-4. The
hypergradient of the top level is first checked by finite differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import metaopt as mo
from metaopt.tasks.digits import digits
from optimizers import SGD, Adam

ALPHA, ETA = 0.003, 1e-4  # both too small
INNER, MIDDLE = 5, 3  # steps of the learner for one of its rate, of the rate for one of its own


def minibatches(
    first: int, last: int, seed: int, size: int = 100
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random digits from those with numbers `first` to `last`."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(first, last, (size,), generator=generator)
        yield images[chosen].to(torch.get_default_dtype()), labels[chosen]


def loss(levels: Any, batch: Any) -> Tensor:
    """Return the learner's cross-entropy.

    Every level minimises it, each on minibatches of its own.
    """
    x, y = batch
    return F.cross_entropy(levels.learner(x), y)


def level_graph(
    eta: float, *, learns_alpha: bool = True, learns_eta: bool = True
) -> tuple[mo.LevelGraph, SGD, SGD]:
    """Return the graph, and the optimizers that hold alpha and eta.

    A rate that is not learned has an optimizer that stands.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    alpha_holder = SGD(nn.Parameter(torch.tensor(ALPHA)))
    eta_holder = SGD(nn.Parameter(torch.tensor(eta)))
    learner = mo.Level("learner", network, loss, alpha_holder, minibatches(0, 1000, seed=0))
    rate = mo.Level(
        "rate",
        alpha_holder,
        loss,
        eta_holder,
        minibatches(1000, 1400, seed=1),
        warmup=0 if learns_alpha else 10**9,
    )
    top_optimizer = Adam(0.003) if learns_eta else SGD(0.0)
    rate_of_rate = mo.Level(
        "rate_of_rate", eta_holder, loss, top_optimizer, minibatches(1000, 1400, seed=2)
    )
    edges = [mo.Edge(rate_of_rate, rate, steps=MIDDLE), mo.Edge(rate, learner, steps=INNER)]
    return mo.LevelGraph(edges), alpha_holder, eta_holder


def check_hypergradient() -> None:
    """Compare a derivative with central differences, in float64.

    It is d(top loss) / d(eta) through 15 steps of the learner and 3 of its rate.
    """
    torch.set_default_dtype(torch.float64)
    exact = level_graph(ETA)[0].hypergradient("rate_of_rate")["lr"]
    h = 1e-5
    high, low = (level_graph(ETA + sign * h)[0].step()["rate_of_rate/loss"] for sign in (1, -1))
    differences = (high - low) / (2 * h)
    torch.set_default_dtype(torch.float32)
    error = float(abs(exact / differences - 1))
    print(
        f"Hypergradient of the learning rate's learning rate: {exact:.6g}; finite differences "
        f"{differences:.6g}"
    )
    assert error < 1e-6, f"relative error {error}"


def main(steps: int = 40) -> None:
    """Train a network whose learning rate learns, by a rate that learns.

    Args:
        steps: of the top level; the learner makes 15 each.
    """
    check_hypergradient()
    images, labels = (part[1400:] for part in digits())
    settings = {
        "fixed rate": {"learns_alpha": False, "learns_eta": False},
        "learned rate": {"learns_eta": False},
        "learned rate of learned rate": {},
    }
    losses = {}
    for name, options in settings.items():
        graph, alpha, eta = level_graph(ETA, **options)
        if len(losses) == len(settings) - 1:
            print(graph)
        mo.Trainer(graph, max_steps=steps, label=name).fit()
        with torch.no_grad():
            logits = graph.plan.levels["learner"].model(images)
        losses[name] = float(F.cross_entropy(logits, labels))
        accuracy = float((logits.argmax(1) == labels).float().mean())
        print(
            f"{name:>29}: test loss {losses[name]:.3f}, accuracy {accuracy:.3f}; "
            f"alpha {ALPHA} -> {alpha.lr.detach():.3g}, eta {ETA} -> {eta.lr.detach():.3g}"
        )
    fixed, learned, twice = losses.values()
    assert twice < learned < fixed, "each level that learns must help"
    assert steps < 40 or twice < 0.4, "with both learned, a bad start is made up for"


if __name__ == "__main__":
    tyro.cli(main)
