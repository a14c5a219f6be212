"""Learn which training examples to believe: meta-weight-net.

    python examples/reweighting.py --noise 0.4 --seeds 5

The examples are digits, of which many have wrong labels. The learner minimises the mean of V(l_i)
l_i over a damaged training set, where l_i is the loss of example i. The weight net V is learned so
that the learner's next step lowers the loss on 100 clean examples. It is compared with plain
training on the damaged set (from the same initial networks on the same batches), with the same
training stopped when the loss on the clean examples is least, and with training on these alone. The
picture shows V: the weight of an example as a function of its loss. Shu et al. 2019,
arXiv:1902.07379; here weights are divided by their sum in the batch, so V chooses examples and does
not act as a learning rate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn

import metaopt as mo
from metaopt.tasks.corruption import flip_labels, stratified_split
from metaopt.tasks.digits import CLASSES, digits
from optimizers import SGD, Adam

# digits in a batch; clean and damaged ones of each class; the learner's rate
BATCH, CLEAN, TRAIN, LR = 100, 10, 100, 0.03


def learner_loss(levels: Any, batch: Any) -> Tensor:
    """Return the weighted mean of the losses."""
    losses = F.cross_entropy(levels.learner(batch[0]), batch[1], reduction="none")
    weights = levels.weights(losses.detach()[:, None]).squeeze(-1)
    return (weights * losses).sum() / weights.sum()


def meta_loss(levels: Any, batch: Any) -> Tensor:
    """Return the mean loss of clean examples."""
    return F.cross_entropy(levels.learner(batch[0]), batch[1])


def split(seed: int, noise: float) -> tuple[Any, Tensor, Any, Any]:
    """Return training data, which labels in it are wrong, clean examples and test examples.

    The training data are images and the labels that are given for them.
    """
    (images, truth), generator = digits(), torch.Generator().manual_seed(seed)
    clean, train, test = stratified_split(truth, (CLEAN, TRAIN), generator)
    given = flip_labels(truth[train], noise, CLASSES, generator)
    return (
        (images[train], given),
        given != truth[train],
        (images[clean], truth[clean]),
        (images[test], truth[test]),
    )


def batches(examples: Any, steps: int, seed: int) -> Any:
    """Return a number of random batches, stacked."""
    drawn = torch.randint(
        len(examples[0]), (steps, BATCH), generator=torch.Generator().manual_seed(seed)
    )
    return examples[0][drawn], examples[1][drawn]


@torch.no_grad()
def plain(net: mo.Functional, train: Any, stop: Any, test: Any) -> tuple[float, float]:
    """Train on these batches, and return two accuracies.

    One is that at the end, the other that where the loss on `stop` was least.
    """

    def loss(params: Any, batch: Any) -> Tensor:
        return F.cross_entropy(net(params, batch[0]), batch[1])

    params, memory, losses, found = net.params, None, [], []
    for part in zip(*(leaf.chunk(16) for leaf in train), strict=True):
        params, memory, *_ = mo.minimize(
            loss, SGD(LR, momentum=0.9), params, part, opt_state=memory
        )
        losses.append(loss(params, stop).item())
        found.append(accuracy(net(params, test[0]), test[1]))
    return found[-1], found[losses.index(min(losses))]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share that is right."""
    return (logits.argmax(-1) == labels).float().mean().item()


def draw(path: Path, seen: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Draw the weight of every training example over its loss.

    There are (losses, weights, whether the label is wrong) of each seed.
    """
    losses, weights, wrong = (torch.cat(parts) for parts in zip(*seen, strict=True))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, colour, chosen in (("right label", "C0", ~wrong), ("wrong label", "C3", wrong)):
        axis.scatter(
            losses[chosen], weights[chosen], s=6, alpha=0.4, linewidths=0, color=colour, label=name
        )
    axis.set(
        xscale="log",
        xlim=(1e-4, None),
        xlabel="loss of the example (nats)",
        ylabel="learned weight / mean weight",
    )
    axis.legend(title=f"{len(seen)} seeds", markerscale=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(
    noise: float = 0.4, seeds: int = 5, steps: int = 800, out: Path = Path("runs/reweighting.png")
) -> dict[str, Tensor]:
    """Return the test accuracy of each method for each seed, and draw the weights."""
    rows, seen = [], []
    for seed in range(seeds):
        (images, labels), wrong, clean, test = split(seed, noise)
        torch.manual_seed(seed)
        learner = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, CLASSES))
        weights = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
        net, train = mo.functional(learner), batches((images, labels), steps, seed)
        last, stopped = plain(net, train, clean, test)
        alone, _ = plain(net, batches(clean, steps, seed), clean, test)
        lower = mo.Level(
            "learner",
            learner,
            learner_loss,
            SGD(LR, momentum=0.9),
            data=list(zip(*train, strict=True)),
        )
        upper = mo.Level("weights", weights, meta_loss, Adam(3e-4), data=[clean])
        mo.Trainer(
            mo.LevelGraph([mo.Edge(upper, lower, look_ahead=True)]),
            max_steps=steps,
            label="meta-weight-net",
        ).fit()
        with torch.no_grad():
            losses = F.cross_entropy(learner(images), labels, reduction="none")
            weight = weights(losses[:, None]).squeeze(-1)
            rows.append((accuracy(learner(test[0]), test[1]), last, stopped, alone))
        seen.append((losses, weight / weight.mean(), wrong))
        assert weight[wrong].mean() < 0.5 * weight[~wrong].mean(), (
            "wrong labels weigh less than half"
        )
    draw(out, seen)
    found = dict(
        zip(
            ("meta-weight-net", "plain", "plain, stopped early", "clean only"),
            torch.tensor(rows).T,
            strict=True,
        )
    )
    ours = found["meta-weight-net"]
    table = [
        (name, 100 * a.mean(), 100 * (ours - a).mean(), 100 * (ours - a).std(correction=0))
        for name, a in found.items()
    ]
    print(
        tabulate(
            table,
            [f"mean of {seeds} seeds", "test accuracy (%)", "meta-weight-net - it", "deviation"],
            floatfmt=".1f",
        )
    )
    assert ours.mean() > found["plain"].mean(), "reweighting is better than plain training"
    return found


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
