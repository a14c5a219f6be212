"""Learning from damaged data, on the handwritten digits.

Plain training, clean data only, meta-weight-net and an oracle are compared.

    python scripts/meta_weight_net.py --noise 0.4   # 40 % of the labels are wrong
    # Long-tailed classes, from 100 examples down to 2:
    python scripts/meta_weight_net.py --noise 0 --imbalance 50
    python scripts/meta_weight_net.py --noise 0 --imbalance 50 --weight-input "loss and class"
    # Texts and a pretrained transformer in place of digits and a small network:
    python scripts/meta_weight_net.py text --help

Every method makes SGD steps with momentum on minibatches; they differ in where these come from and
how they are weighted:

- plain: the damaged training set, as it is;
- clean only: the 100 clean, balanced examples (10 of each class);
- meta-weight-net: the damaged set, example i weighted by V(loss_i; theta); theta is learned so that
  one step of the learner lowers the loss on the 100 clean examples (Shu et al. 2019,
  arXiv:1902.07379, equations 3 to 5);
- oracle: the damaged set with the damage known: wrong labels are never drawn, and all classes
  equally often.

The learning rate and the number of steps are chosen for each method and seed from one grid, by the
accuracy on the clean examples (ties by the loss); clean only is chosen by 5-fold cross-validation
within them, then trained on all 100. All seeds, rates and folds train side by side under `vmap`;
several processes (`torchrun`) share the seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

import metaopt as mo
from metaopt import tree
from metaopt.distributed import current_ranks, gather_rows
from metaopt.extras import extra
from metaopt.tasks.corruption import flip_labels, long_tail, stratified_split
from metaopt.tasks.digits import digits
from metaopt.tree import Tree
from optimizers import SGD, Adam

with extra("scripts/meta_weight_net.py"):
    import command_line
    import tabulate
    from meta_weight_net_plot import plot

# CLEAN and TRAIN: examples of each class
CLASSES, CLEAN, TRAIN, FOLDS, MOMENTUM = 10, 10, 100, 5, 0.9


@dataclass(frozen=True)
class Config:
    """Compare ways to learn from damaged labels."""

    noise: float = 0.4
    """Share of wrong labels, in [0, 1)."""
    imbalance: float = 1.0
    """Size of the largest class over that of the smallest, 1 to 100; sizes fall exponentially."""
    hidden: int = 100
    """Width of the learner, a 64-hidden-10 perceptron."""
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """Grid of learning rates, for every method."""
    lengths: tuple[int, ...] = (50, 100, 200, 400, 800, 1600, 3200)
    """Grid of numbers of steps, rising; the last is the long training."""
    batch_size: int = 100
    """Examples in a minibatch."""
    weight_lr: float = 3e-4
    """Adam's learning rate for the weight net."""
    weight_input: Literal["loss", "loss and class"] = "loss"
    """What the weight net sees of an example: its loss, as in the paper, or also its label."""
    seeds: int = 5
    """Random splits, damages and initialisations."""
    seed: int = 0
    """The first of them."""
    out: Path = Path("runs/meta_weight_net")
    """Folder for the plot, checkpoints and TensorBoard events."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""

    def __post_init__(self) -> None:
        for name in ("learning_rates", "lengths"):
            values = getattr(self, name)
            if not values or min(values) <= 0 or sorted(set(values)) != list(values):
                raise ValueError(f"`{name}` must be positive and rising, got {values}.")
        if self.seeds < 2:
            raise ValueError(
                f"`seeds` must be at least 2, got {self.seeds}. One seed has no standard error."
            )
        damaged_digits(self, self.seed)  # says here and now if noise or imbalance is impossible


Batch = tuple[Tensor, Tensor]  # images [n, 64], labels [n]
METHODS = ("plain", "clean only", "meta-weight-net", "oracle")


class Data(NamedTuple):
    """One seed's split, or a stack of them.

    The pool is the damaged training set, then the clean examples.
    """

    images: Tensor  # [pool, 64]
    labels: Tensor  # [pool], as given
    wrong: Tensor  # [pool], whether the label is
    ideal: Tensor  # [pool], the oracle's probability of drawing the example
    test_images: Tensor  # [test, 64]
    test_labels: Tensor  # [test]

    def clean(self) -> Batch:
        """Return the clean examples."""
        return self.images[..., -CLEAN * CLASSES :, :], self.labels[..., -CLEAN * CLASSES :]


def damaged_digits(config: Config, seed: int) -> Data:
    """Split the digits afresh into clean, training and test, and damage the training set.

    First its classes are damaged, then its labels.
    """
    generator = torch.Generator().manual_seed(seed)
    images, truth = digits()
    clean, train, test = stratified_split(truth, (CLEAN, TRAIN), generator)
    train = train[long_tail(truth[train], config.imbalance, generator)]
    given = flip_labels(truth[train], config.noise, CLASSES, generator)
    pool = torch.cat([train, clean])
    labels = torch.cat([given, truth[clean]])
    right = given == truth[train]
    counts = torch.bincount(given[right], minlength=CLASSES)
    ideal = F.pad(right / counts[given].clamp(min=1), (0, len(clean)))
    return Data(
        images[pool], labels, labels != truth[pool], ideal / ideal.sum(), images[test], truth[test]
    )


def sampling(method: str, data: Data) -> Tensor:
    """Return the probability of drawing each example of the pool, [seeds, trainings, pool].

    There is one training, but for "clean only", where training k = 0 ... FOLDS - 1 leaves out fold
    k and the last one nothing.
    """
    seeds, pool = data.labels.shape
    clean = torch.arange(pool) - (pool - CLEAN * CLASSES)
    if method == "clean only":
        # the clean examples are grouped by class: every fold is balanced
        fold = torch.arange(FOLDS + 1)[:, None]
        drawn = (clean >= 0) & (clean % FOLDS != fold)
    else:
        drawn = (clean < 0)[None]
    uniform = (drawn / drawn.sum(-1, keepdim=True)).expand(seeds, *drawn.shape)
    return data.ideal[:, None] if method == "oracle" else uniform


class Learner:
    """The learner's step: SGD with momentum on the mean cross-entropy of a minibatch.

    The state is a dict of trees.
    """

    def __init__(self, net: mo.Functional):
        self.net = net

    def start(self, params: Tree) -> Tree:
        """Return the state before the first step."""
        return {"params": params, "opt_state": SGD(1.0, MOMENTUM).init(params)}

    def loss(self, params: Tree, batch: Batch) -> Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(self.net(params, batch[0]), batch[1])

    def step(self, state: Tree, lr: Tensor, batch: Batch, clean: Batch) -> Tree:
        """Return the next state; this learner does not look at the clean examples."""
        out = mo.minimize(
            self.loss,
            SGD(lr, MOMENTUM),
            state["params"],
            batch,
            steps=1,
            opt_state=state["opt_state"],
        )
        return {"params": out.params, "opt_state": out.opt_state}


class MetaWeightNet(Learner):
    """A learner whose minibatch loss is sum_i v_i l_i / sum_i v_i, v_i = V(l_i; theta).

    theta is learned on the way. Two differences from the paper. It looks ahead with a plain
    gradient step, we with the learner's own optimizer and state: the step that the learner is going
    to make. And it takes mean_i v_i l_i. There the common scale of the weights acts as a learning
    rate: early in training, when every example lowers the clean loss, all weights rise together,
    and with a fast weight net (Adam at 1e-3) they saturate at 1, which is plain training. Dividing
    by the sum leaves only the choice between examples. It too can saturate if the weight net learns
    fast; hence the default rate, 3e-4.

    Args:
        net: the learner.
        weight_net: V, from [n, 1] (losses) or [n, 1 + CLASSES] (losses and one-hot labels) to
            weights [n, 1] in (0, 1).
        optimizer: for theta.

    Reference:
        Shu et al. 2019, arXiv:1902.07379, algorithm 1.
    """

    def __init__(self, net: mo.Functional, weight_net: mo.Functional, optimizer: mo.Optimizer):
        super().__init__(net)
        self.weight_net, self.optimizer = weight_net, optimizer
        self.sees_class = next(iter(weight_net.params.values())).shape[1] > 1

    def start(self, params: Tree) -> Tree:
        weights = self.weight_net.params
        return super().start(params) | {
            "weights": weights,
            "weights_opt_state": self.optimizer.init(weights),
        }

    def weigh(self, weights: Tree, losses: Tensor, labels: Tensor) -> Tensor:
        """Return V(losses; theta), [n]; the losses count as constants."""
        seen = losses.detach()[:, None]
        if self.sees_class:
            seen = torch.cat([seen, torch.eye(CLASSES, dtype=seen.dtype)[labels]], dim=1)
        return self.weight_net(weights, seen).squeeze(1)

    def weighted_loss(self, params: Tree, batch: Batch, weights: Tree) -> Tensor:
        """Return sum_i v_i l_i / sum_i v_i."""
        losses = F.cross_entropy(self.net(params, batch[0]), batch[1], reduction="none")
        weight = self.weigh(weights, losses, batch[1])
        return (weight * losses).sum() / weight.sum()

    def ahead(self, weights: Tree, state: Tree, lr: Tensor, batch: Batch) -> mo.Minimized:
        """Make the step that the learner would make with these weights."""
        params, opt_state = state["params"], state["opt_state"]
        return mo.minimize(
            self.weighted_loss,
            SGD(lr, MOMENTUM),
            params,
            batch,
            steps=1,
            meta=weights,
            opt_state=opt_state,
        )

    def meta_loss(
        self, weights: Tree, state: Tree, lr: Tensor, batch: Batch, clean: Batch
    ) -> Tensor:
        """Return the loss on the clean examples after that step."""
        return self.loss(self.ahead(weights, state, lr, batch).params, clean)

    def step(self, state: Tree, lr: Tensor, batch: Batch, clean: Batch) -> Tree:
        """Improve the weight net, then make the learner's step with the new weights."""
        hypergradient = grad(self.meta_loss)(state["weights"], state, lr, batch, clean)
        updates, weights_opt_state = self.optimizer(
            hypergradient, state["weights_opt_state"], state["weights"]
        )
        weights = mo.apply_updates(state["weights"], updates)
        out = self.ahead(weights, state, lr, batch)
        return {
            "params": out.params,
            "opt_state": out.opt_state,
            "weights": weights,
            "weights_opt_state": weights_opt_state,
        }


