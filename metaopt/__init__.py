"""Optimisation that learns: differentiable inner loops, meta-gradients and learned optimizers on top of `torch.func`."""

from metaopt.differentiate import Backprop, FirstOrder
from metaopt.errors import NonFiniteError
from metaopt.functional import Functional, functional
from metaopt.meta_grad import assign_grads, meta_grad
from metaopt.minimize import Minimized, minimize
from metaopt.optimizer import Optimizer, apply_updates
from metaopt.schedule import Schedule
