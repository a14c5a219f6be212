"""Data distillation: a few learned images, from which fresh networks learn to read digits.

    python examples/data_distillation.py   # 200 meta-steps, as in the results
    python examples/data_distillation.py --steps 40 --learners 4   # a look

The "learner" makes 10 full-batch SGD steps on the synthetic images, always from fresh random
weights; "images" holds them and the learner's optimizer, and lowers the learner's loss on real
digits (Wang, Zhu, Torralba, Efros 2018, arXiv:1811.10959). The learner's parameters are offsets
from weights that come with the data, so its copies begin differently. The learned images are
compared, for new weights and on held-out digits, with the same number of real images, whose
learning rate is the best of a grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from matplotlib.image import imsave
from torch import Tensor, nn
from torch.func import vmap

import metaopt as mo
from metaopt.tasks.digits import digits
from optimizers import SGD, Adam, ClipNorm

# digits to learn from, the others are held out; steps and copies of the learner
CLASSES, TRAIN, STEPS, COPIES = 10, 1200, 10, 8

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
for zero in model.parameters():
    nn.init.zeros_(zero)
net = mo.functional(model)


class Images(nn.Module):
    """A few images of each class, and the optimizer of those who learn from them."""

    def __init__(self, per_class: int):
        super().__init__()
        self.pixels = nn.Parameter(0.5 + 0.1 * torch.randn(per_class * CLASSES, 64))
        self.optimizer = SGD(nn.Parameter(torch.tensor(0.3)))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.pixels, torch.arange(len(self.pixels)) % CLASSES


def random_weights(generator: torch.Generator, copies: int) -> dict[str, Tensor]:
    """Return weights from N(0, 1 / fan in) for `copies` networks; biases are 0."""
    scales = {name: p.shape[-1] ** -0.5 if p.ndim > 1 else 0.0 for name, p in net.params.items()}
    return {
        name: scales[name] * torch.randn(copies, *p.shape, generator=generator)
        for name, p in net.params.items()
    }


def starts(seed: int) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Yield random weights, and real digits to judge what becomes of them.

    By the seed, they are the same for both levels.
    """
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(TRAIN, (COPIES, 256), generator=generator)
        yield random_weights(generator, COPIES), images[chosen], labels[chosen]


def images_loss(levels: Any, batch: Any) -> Tensor:
    """Return the loss on real digits of a learner that began at `start`."""
    start, x, y = batch
    return F.cross_entropy(net(mo.tree.map(torch.add, start, levels.learner.params), x), y)


def learner_loss(levels: Any, start: Any) -> Tensor:
    """Return the same on the synthetic images."""
    return images_loss(levels, (start, *levels.images()))


def accuracies(x: Tensor, y: Tensor, lr: float | Tensor, learners: int) -> Tensor:
    """Return the accuracy of each of some new learners on held-out digits, after their steps."""
    test_x, test_y = (part[TRAIN:] for part in digits())

    def accuracy(start: Any) -> Tensor:
        params = mo.minimize(
            lambda p, b: F.cross_entropy(net(p, b[0]), b[1]), SGD(lr), start, (x, y), steps=STEPS
        ).params
        return (net(params, test_x).argmax(1) == test_y).float().mean()

    with torch.no_grad():
        return vmap(accuracy)(random_weights(torch.Generator().manual_seed(1), learners))


def picture(x: Tensor, path: Path) -> None:
    """Save the images, one column a class."""
    rows = (
        F.pad(x.detach().reshape(-1, CLASSES, 8, 8), (1, 1, 1, 1))
        .transpose(1, 2)
        .flatten(0, 1)
        .flatten(1)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, rows.repeat_interleave(10, 0).repeat_interleave(10, 1).numpy(), cmap="gray_r")


def main(
    steps: int = 200,
    per_class: int = 1,
    learners: int = 20,
    out: Path = Path("runs/data_distillation/images.png"),
) -> None:
    """Learn synthetic images, and compare them with choices of real images.

    There are as many choices as learners.
    """
    torch.manual_seed(0)
    images = Images(per_class)
    repeated = (start for start, _, _ in starts(0) for _ in range(STEPS))
    learner = mo.Level("learner", model, learner_loss, images.optimizer, repeated, copies=COPIES)
    upper = mo.Level("images", images, images_loss, ClipNorm(0.3, Adam(0.01)), starts(0))
    graph = mo.LevelGraph([mo.Edge(upper, learner, steps=STEPS, start="restart")])
    print(graph)
    mo.Trainer(graph, max_steps=steps, label="distilling").fit()
    picture(images.pixels, out)

    synthetic = accuracies(*images(), images.optimizer.lr.detach(), learners)
    (x, y), generator = digits(), torch.Generator().manual_seed(2)
    choices = [
        [torch.randperm(TRAIN, generator=generator) for _ in range(CLASSES)]
        for _ in range(learners)
    ]
    picks = [
        torch.cat([order[y[order] == c][:per_class] for c, order in enumerate(choice)])
        for choice in choices
    ]
    grid = {
        lr: torch.stack([accuracies(x[pick], y[pick], lr, learners).mean() for pick in picks])
        for lr in (0.1, 0.3, 1.0)
    }
    lr, real = max(grid.items(), key=lambda item: item[1].mean())
    print(
        f"Accuracy on {len(y) - TRAIN} held-out digits after {STEPS} steps on "
        f"{per_class * CLASSES} images:"
    )
    print(f"synthetic images: {synthetic.mean():.3f} +- {synthetic.std():.3f} over random weights")
    print(
        f"     real images: {real.mean():.3f} +- {real.std():.3f} over choices, best "
        f"{real.max():.3f}; lr {lr} of {list(grid)}"
    )
    assert synthetic.mean() > real.mean(), "learned images must teach better than as many real ones"
    assert steps < 200 or synthetic.mean() > real.max(), "better than any choice, that is"


if __name__ == "__main__":
    tyro.cli(main)
