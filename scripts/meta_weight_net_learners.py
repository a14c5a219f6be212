"""What `meta_weight_net.py text` trains: a classifier, plainly or with a weight net."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt as mo
from metaopt import tree
from metaopt.tasks.sentences import Sentences
from optimizers import Adam, AdamW

CLASSES = 2


class Learner:
    """The learner's steps: AdamW on the mean cross-entropy of a minibatch.

    Args:
        config: of the script.
        model: of sentences, to logits; it has the present parameters.
        lr: learning rate.
        batches: (sentences, labels, places in the training set).
    """

    def __init__(self, config: Any, model: nn.Module, lr: float, batches: Any):
        self.net, self.optimizer, self.batches = mo.functional(model), AdamW(lr), batches
        self.precision = precision(config)
        params = tree.map(Tensor.detach, self.net.params)
        self.now: dict[str, Any] = {
            "params": params,
            "opt_state": self.optimizer.init(params),
            "step": 0,
        }

    def loss(self, params: Any, batch: Any) -> Tensor:
        sentences, labels, _ = batch
        with autocast(self.precision):
            logits = self.net(params, *sentences)
        return F.cross_entropy(logits.float(), labels)

    @torch.no_grad()
    def step(self) -> dict[str, Any]:
        batch = self.batches.batch_at(self.now["step"])
        params, opt_state = self.now["params"], self.now["opt_state"]
        out = mo.minimize(self.loss, self.optimizer, params, batch, steps=1, opt_state=opt_state)
        self.now = {
            "params": out.params,
            "opt_state": out.opt_state,
            "step": self.now["step"] + 1,
        }
        return {"loss": out.losses[-1]}

    def logits(self, sentences: Sentences) -> Tensor:
        with autocast(self.precision):
            return self.net(self.now["params"], *sentences).float()

    def state_dict(self) -> dict[str, Any]:
        return self.now

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.now = state


class MetaWeightNet:
    """A learner whose minibatch loss is sum_i v_i l_i / sum_i v_i, v_i = V(l_i, ...; theta).

    A step of it, and one of theta on clean examples: the two levels of a graph.

    Args:
        config: of the script.
        model: the learner.
        lr: its learning rate.
        rule: how the hypergradient is taken.
        batches: as those of a `Learner`.
        clean: the same of clean examples.
    """

    def __init__(
        self, config: Any, model: nn.Module, lr: float, rule: mo.Rule, batches: Any, clean: Any
    ):
        self.model, self.batches = model, batches
        self.sees_class = config.weight_input.endswith("class")
        self.sees_history = config.weight_input.startswith("history")
        inputs = 1 + CLASSES * self.sees_class + self.sees_history
        self.weights = nn.Sequential(
            nn.Linear(inputs, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid()
        )
        # of each training example: sum of its losses before a step with it, and their number
        self.history = torch.zeros(batches.count, 2)
        self.precision, self.done = precision(config), 0
        learner = mo.Level(
            "learner", model, self.learner_loss, AdamW(lr), data=self, precision=self.precision
        )
        weights = mo.Level(
            "weights",
            self.weights,
            self.meta_loss,
            Adam(config.weight_lr),
            data=clean,
            warmup=config.warmup,
            precision=self.precision,
        )
        self.graph = mo.LevelGraph([mo.Edge(weights, learner, differentiate=rule)])

    def batch_at(self, number: int) -> Any:
        """Return the minibatch, and what has been seen of its examples before."""
        sentences, labels, rows = self.batches.batch_at(number)
        return sentences, labels, self.history[rows]

    def __iter__(self) -> Any:
        raise TypeError("These batches depend on what was learned; ask for `batch_at`.")

    def look(self, losses: Tensor, labels: Tensor, history: Tensor) -> Tensor:
        """Return what the weight net sees of examples, [n, inputs]; all of it is constant."""
        losses = losses.detach().float()
        seen = [losses]
        if self.sees_history:
            # its first time an example has no history but its present loss
            seen.append(torch.where(history[:, 1] > 0, history[:, 0] / history[:, 1], losses))
        columns = torch.stack(seen, 1)
        if self.sees_class:
            columns = torch.cat([columns, F.one_hot(labels, CLASSES).float()], 1)
        return columns

    def learner_loss(self, levels: mo.Levels, batch: Any) -> Tensor:
        sentences, labels, history = batch
        logits = levels.learner(*sentences).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        weights = levels.weights(self.look(losses, labels, history)).float().squeeze(1)
        return (weights * losses).sum() / weights.sum()

    def meta_loss(self, levels: mo.Levels, batch: Any) -> Tensor:
        sentences, labels, _ = batch
        return F.cross_entropy(levels.learner(*sentences).float(), labels)

    def step(self) -> Mapping[str, Any]:
        if self.sees_history:
            sentences, labels, rows = self.batches.batch_at(self.done)
            losses = F.cross_entropy(self.logits(sentences), labels, reduction="none")
            self.history[rows] += torch.stack([losses, torch.ones_like(losses)], 1)
        self.done += 1
        return self.graph.step()

    @torch.no_grad()
    def logits(self, sentences: Sentences) -> Tensor:
        with autocast(self.precision):
            return self.model(*sentences).float()

    @torch.no_grad()
    def weigh(self, losses: Tensor, labels: Tensor) -> Tensor:
        """Return the weights of the whole training set over their mean."""
        weights = self.weights(self.look(losses, labels, self.history)).squeeze(1)
        return weights / weights.mean()

    def state_dict(self) -> dict[str, Any]:
        return {"graph": self.graph.state_dict(), "history": self.history, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.done = state["history"].clone(), state["done"]
        self.graph.load_state_dict(state["graph"])


def precision(config: Any) -> torch.dtype | None:
    return torch.bfloat16 if config.precision == "bf16" else None


def autocast(dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def add_adapters(model: nn.Module) -> nn.Module:
    """Return the model with low-rank adapters in its attention; they and its head are trained.

    Raises:
        ModuleNotFoundError: peft is not installed.

    Reference:
        Hu et al. 2021, arXiv:2106.09685.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--lora needs peft, which is not installed: pip install peft", name=error.name
        ) from error
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(r=8, target_modules=["query", "value"]), model
    )
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("head."))
    return adapted.eval()
