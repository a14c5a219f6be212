"""Search the operations of a small convolutional cell on the digits.

    python examples/architecture_search.py --seeds 3 --rivals 8

The result is compared with random architectures of the same space. A cell has an input and three
nodes; a node is the sum of all earlier ones, each through one of four operations: 4^6
architectures. During the search every connection mixes its operations by softmax weights. The
network learns on one half of the data, the weights on the other half, through a step of the network
(`FiniteDifference` with its step size; the network then steps once more with the new weights). The
operation of greatest weight is kept, and the derived architecture trained afresh on all data; so
are random architectures, from the same seed on the same batches. The derived ones beat the median
of these but not the best of eight: 87.3, 85.0 and 90.8 %. Liu, Simonyan, Yang 2019,
arXiv:1806.09055.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import tyro
from tabulate import tabulate
from torch import Tensor, nn

import metaopt as mo
from metaopt.tasks.corruption import stratified_split
from metaopt.tasks.digits import CLASSES, digits
from optimizers import SGD, Adam

# digits in a batch, and of each class in each half of the data
NODES, CHANNELS, BATCH, HALF, LR = 3, 8, 32, 30, 0.05
# connections, from node i to node j
PAIRS = [(i, j) for j in range(1, NODES + 1) for i in range(j)]
NAMES = ("identity", "mean", "1x1", "3x3")


def operations() -> nn.ModuleList:
    """Return the candidates of a connection."""
    convolutions = [
        nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, k, padding=k // 2), nn.GroupNorm(1, CHANNELS))
        for k in (1, 3)
    ]
    return nn.ModuleList([nn.Identity(), nn.AvgPool2d(3, 1, 1), *convolutions])


class Network(nn.Module):
    """A cell between a first convolution and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.cell: Any = nn.ModuleList(operations() for _ in PAIRS)
        self.last = nn.Linear(4 * CHANNELS, CLASSES)

    def forward(self, x: Tensor, mixture: Any) -> Tensor:
        """Return logits of images [n, 64].

        `mixture` holds, for each connection, the weight of each operation that is to run.
        """
        values = [self.first(x.view(-1, 1, 8, 8)).relu()]
        for j in range(1, NODES + 1):
            terms = []
            for (i, to), ops, weights in zip(PAIRS, self.cell, mixture, strict=True):
                if to == j:
                    terms += [w * ops[k](values[i]) for k, w in weights.items()]
            values.append(torch.stack(terms).sum(0).relu())
        return self.last(F.adaptive_avg_pool2d(values[-1], 2).flatten(1))


def search_loss(levels: Any, batch: Any) -> Tensor:
    """Return the mean loss of the mixed network."""
    mixture = [
        dict(enumerate(weights)) for weights in levels.architecture.params["logits"].softmax(-1)
    ]
    return F.cross_entropy(levels.network(batch[0], mixture), batch[1])


def batches(examples: Tensor, steps: int, generator: torch.Generator) -> Any:
    """Return a number of random batches of these digits, stacked."""
    images, labels = digits()
    drawn = examples[torch.randint(len(examples), (steps, BATCH), generator=generator)]
    return images[drawn], labels[drawn]


def search(first: Tensor, second: Tensor, steps: int, generator: torch.Generator) -> list[int]:
    """Return the operation of each connection that the search ends with."""
    data = [list(zip(*batches(half, steps, generator), strict=True)) for half in (first, second)]
    network = mo.Level("network", Network(), search_loss, SGD(LR, momentum=0.9), data=data[0])
    logits = nn.Parameter(torch.zeros(len(PAIRS), len(NAMES)))
    architecture = mo.Level(
        "architecture", nn.ParameterDict({"logits": logits}), search_loss, Adam(0.1), data=data[1]
    )
    rule = mo.FiniteDifference(scale="lr")
    edge = mo.Edge(architecture, network, differentiate=rule, look_ahead=True)
    graph = mo.LevelGraph([edge])
    mo.Trainer(graph, max_steps=steps, label="search").fit()
    return logits.argmax(-1).tolist()


@torch.no_grad()
def trained_accuracy(
    chosen: list[int], seed: int, train: Tensor, test: Tensor, steps: int
) -> float:
    """Train a network of these operations on `train`, and return its accuracy on `test`."""
    torch.manual_seed(seed)
    net, mixture = mo.functional(Network()), [{k: 1.0} for k in chosen]

    def loss(params: Any, batch: Any) -> Tensor:
        return F.cross_entropy(net(params, batch[0], mixture), batch[1])

    rows = batches(train, steps, torch.Generator().manual_seed(seed))
    params = mo.minimize(loss, SGD(LR, momentum=0.9), net.params, rows).params
    images, labels = digits()
    return (net(params, images[test], mixture).argmax(-1) == labels[test]).float().mean().item()


def main(seeds: int = 3, rivals: int = 8, steps: int = 150) -> Tensor:
    """Return the accuracies of the derived architecture, and the median and best of random ones.

    There is one of each for every seed.
    """
    rows, kept = [], []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        first, second, test = stratified_split(digits()[1], (HALF, HALF), generator)
        derived = search(first, second, steps, generator)
        drawn = torch.randint(len(NAMES), (rivals, len(PAIRS)), generator=generator).tolist()
        ours, *others = (
            trained_accuracy(chosen, seed, torch.cat([first, second]), test, steps)
            for chosen in (derived, *drawn)
        )
        rows.append((ours, torch.tensor(others).quantile(0.5).item(), max(others)))
        kept.append(" ".join(NAMES[k] for k in derived))
    found = torch.tensor(rows)
    table = [
        (seed, *(100 * row), names)
        for seed, (row, names) in enumerate(zip(found, kept, strict=True))
    ]
    table.append(("mean", *(100 * found.mean(0)), ""))
    headers = ["seed", "derived (%)", f"median of {rivals} random", "best of these", "derived"]
    print(tabulate(table, headers, floatfmt=".1f"))
    assert found[:, 0].mean() > 0.2, (
        "the derived architecture is better than twice chance, however short the training"
    )
    return found


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