class Result(NamedTuple):
    """What a method's trainings give on the grid."""

    test_accuracy: Tensor  # [seeds, rates, lengths]
    # [seeds, rates, lengths]: correct clean examples, plus a fraction for their loss that breaks
    # ties
    score: Tensor
    states: list[Tree]  # for each length, leaves [seeds, rates, ...]

    def choose(self, *, longest: bool) -> Tensor:
        """Return the index of the best score on the grid of each seed, [seeds, 2]: rate, length.

        `longest` fixes the length.
        """
        rates, lengths = self.score.shape[1:]
        score = self.score.clone()
        score[:, :, : lengths - 1 if longest else 0] = -torch.inf
        return torch.stack(torch.unravel_index(score.flatten(1).argmax(1), (rates, lengths)), 1)

    def chosen(self, *, longest: bool) -> Tensor:
        """Return the test accuracy of the choice, [seeds]."""
        rate, length = self.choose(longest=longest).T
        return self.test_accuracy[torch.arange(len(rate)), rate, length]


class Training:
    """Trains one method on every seed, learning rate and fold at once, and judges it at lengths.

    Methods see the same minibatches if they draw from the same examples. Of several ranks, each
    trains its part of the seeds, and all know how good those of the others are.
    """

    def __init__(self, method: str, config: Config, data: Data):
        self.method, self.config, self.ranks = method, config, current_ranks()
        self.own = self.ranks.share(len(data.labels), "seeds")
        self.learner, starts = make_learner(method, config)
        self.probabilities = sampling(method, data)
        self.data, starts = tree.index((data, starts), self.own)
        data, trainings = self.data, self.probabilities.shape[1]
        self.grid = (len(data.labels), len(config.learning_rates), trainings)
        self.images, self.labels, self.clean, state = tree.map(
            self.per_run, (data.images, data.labels, data.clean(), starts)
        )
        rates = torch.tensor(config.learning_rates)[:, None].expand(self.grid).flatten()
        self.rates, self.runs = rates, torch.arange(len(rates))[:, None]
        self.generator = torch.Generator().manual_seed(config.seed)
        # "judged": at each length so far, (test accuracies, scores, states)
        self.now: dict[str, Any] = {"step": 0, "state": state, "judged": []}

    def per_run(self, leaf: Tensor) -> Tensor:
        """Repeat [seeds, ...] for each rate and fold: [runs, ...]."""
        return leaf[:, None, None].expand(*self.grid, *leaf.shape[1:]).flatten(0, 2)

    def step(self) -> dict[str, float]:
        drawn = torch.multinomial(
            self.probabilities.flatten(0, 1),
            self.config.batch_size,
            replacement=True,
            generator=self.generator,
        )
        drawn = drawn.unflatten(0, self.probabilities.shape[:2])[self.own]
        index = drawn[:, None].expand(*self.grid, -1).flatten(0, 2)
        batch = (self.images[self.runs, index], self.labels[self.runs, index])
        state = vmap(self.learner.step)(self.now["state"], self.rates, batch, self.clean)
        self.now = {**self.now, "step": self.now["step"] + 1, "state": state}
        return self.judge() if self.now["step"] in self.config.lengths else {}

    def judge(self) -> dict[str, float]:
        """Remember how good the present state is, and return the accuracy at each rate."""
        state, data, net = self.now["state"], self.data, self.learner.net
        last = tree.map(lambda leaf: leaf.unflatten(0, self.grid)[:, :, -1], state)
        logits = vmap(vmap(net, (0, None)))(last["params"], data.test_images)
        accuracy = (logits.argmax(-1) == data.test_labels[:, None]).float().mean(-1)
        on_clean = vmap(net)(state["params"], self.clean[0]).unflatten(0, self.grid)
        found = (accuracy, score(on_clean, data), last)
        accuracy, _, _ = found = gather_rows(found, len(self.probabilities), self.ranks)
        self.now["judged"] = [*self.now["judged"], found]
        means = zip(self.config.learning_rates, accuracy.mean(0).tolist())
        return {f"{self.method}/rate {rate:g}": mean for rate, mean in means}

    def state_dict(self) -> dict[str, Any]:
        return {**self.now, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.now = {name: state[name] for name in self.now}
        self.generator.set_state(state["generator"])


def train(method: str, config: Config, data: Data) -> Result:
    """Return what a method's trainings give on the grid."""
    training = Training(method, config, data)
    mo.Trainer(
        training,
        max_steps=config.lengths[-1],
        logger=mo.TensorBoardLogger(config.out),
        label=method,
        **command_line.saved(config, method),
        checkpoint_every=200,
    ).fit()
    accuracies, scores, states = zip(*training.now["judged"])
    return Result(torch.stack(accuracies, -1), torch.stack(scores, -1), list(states))


def make_learner(method: str, config: Config) -> tuple[Learner, Tree]:
    """Return the method's learner, and for every seed a state before the first step.

    All methods start from the same networks.
    """
    classes = CLASSES if config.weight_input == "loss and class" else 0
    starts = []
    for seed in range(config.seed, config.seed + config.seeds):
        torch.manual_seed(seed)
        net = mo.functional(
            nn.Sequential(
                nn.Linear(64, config.hidden), nn.ReLU(), nn.Linear(config.hidden, CLASSES)
            )
        )
        weight_net = mo.functional(
            nn.Sequential(nn.Linear(1 + classes, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
        )
        learner = (
            MetaWeightNet(net, weight_net, Adam(config.weight_lr))
            if method == "meta-weight-net"
            else Learner(net)
        )
        starts.append(tree.map(torch.Tensor.detach, learner.start(net.params)))
    return learner, tree.stack(starts)


def score(logits: Tensor, data: Data) -> Tensor:
    """Return the number of clean examples that are right, [seeds, rates].

    To break ties, exp(-their mean loss) is added.

    Args:
        logits: [seeds, rates, trainings, clean examples, classes]. With one training all examples
            count; with FOLDS + 1 training k is judged on fold k, which it has not seen, and the
            last one not at all.
        data: the splits.
    """
    labels = data.clean()[1][:, None, None].expand(logits.shape[:-1])
    losses = F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
    right = (logits.argmax(-1) == labels).float()
    if logits.shape[2] == FOLDS + 1:
        left_out = torch.arange(labels.shape[-1]) % FOLDS == torch.arange(FOLDS + 1)[:, None]
    else:
        left_out = torch.ones(logits.shape[2:4], dtype=torch.bool)
    right, losses = right[..., left_out], losses[..., left_out]
    return right.sum(-1) + torch.nan_to_num(torch.exp(-losses.mean(-1)), nan=0.0)


def report(config: Config, results: Mapping[str, Result]) -> str:
    """Return the tables of the tuned and the long training, and of the long one at every rate.

    The first comes with the paired differences.
    """
    ours, steps = results["meta-weight-net"], f"{config.lengths[-1]} steps"
    rows, fixed = [], []
    for method, result in results.items():
        row = [method]
        for longest in (False, True):
            accuracy = result.chosen(longest=longest)
            row += [
                percent(accuracy),
                ""
                if result is ours
                else percent(ours.chosen(longest=longest) - accuracy, signed=True),
            ]
        rows.append(row)
        fixed.append([method, *map(percent, result.test_accuracy[:, :, -1].T)])
    for method in ("plain", "clean only"):
        difference = (ours.test_accuracy - results[method].test_accuracy)[:, :, -1].T
        fixed.append(
            [
                f"meta-weight-net - {method}",
                *(percent(values, signed=True) for values in difference),
            ]
        )
    tuned = [
        "method",
        "tuned rate and length",
        "meta-weight-net - it",
        f"tuned rate, {steps}",
        "meta-weight-net - it",
    ]
    rates = [f"rate {rate:g}, {steps}" for rate in config.learning_rates]
    return (
        f"{title(config)}; test accuracy in %, mean ± standard error over {config.seeds} "
        f"seeds\n{tabulate.tabulate(rows, headers=tuned, disable_numparse=True)}\nDifferences are "
        "paired by seed; * means more than two standard "
        f"errors.\n\n{tabulate.tabulate(fixed, headers=['method', *rates], disable_numparse=True)}"
    )


def percent(values: Tensor, *, signed: bool = False) -> str:
    """Return 'mean ± standard error' in per cent.

    A signed mean more than two standard errors from 0 gets a star.
    """
    mean, error = 100 * values.mean().item(), 100 * values.std().item() / len(values) ** 0.5
    return (
        f"{mean:+.1f} ± {error:.1f}{' *' if abs(mean) > 2 * error else ''}"
        if signed
        else f"{mean:.1f} ± {error:.1f}"
    )


def title(config: Config) -> str:
    """Describe the damage in words."""
    noise = f"{100 * config.noise:g} % wrong labels" if config.noise else ""
    tail = f"long-tailed classes 1:{config.imbalance:g}" if config.imbalance > 1 else ""
    return "Digits, " + (" and ".join(filter(None, (noise, tail))) or "undamaged")


def learned_weights(
    config: Config, data: Data, result: Result
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (losses, weights, group) of the training set, for every seed.

    They are those after the long training at its tuned rate. The weights are divided by their mean,
    as in the learner's loss. Group 1 is what should be treated apart: wrong labels or, if there is
    no noise, the five rarest classes.
    """
    learner, _ = make_learner("meta-weight-net", config)
    assert isinstance(learner, MetaWeightNet)
    found = []
    for seed, (rate, length) in enumerate(result.choose(longest=True).tolist()):
        state = tree.index(result.states[length], (seed, rate))
        images, labels, wrong, *_ = [
            leaf[: -CLEAN * CLASSES] for leaf in tree.index(tuple(data), seed)
        ]
        losses = F.cross_entropy(learner.net(state["params"], images), labels, reduction="none")
        weights = learner.weigh(state["weights"], losses, labels)
        rare = torch.bincount(labels, minlength=CLASSES).argsort()[: CLASSES // 2]
        found.append(
            (losses, weights / weights.mean(), wrong if config.noise else torch.isin(labels, rare))
        )
    return found


def main(config: Config) -> Mapping[str, Result]:
    """Train every method, print the tables, and write plot and events."""
    torch.set_num_threads(1)
    data = tree.stack(
        [damaged_digits(config, seed) for seed in range(config.seed, config.seed + config.seeds)]
    )
    with torch.no_grad():
        results = {method: train(method, config, data) for method in METHODS}
        found = learned_weights(config, data, results["meta-weight-net"])
        plot(config, title(config), found, results, config.out / "meta_weight_net.png")
    print(f"\n{report(config, results)}\nPlot: {config.out / 'meta_weight_net.png'}")
    return results


if __name__ == "__main__":
    if sys.argv[1:2] == ["text"]:
        import meta_weight_net_text as text  # here: transformers takes seconds to load

        command_line.run(text.main, {"text": text.Config}, text.__doc__, shares=False)
    command_line.run(main, Config, __doc__)
