"""Learn which examples of a pretraining set to ignore, with three levels.

    python examples/learning_by_ignoring.py --noise 0.5 --seeds 5

The examples are digits, of which many have wrong labels. "pretrain" minimises mean_i a_i l_i over
1000 examples with wrong labels among them. "finetune" minimises the loss on 30 right ones, staying
near the pretrained parameters. "ignore" moves the a_i to lower the loss of the finetuned model on
100 others: its hypergradient passes through finetuning and pretraining, `Implicit` through either.
Then the two stages are run afresh: with the learned a, with all a_i = 1, with these 100 examples in
the finetuning set too, and with a_i = 1 for the right labels and 0 for the wrong ones. Zhang,
Mukherjee, Xie et al. 2020, arXiv:2012.14288.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import tyro
from tabulate import tabulate
from torch import Tensor, nn

import metaopt as mo
from metaopt.tasks.corruption import flip_labels, stratified_split
from metaopt.tasks.digits import CLASSES, PIXELS, digits
from optimizers import SGD, Adam

# examples of each class; pull to the pretrained parameters; weight decay
TRAIN, FINE, VALID, NEAR, DECAY = 100, 3, 10, 0.1, 0.01


class Weights(nn.Module):
    """One weight in (0, 1) for each example."""

    def __init__(self, examples: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(examples))

    def forward(self) -> Tensor:
        """Return the weights."""
        return self.logits.sigmoid()


def pretrain_loss(logits: Tensor, labels: Tensor, weights: Tensor, params: Any) -> Tensor:
    """Return the weighted mean of the losses plus DECAY / 2 |params|^2."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (weights * losses).sum() / weights.sum() + 0.5 * DECAY * sum(
        p.square().sum() for p in params.values()
    )


def finetune_loss(logits: Tensor, labels: Tensor, params: Any, pretrained: Any) -> Tensor:
    """Return the mean loss plus NEAR / 2 |params - pretrained|^2."""
    return F.cross_entropy(logits, labels) + 0.5 * NEAR * sum(
        (params[k] - pretrained[k]).square().sum() for k in params
    )


def learned_weights(pretraining: Any, finetuning: Any, valid: Any, steps: int) -> Tensor:
    """Return the weight of each pretraining example."""

    def pretrain(levels: Any, batch: Any) -> Tensor:
        return pretrain_loss(
            levels.pretrain(batch[0]), batch[1], levels.ignore(), levels.pretrain.params
        )

    def finetune(levels: Any, batch: Any) -> Tensor:
        return finetune_loss(
            levels.finetune(batch[0]), batch[1], levels.finetune.params, levels.pretrain.params
        )

    def ignore(levels: Any, batch: Any) -> Tensor:
        return F.cross_entropy(levels.finetune(batch[0]), batch[1])

    top = mo.Level("ignore", Weights(len(pretraining[1])), ignore, Adam(0.1), data=[valid])
    middle = mo.Level(
        "pretrain", nn.Linear(PIXELS, CLASSES), pretrain, SGD(0.5, momentum=0.9), data=[pretraining]
    )
    bottom = mo.Level(
        "finetune", nn.Linear(PIXELS, CLASSES), finetune, SGD(0.5, momentum=0.9), data=[finetuning]
    )
    implicit = mo.Implicit(mo.ConjugateGradient(max_steps=10))
    graph = mo.LevelGraph(
        [
            mo.Edge(top, middle, steps=5, differentiate=implicit),
            mo.Edge(middle, bottom, differentiate=implicit),
        ]
    )
    mo.Trainer(graph, max_steps=steps, label="ignore").fit()
    return top.model().detach()


@torch.no_grad()
def accuracy(weights: Tensor, pretraining: Any, finetuning: Any, test: Any) -> float:
    """Pretrain a model with these weights, finetune it, and return its accuracy on `test`."""
    net, optimizer = mo.functional(nn.Linear(PIXELS, CLASSES)), SGD(0.5, momentum=0.9)
    start = {name: torch.zeros_like(param) for name, param in net.params.items()}

    def pretrain(params: Any, batch: Any) -> Tensor:
        return pretrain_loss(net(params, batch[0]), batch[1], weights, params)

    def finetune(params: Any, batch: Any) -> Tensor:
        return finetune_loss(net(params, batch[0]), batch[1], params, pretrained)

    pretrained = mo.minimize(pretrain, optimizer, start, pretraining, steps=300).params
    params = mo.minimize(finetune, optimizer, pretrained, finetuning, steps=300).params
    return (net(params, test[0]).argmax(-1) == test[1]).float().mean().item()


def main(noise: float = 0.5, seeds: int = 5, steps: int = 30) -> dict[str, Tensor]:
    """Return the test accuracy of each choice of weights for each seed."""
    rows, (images, truth) = [], digits()
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        *parts, test = stratified_split(truth, (TRAIN, FINE, VALID), generator)
        train, fine, valid = ((images[part], truth[part]) for part in parts)
        given = flip_labels(train[1], noise, CLASSES, generator)
        pretraining, right = (train[0], given), given == train[1]
        both = (torch.cat([fine[0], valid[0]]), torch.cat([fine[1], valid[1]]))
        learned, ones = learned_weights(pretraining, fine, valid, steps), torch.ones(len(given))
        assert learned[~right].mean() < 0.7 * learned[right].mean(), (
            "wrong examples are ignored more than right ones"
        )
        runs = ((learned, fine), (ones, fine), (ones, both), (right.float(), fine))
        rows.append(
            [
                accuracy(weights, pretraining, part, (images[test], truth[test]))
                for weights, part in runs
            ]
        )
    found = dict(
        zip(
            ("learned", "all", "all, finetuned on more", "all that are right"),
            torch.tensor(rows).T,
            strict=True,
        )
    )
    headers = [f"mean of {seeds} seeds", "test accuracy (%)", "learned - it", "deviation"]
    gaps = {name: found["learned"] - values for name, values in found.items()}
    table = [
        (name, *(100 * x for x in (found[name].mean(), gap.mean(), gap.std(correction=0))))
        for name, gap in gaps.items()
    ]
    print(tabulate(table, headers, floatfmt=".1f"))
    assert gaps["all"].mean() > 0, (
        "learning what to ignore is better than pretraining on everything"
    )
    return found


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
