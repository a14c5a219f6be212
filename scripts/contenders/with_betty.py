"""The comparison with Betty's engine, in the classes it asks for."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import Tensor

from contenders import problems
from contenders.by_hand import Run, again_and_again

BATCHES = 1000  # in its data loader, which is begun again when it ends


def meta_weight_net(problem: problems.MetaWeightNet) -> Run:
    """One step of the engine, with its rule "darts".

    Its version 0.1.1 leaves the learner displaced by one radius, which is put back before the next run like everything else.
    """
    logging.disable(logging.INFO)
    model, weights = problem.model(), problem.weights()
    noisy, clean = problem.data()

    class Learner(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return problems.weighted_loss(F.cross_entropy(self.module(x), y, reduction="none"), self.weights.module)

    class Weights(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.learner.module(x), y)

    inner = torch.optim.SGD(model.parameters(), problem.lr, momentum=problem.momentum)
    outer = torch.optim.Adam(weights.parameters(), problem.outer_lr)
    config = Config(type="darts", unroll_steps=1, darts_alpha=problem.radius)
    learner = Learner("learner", config, model, inner, train_data_loader=[noisy] * BATCHES, device="cpu")
    above = Weights("weights", Config(retain_graph=True), weights, outer, train_data_loader=[clean] * BATCHES, device="cpu")
    engine = Engine(
        problems=[learner, above], config=EngineConfig(), dependencies={"u2l": {above: [learner]}, "l2u": {learner: [above]}}
    )
    engine.train()
    return again_and_again(engine.train_step, dict(weights.named_parameters()), list(model.parameters()), inner, outer)
