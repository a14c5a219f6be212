"""MAML++: an initialisation, a rate and a batch norm for each step, learned together.

    python examples/maml_plus_plus.py                            # 200 meta-steps, as in the results
    python examples/maml_plus_plus.py --steps 20 --test-tasks 20 # a look

The rates differ from layer to layer. A task is to tell five turned digits apart, from one image of
each, by 5 gradient steps. To MAML, Antoniou, Edwards and Storkey (ICLR 2019, arXiv:1810.09502) add
a learned rate for each layer and step; a batch norm with a scale, a shift and running statistics
for each step; the query loss after every step, with weights that go over to the last one;
first-order gradients at first; a cosine for the outer rate. Here all are arguments of one
`minimize`. Both are tested on digits that were not trained on, with the statistics of the batch, as
in the authors' program, and with the running ones. In so short a training it is no better than
MAML.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import metaopt as mo
from metaopt.tasks.digits import digits
from metaopt.tasks.omniglot import CharacterTasks
from optimizers import SGD, PerStep

# inner steps, channels, what has rates of its own
ADAPT, FILTERS, LAYERS = 5, 16, ("convs.0.*", "convs.1.*", "head.*")


class StepNorm(nn.Module):
    """Batch norm with a scale, a shift and running statistics for each inner step."""

    def __init__(self, steps: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(steps, FILTERS))
        self.shift = nn.Parameter(torch.zeros(steps, FILTERS))
        self.register_buffer("mean", torch.zeros(steps, FILTERS))
        self.register_buffer("var", torch.ones(steps, FILTERS))

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        row = step.clamp(max=len(self.scale) - 1).reshape(1)
        mean, var, scale, shift = (
            rows.index_select(0, row)[0] for rows in (self.mean, self.var, self.scale, self.shift)
        )
        if not self.training:
            return F.batch_norm(x, mean, var, scale, shift)
        is_row = (torch.arange(len(self.scale)) == row)[:, None]
        news = torch.var_mean(x.detach(), (0, 2, 3))
        self.var, self.mean = (
            torch.where(is_row, 0.9 * old + 0.1 * new, old)
            for old, new in zip((self.var, self.mean), news)
        )
        return F.batch_norm(x, None, None, scale, shift, training=True)


class Network(nn.Module):
    """Two blocks and a linear head, for 8 x 8 images.

    A block is a 3 x 3 convolution, the norm of the step, a ReLU and 2 x 2 max pooling.
    """

    def __init__(self, steps: int):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, FILTERS, 3, padding=1) for channels in (1, FILTERS)
        )
        self.norms = nn.ModuleList(StepNorm(steps) for _ in range(2))
        self.head = nn.Linear(4 * FILTERS, 5)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(conv(x), step)), 2)
        return self.head(x.flatten(1))


def task_loss(net: mo.Functional, inner: SGD, rule: Any, params: Any, task: Any) -> Any:
    """Return the losses of the queries after each step, weighted, and what else there is to tell.

    Norms are not adapted.
    """
    episode, weights = task

    def measure(side: str, fast: Any, step: Tensor, given: Any, buffers: Any) -> Any:
        logits, buffers = net.with_buffers(
            {**fast, **given["norms"]}, buffers, given[side][0], step
        )
        return (
            F.cross_entropy(logits, given[side][1]),
            buffers,
            (logits.argmax(-1) == given[side][1]).to(logits.dtype).mean(),
        )

    fast, slow = (
        {name: p for name, p in params.items() if ("norms" in name) == is_slow}
        for is_slow in (False, True)
    )
    options = {
        "meta": {"norms": slow, **episode._asdict()},
        "buffers": net.buffers,
        "differentiate": rule,
    }
    out = mo.minimize(
        partial(measure, "support"),
        inner,
        fast,
        torch.arange(ADAPT),
        observe=partial(measure, "query"),
        **options,
    )
    return (weights * out.observed[0]).sum(), (out.observed[2][-1], out.buffers)


def train(plus: bool, steps: int, tasks: int, test_tasks: int) -> list[float]:
    """Train MAML++, or MAML, and return its test accuracies.

    One is with the batch's statistics, the other with running ones.
    """
    images, labels = digits()
    generator = torch.manual_seed(0)
    count = {"ways": 5, "shots": 1, "queries": 5}
    drawn = [
        (255 * images[labels == digit][:170]).to(torch.uint8).view(-1, 1, 8, 8)
        for digit in range(10)
    ]
    known, new = (
        CharacterTasks({"digits": torch.stack(drawn[half::2])}, rotations=True) for half in (0, 1)
    )
    inner = SGD(lr={layer: PerStep(nn.Parameter(torch.full((ADAPT,), 0.1))) for layer in LAYERS})
    model = Network(ADAPT if plus else 1)
    net = mo.functional(model)
    options = {"learn": inner, "has_aux": True, "chunk_size": tasks}
    first, exact = (
        mo.meta_grad(partial(task_loss, net, inner, rule), **options)
        for rule in (mo.FirstOrder(), mo.Backprop())
    )
    outer = torch.optim.Adam([*model.parameters(), *(inner.parameters() if plus else [])], lr=3e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(outer, steps, 1e-5 if plus else 3e-3)
    for over in (torch.arange(steps) / (0.3 * steps)).tolist():
        # The weight of every step but the last.
        early = max(1 - over, 0.03) / ADAPT if plus else 0.0
        weights = torch.tensor([early, early, early, early, 1 - 4 * early])
        meta_gradient = first if plus and over < 1 else exact
        batch = known.sample(generator, tasks, **count)
        (grads, of_rates), _, (_, buffers) = meta_gradient(
            net.params, (batch, weights.expand(tasks, -1))
        )
        mo.assign_grads(model, grads)
        mo.assign_grads(inner, of_rates)
        outer.step()
        cosine.step()
        model.load_state_dict(
            {name: buffer.mean(0) for name, buffer in buffers.items()}, strict=False
        )
    tests = (
        new.sample(torch.Generator().manual_seed(1), test_tasks, **count),
        torch.ones(test_tasks, ADAPT),
    )
    test_all = torch.func.vmap(partial(task_loss, net, inner, mo.FirstOrder()), (None, 0))
    found = []
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            _, (accuracies, _) = test_all(net.params, tests)
        found.append(accuracies.mean().item())
    return found


def main(steps: int = 200, tasks: int = 8, test_tasks: int = 400) -> dict[str, list[float]]:
    """Train MAML and MAML++, and return their test accuracies."""
    found = {
        name: train(plus, steps, tasks, test_tasks)
        for name, plus in (("MAML", False), ("MAML++", True))
    }
    for name, (batch, running) in found.items():
        print(f"{name:>6}: test accuracy {batch:.3f}, with running statistics {running:.3f}")
    assert steps < 200 or min(found["MAML"][0], found["MAML++"][0]) > 0.75, (
        "both tell new digits apart; chance is 0.2"
    )
    return found


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
