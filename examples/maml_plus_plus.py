"""MAML++: an initialisation, a rate for each layer and step, and batch norm for each step, all learned together.

    python examples/maml_plus_plus.py                             # turned digits, as in the README
    python examples/maml_plus_plus.py --data FOLDER_OR_ZIP        # Omniglot
    python examples/maml_plus_plus.py --steps 20 --test-tasks 20  # a look

A task is to tell some characters apart from one image of each, by 5 gradient steps. To MAML's meta-gradient, Antoniou, Edwards
and Storkey (ICLR 2019, arXiv:1810.09502) add: a learned rate for each layer in each step; a batch norm with a scale, a shift and
running statistics for each step; the query loss after every step, whose weights shrink until only the last counts; first-order
gradients at first; a cosine for the outer rate. Here they are arguments of one `minimize`. Both are tested on characters that
were not trained on; batch norm uses the statistics of the batch, as in the paper's program, or the running ones of the step.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import metaopt as mo
from metaopt import tree
from metaopt.tasks.digits import digits
from metaopt.tasks.omniglot import CharacterTasks, read_omniglot, split_alphabets
from optimizers import SGD, PerStep

ADAPT = 5  # inner steps


class StepNorm(nn.Module):
    """Batch norm with a scale, a shift and running statistics for each inner step."""

    def __init__(self, steps: int, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(steps, channels))
        self.shift = nn.Parameter(torch.zeros(steps, channels))
        self.register_buffer("mean", torch.zeros(steps, channels))
        self.register_buffer("var", torch.ones(steps, channels))

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        """Normalise images [n, channels, height, width]; when training, move the running statistics of the step."""
        row = step.clamp(max=len(self.scale) - 1).reshape(1)
        mean, var, scale, shift = (t.index_select(0, row)[0] for t in (self.mean, self.var, self.scale, self.shift))
        if self.training:
            old, (var, mean) = (mean, var), torch.var_mean(x, (0, 2, 3), correction=0)
            at = (torch.arange(len(self.scale)) == row)[:, None]
            self.mean = torch.where(at, 0.9 * old[0] + 0.1 * mean.detach(), self.mean)
            self.var = torch.where(at, 0.9 * old[1] + 0.1 * var.detach(), self.var)
        gain = scale * torch.rsqrt(var + 1e-5)
        return x * gain[:, None, None] + (shift - mean * gain)[:, None, None]


class Network(nn.Module):
    """[3 x 3 convolution, norm of the step, ReLU, 2 x 2 max pooling] until 2 or 3 pixels are left, and a linear head."""

    def __init__(self, size: int, ways: int, filters: int, steps: int):
        super().__init__()
        blocks, count = [], size.bit_length() - 2
        for block in range(count):
            conv = nn.Conv2d(filters if block else 1, filters, 3, padding=1)
            blocks.append(nn.ModuleDict({"conv": conv, "norm": StepNorm(steps, filters)}))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(filters * (size >> count) ** 2, ways)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        """Return logits [n, ways] of images [n, 1, size, size]."""
        for block in self.blocks:
            x = F.max_pool2d(F.relu(block["norm"](block["conv"](x), step)), 2)
        return self.head(x.flatten(1))


def rates(model: Network, lr: float = 0.1) -> SGD:
    """Return SGD with a learned rate for each layer in each step; norms are learned by the outer loop alone."""
    layers = [f"blocks.{block}.conv.*" for block in range(len(model.blocks))]
    return SGD(lr={layer: PerStep(nn.Parameter(torch.full((ADAPT,), lr))) for layer in [*layers, "head.*"]})


def importance(over: float) -> Tensor:
    """Return the weight of the query loss after each step, when `over` of their decay is over: from equal to (nearly) the last."""
    first = max(1 - over, 0.03) / ADAPT
    return torch.tensor([first] * (ADAPT - 1) + [1 - (ADAPT - 1) * first])


def learner(net: mo.Functional, inner: SGD, rule: Any) -> Any:
    """Return the loss of (a task, weights): those of its queries after each step, weighted."""

    def task_loss(params: Any, task: Any) -> Any:
        ((images, labels), query), weights = task

        def loss(fast: Any, step: Tensor, slow: Any, buffers: Any) -> Any:
            logits, buffers = net.with_buffers({**fast, **slow}, buffers, images, step)
            return F.cross_entropy(logits, labels), buffers

        def observe(fast: Any, step: Tensor, slow: Any, buffers: Any) -> Any:
            logits, _ = net.with_buffers({**fast, **slow}, buffers, query[0], step)
            right = logits.argmax(-1) == query[1]
            return {"loss": F.cross_entropy(logits, query[1]), "accuracy": right.to(logits.dtype).mean()}

        fast, slow = ({name: p for name, p in params.items() if ("norm" in name) == is_slow} for is_slow in (False, True))
        options = {"meta": slow, "buffers": net.buffers, "observe": observe, "differentiate": rule}
        out = mo.minimize(loss, inner, fast, torch.arange(ADAPT), **options)
        return (weights * out.observed["loss"]).sum(), {"accuracy": out.observed["accuracy"][-1], "buffers": out.buffers}

    return task_loss


def characters(data: Path | None) -> tuple[CharacterTasks, CharacterTasks]:
    """Return the characters to train on and those to test on: five digits each, or alphabets; turned, each is four."""
    if data is not None:
        return tuple(CharacterTasks(part, rotations=True) for part in split_alphabets(read_omniglot(data)))
    images, labels = digits()
    rows = [(255 * images[labels == digit][:170]).to(torch.uint8).view(-1, 1, 8, 8) for digit in range(10)]
    return tuple(CharacterTasks({"digits": torch.stack(rows[part::2])}, rotations=True) for part in (0, 1))


def train(plus: bool, sides: Any, steps: int, tasks: int, test_tasks: int) -> list[float]:
    """Return the test accuracy (with the batch's statistics, with the running ones) of MAML++, or of MAML, after so many steps."""
    torch.manual_seed(0)
    size, count = sides[0].classes.shape[-1], {"ways": 5, "shots": 1, "queries": 5}
    model = Network(size, 5, 16, steps=ADAPT if plus else 1)
    net, inner = mo.functional(model), rates(model) if plus else SGD(lr=0.1)
    options = {"learn": inner if plus else None, "has_aux": True, "chunk_size": tasks if size == 8 else 1}
    first, second = (mo.meta_grad(learner(net, inner, rule), **options) for rule in (mo.FirstOrder(), mo.Backprop()))
    outer = torch.optim.Adam([*model.parameters(), *inner.parameters()], lr=3e-3)
    cosine, generator = torch.optim.lr_scheduler.CosineAnnealingLR(outer, steps, 1e-5), torch.Generator().manual_seed(0)
    for step in range(steps):
        weights = importance(step / (0.3 * steps)) if plus else torch.eye(ADAPT)[-1]
        batch = sides[0].sample(generator, tasks, **count), weights.expand(tasks, -1)
        grads, _, aux = (first if plus and step < 0.3 * steps else second)(net.params, batch)
        if plus:
            grads, of_rates = grads
            mo.assign_grads(inner, of_rates)
        mo.assign_grads(model, grads)
        outer.step()
        if plus:
            cosine.step()
        for name, buffer in model.named_buffers():
            buffer.copy_(aux["buffers"][name].mean(0))
    test, found = sides[1].sample(torch.Generator().manual_seed(1), test_tasks, **count), []
    for training in (True, False):
        model.train(training)
        loss = learner(net, inner, mo.FirstOrder())
        with torch.no_grad():
            some = [tree.index((test, torch.ones(test_tasks, ADAPT)), task) for task in range(test_tasks)]
            found.append(torch.stack([loss(net.params, task)[1]["accuracy"] for task in some]).mean().item())
    if plus:
        for layer, schedule in inner.lr.values.items():
            print(f"{layer:>15}: rates", " ".join(f"{rate:.3f}" for rate in schedule.values.tolist()))
    return found


def main(data: Path | None = None, steps: int = 250, tasks: int = 8, test_tasks: int = 200) -> dict[str, list[float]]:
    """Train MAML and MAML++ for so many meta-steps of so many tasks, and return their test accuracies."""
    sides = characters(data)
    found = {name: train(plus, sides, steps, tasks, test_tasks) for name, plus in (("MAML", False), ("MAML++", True))}
    print(f"Accuracy on {test_tasks} tasks with characters that were not trained on, 5 ways, 1 shot, {ADAPT} steps:")
    for name, (batch, running) in found.items():
        print(f"{name:>15}: {batch:.3f}, with running statistics {running:.3f}")
    assert steps < 250 or found["MAML++"][0] > found["MAML"][0], "MAML++ is better after as many meta-steps"
    return found


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
