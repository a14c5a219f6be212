"""The trainings that `meta_weight_net.py text` compares, one after the other, as one training."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from meta_weight_net import Result
from meta_weight_net_learners import CLASSES, Learner, MetaWeightNet, add_adapters
from meta_weight_net_text_report import Seen
from torch import Tensor, nn

import metaopt as mo
from metaopt.tasks.corruption import flip_labels, long_tail, stratified_split
from metaopt.tasks.sentences import SentenceEncoder, Sentences

FOLDS = 5
AT_ONCE = 64  # snippets that are judged together
METHODS = ("plain", "balanced", "clean only", "finite differences", "SAMA", "oracle")
RULES: dict[str, mo.Rule] = {"finite differences": mo.FiniteDifference(), "SAMA": mo.SAMA()}


class Split(NamedTuple):
    """One seed's snippets, as rows of the corpus."""

    train: Tensor
    given: Tensor  # [train], labels as they are given
    wrong: Tensor  # [train], whether they are
    clean: Tensor  # the first half negative
    test: Tensor


def damage(config: Any, truth: Tensor, seed: int) -> Split:
    """Split the snippets afresh, and damage the training set: first its classes, then labels."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (config.clean // CLASSES, config.train // CLASSES)
    clean, train, rest = stratified_split(truth, sizes, generator)
    if len(rest) < config.test:
        raise ValueError(f"`test` must be at most {len(rest)}, what is left, got {config.test}.")
    train = train[long_tail(truth[train], config.imbalance, generator)]
    given = truth[train].clone()
    flipped = torch.ones_like(given, dtype=torch.bool)
    if config.flip != "both":
        flipped = given == (config.flip == "positive")
    given[flipped] = flip_labels(given[flipped], config.noise, CLASSES, generator)
    test = rest[torch.randperm(len(rest), generator=generator)[: config.test]]
    return Split(train, given, given != truth[train], clean, test)


def drawn_rows(method: str, split: Split, fold: int) -> Tensor:
    """Return the places in the training set (or of the clean examples) that a method draws from.

    Each is drawn equally often. Where classes are to be, the smaller one is there several times.
    """
    if method == "clean only":
        # grouped by class: every fold is balanced
        return torch.nonzero(torch.arange(len(split.clean)) % FOLDS != fold)[:, 0]
    if method not in ("balanced", "oracle"):
        return torch.arange(len(split.train))
    used = ~split.wrong | (method == "balanced")
    classes = [torch.nonzero(used & (split.given == label))[:, 0] for label in range(CLASSES)]
    most = max(len(rows) for rows in classes)
    return torch.cat([rows.repeat(-(-most // len(rows)))[:most] for rows in classes])


class Run(NamedTuple):
    """One training: a method, a seed, a place in the grid of rates; of clean only, a fold."""

    method: str
    seed: int
    rate: int
    fold: int


class Comparison:
    """All trainings, one after the other, each judged at every length.

    Args:
        config: of the script.
        sentences: the snippets as the frozen layers left them.
        truth: their labels.
        encoder: with the layers that are trained.
    """

    def __init__(self, config: Any, sentences: Sentences, truth: Tensor, encoder: SentenceEncoder):
        self.config, self.sentences, self.truth, self.encoder = config, sentences, truth, encoder
        self.splits = [damage(config, truth, config.seed + k) for k in range(config.seeds)]
        self.runs = [
            Run(method, seed, rate, fold)
            for method in config.methods
            for seed in range(config.seeds)
            for rate in range(len(config.learning_rates))
            for fold in (range(FOLDS + 1) if method == "clean only" else [FOLDS])
        ]
        shape = (len(self.runs), len(config.lengths))
        self.now: dict[str, Any] = {
            "step": 0,
            # test accuracy, right clean examples, sum of their losses
            "judged": torch.full((*shape, 3), torch.nan),
            "seconds": torch.zeros(len(self.runs)),  # of the steps, CPU time
            "seen": {},  # number of the run -> losses and weights of the training set at its end
        }
        self.training = self.begin(self.runs[0])

    @property
    def steps(self) -> int:
        """Number of steps of all trainings together."""
        return len(self.runs) * self.config.lengths[-1]

    def begin(self, run: Run) -> Learner | MetaWeightNet:
        """Return a training before its first step; those of one seed begin alike."""
        config, split, seed = self.config, self.splits[run.seed], self.config.seed + run.seed
        rows = drawn_rows(run.method, split, run.fold)
        if run.method == "clean only":
            examples = self.examples(split.clean[rows], self.truth[split.clean[rows]], rows)
        else:
            examples = self.examples(split.train[rows], split.given[rows], rows)
        batches = mo.Shuffled(examples, config.batch_size, seed)
        torch.manual_seed(seed)
        trained = config.layers
        model: nn.Module = self.encoder.classifier(CLASSES, trained)
        if config.lora:
            model = add_adapters(model)
        lr = config.learning_rates[run.rate]
        if run.method not in RULES:
            return Learner(config, model, lr, batches)
        clean = self.examples(split.clean, self.truth[split.clean], torch.arange(config.clean))
        clean_batches = mo.Shuffled(clean, min(config.clean_batch, config.clean), seed)
        return MetaWeightNet(config, model, lr, RULES[run.method], batches, clean_batches)

    def examples(self, rows: Tensor, labels: Tensor, places: Tensor) -> Any:
        """Return (sentences, labels, places), where sentences are those in these rows."""
        return Sentences(*(leaf[rows] for leaf in self.sentences)), labels, places

    def step(self) -> dict[str, float]:
        index, done = divmod(self.now["step"], self.config.lengths[-1])
        run = self.runs[index]
        if not done and index:
            self.training = self.begin(run)
        before = time.process_time()
        self.training.step()
        self.now["seconds"][index] += time.process_time() - before
        self.now["step"] += 1
        if done + 1 not in self.config.lengths:
            return {}
        at = self.config.lengths.index(done + 1)
        self.now["judged"][index, at] = self.judge(run)
        if done + 1 == self.config.lengths[-1] and isinstance(self.training, MetaWeightNet):
            split = self.splits[run.seed]
            losses = F.cross_entropy(self.logits(split.train), split.given, reduction="none")
            weights = self.training.weigh(losses, split.given)
            self.now["seen"][str(index)] = torch.stack([losses, weights])
        rate = self.config.learning_rates[run.rate]
        return {f"{run.method}/rate {rate:g}": self.now["judged"][index, at, 0].item()}

    def judge(self, run: Run) -> Tensor:
        """Return test accuracy, number of right clean examples, and the sum of their losses."""
        split = self.splits[run.seed]
        clean = split.clean
        if run.method == "clean only":
            clean = clean[torch.arange(len(clean)) % FOLDS == run.fold]  # none of the last one
        logits, labels = self.logits(clean), self.truth[clean]
        right = (logits.argmax(1) == labels).sum()
        accuracy = torch.tensor(torch.nan)
        if run.fold == FOLDS:
            accuracy = (self.logits(split.test).argmax(1) == self.truth[split.test]).float().mean()
        losses = F.cross_entropy(logits, labels, reduction="sum")
        return torch.stack([accuracy, right.float(), losses])

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        """Return the present model's logits of snippets, [n, 2]; those of one length together."""
        lengths = self.sentences.mask[rows].sum(1)
        logits = torch.empty(len(rows), CLASSES)
        for part in lengths.argsort().split(AT_ONCE) if len(rows) else ():
            longest = int(lengths[part].max())
            logits[part] = self.training.logits(
                Sentences(*(leaf[rows[part], :longest] for leaf in self.sentences))
            )
        return logits

    def results(self) -> dict[str, Result]:
        """Return what each method's trainings gave on the grid."""
        found, places = {}, {}
        for index, run in enumerate(self.runs):
            places.setdefault(run.method, []).append(index)
        shape = (self.config.seeds, len(self.config.learning_rates), -1, len(self.config.lengths))
        for method, rows in places.items():
            accuracy, right, losses = self.now["judged"][rows].view(*shape, 3).unbind(-1)
            mean_loss = losses.sum(2) / self.config.clean
            score = right.sum(2) + torch.nan_to_num(torch.exp(-mean_loss), nan=0.0)
            found[method] = Result(accuracy[:, :, -1], score, [])
        return found

    def seen(self, method: str, result: Result) -> list[Seen]:
        """Return the training set of each seed after the long training at its tuned rate."""
        found = []
        for seed, (rate, _) in enumerate(result.choose(longest=True).tolist()):
            index = self.runs.index(Run(method, seed, rate, FOLDS))
            losses, weights = self.now["seen"][str(index)]
            split = self.splits[seed]
            found.append(Seen(losses, weights, split.wrong, split.given, split.train))
        return found

    def seconds(self, method: str) -> float:
        """Return the mean CPU time of a method's step."""
        rows = [index for index, run in enumerate(self.runs) if run.method == method]
        return self.now["seconds"][rows].mean().item() / self.config.lengths[-1]

    def state_dict(self) -> dict[str, Any]:
        return {**self.now, "training": self.training.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.now = {name: state[name] for name in self.now}
        last = max(self.now["step"] - 1, 0)  # the run that the state is of
        self.training = self.begin(self.runs[last // self.config.lengths[-1]])
        self.training.load_state_dict(state["training"])
