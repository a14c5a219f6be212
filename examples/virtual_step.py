"""Meta-weight-net as its authors programmed it.

    python examples/virtual_step.py                        # as in Results
    python examples/virtual_step.py --seeds 1 --steps 50   # a look

The hypergradient goes through a virtual step of plain SGD. Then comes the real step. Each iteration
(Shu et al. 2019, arXiv:1902.07379, algorithm 1, and the published program): a copy of the
classifier makes one step of plain SGD on the weighted loss; the weight net descends the copy's loss
on clean examples; the classifier itself then steps by SGD with momentum and weight decay, with the
new weights. So two optimizers move the same parameters. 40 % of the labels are wrong. Because this
training is short, the weight net learns ten times as fast as in that program.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import metaopt as mo
from metaopt.tasks.corruption import flip_labels, stratified_split
from metaopt.tasks.digits import CLASSES, digits
from optimizers import SGD, Adam

# digits in a batch; clean and damaged ones of each class; rate of both steps
BATCH, CLEAN, TRAIN, LR = 100, 10, 100, 0.1


class Learner:
    """A classifier and a weight net, and the iteration that moves both."""

    def __init__(self, classifier: nn.Module, weight_net: nn.Module):
        self.net, self.weigh = mo.functional(classifier), mo.functional(weight_net)
        self.virtual, self.real = SGD(LR), SGD(LR, momentum=0.9, weight_decay=5e-4)
        self.memory = self.real.init(self.net.params)
        self.outer = Adam(1e-2, weight_decay=1e-4).as_torch(weight_net.parameters())

    def train_loss(self, params: Any, batch: Any, weights: Any) -> Tensor:
        """Return the weighted loss."""
        losses = F.cross_entropy(self.net(params, batch[0]), batch[1], reduction="none")
        return (self.weigh(weights, losses.detach()[:, None])[:, 0] * losses).mean()

    def clean_loss(self, params: Any, batch: Any) -> Tensor:
        """Return the mean loss."""
        return F.cross_entropy(self.net(params, batch[0]), batch[1])

    def step(self, batch: Any, clean: Any) -> None:
        """Move the weight net, then the classifier."""
        ahead = mo.minimize(
            self.train_loss, self.virtual, self.net.params, batch, steps=1, meta=self.weigh.params
        ).params
        slopes = torch.autograd.grad(
            self.clean_loss(ahead, clean), list(self.weigh.params.values())
        )
        mo.assign_grads(self.weigh.model, dict(zip(self.weigh.params, slopes, strict=True)))
        self.outer.step()
        options = {"meta": self.weigh.params, "opt_state": self.memory}
        with torch.no_grad():
            params, self.memory, *_ = mo.minimize(
                self.train_loss, self.real, self.net.params, batch, steps=1, **options
            )
        self.net.load(params)


def run(seed: int, steps: int, weighted: bool) -> float:
    """Return the test accuracy in %, with a weight net or with equal weights."""
    (images, truth), generator = digits(), torch.Generator().manual_seed(seed)
    clean, train, test = stratified_split(truth, (CLEAN, TRAIN), generator)
    given = flip_labels(truth[train], 0.4, CLASSES, generator)
    torch.manual_seed(seed)
    classifier = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, CLASSES))
    weight_net = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
    learner = Learner(classifier, weight_net)
    plain = torch.optim.SGD(classifier.parameters(), LR, momentum=0.9, weight_decay=5e-4)
    for _ in range(steps):
        chosen = torch.randint(len(train), (BATCH,), generator=generator)
        batch = images[train][chosen], given[chosen]
        if weighted:
            learner.step(batch, (images[clean], truth[clean]))
        else:
            plain.zero_grad()
            learner.clean_loss(learner.net.params, batch).backward()
            plain.step()
    with torch.no_grad():
        return 100 * (classifier(images[test]).argmax(-1) == truth[test]).float().mean().item()


def main(seeds: int = 3, steps: int = 800) -> dict[str, list[float]]:
    """Train on damaged labels with each method and seed, and return the test accuracies in %."""
    found = {
        name: [run(seed, steps, weighted) for seed in range(seeds)]
        for name, weighted in (("equal weights", False), ("weight net", True))
    }
    for name, accuracies in found.items():
        print(
            f"{name:>13}: mean test accuracy {sum(accuracies) / seeds:.1f} %, of each seed",
            *(f"{a:.1f}" for a in accuracies),
        )
    assert steps < 800 or sum(found["weight net"]) > sum(found["equal weights"]), "the weights help"
    return found


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
