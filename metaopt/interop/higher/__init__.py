"""Programs written for `higher`: what they need to change is the import line.

    from metaopt.interop import higher

    with higher.innerloop_ctx(model, opt) as (fmodel, diffopt):
        for x, y in data:
            diffopt.step(loss_fn(fmodel(x), y))
        meta_loss = loss_fn(fmodel(x_query), y_query)

Names and meanings are those of higher 0.2.1. The results differ where it departs from `torch.optim`
or from the true derivative: the betas of Adam and the options of ASGD can be learned, `eps` stands
where torch has it, `maximize` is obeyed, frozen parameters stay frozen at test time, hooks of the
model run, and a call that raises changes nothing. A step whose loss does not depend on the fast
weights is an error.

Reference:
    Grefenstette et al. 2019, arXiv:1910.01727.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from metaopt.interop.higher import optim, patch
from metaopt.interop.higher import tensors as utils
from metaopt.interop.higher.differentiable import Override
from metaopt.interop.higher.optim import (
    DifferentiableOptimizer,
    apply_trainable_opt_params,
    create_diff_optim,
    get_diff_optim,
    get_trainable_opt_params,
    register_optim,
)
from metaopt.interop.higher.patch import PatchedModule, make_functional, monkeypatch

__all__ = [
    "apply_trainable_opt_params",
    "create_diff_optim",
    "get_diff_optim",
    "get_trainable_opt_params",
    "innerloop_ctx",
    "make_functional",
    "monkeypatch",
    "optim",
    "patch",
    "register_optim",
    "utils",
]


@contextmanager
def innerloop_ctx(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    override: Override | None = None,
    track_higher_grads: bool = True,
) -> Iterator[tuple[PatchedModule, DifferentiableOptimizer]]:
    """Yield (fmodel, diffopt): the model and its live optimizer, going on as values in a graph.

    Args:
        model: any module; it is not changed.
        opt: an optimizer of its parameters, or of some; groups and memory are read, nothing is
            changed.
        device: see `monkeypatch`.
        copy_initial_weights: see `monkeypatch`; False is what MAML wants.
        override: see `DifferentiableOptimizer`.
        track_higher_grads: False for test time: no graph is kept from one step to the next.

    Cost:
        A step: one gradient, and the graph of the update. All parameters and activations so far
        stay in memory.
    """
    fmodel = monkeypatch(model, device, copy_initial_weights, track_higher_grads)
    yield (
        fmodel,
        get_diff_optim(opt, model.parameters(), fmodel, device, override, track_higher_grads),
    )
