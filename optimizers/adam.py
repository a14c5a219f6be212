"""Adam and AdamW."""

import torch
from torch import Tensor

from metaopt import tree
from metaopt.hyperparameter import Hyperparameter, Value, is_zero, set_hyperparameter
from metaopt.optimizer import Hyper, Leaves, Optimizer, Slots


class Adam(Optimizer):
    """m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;  u = -lr m^ / (sqrt(v^ + eps_root) + eps).

    m^ = m / (1 - beta1^t) and v^ = v / (1 - beta2^t). Equal to `torch.optim.Adam`; unlike it, the derivative with respect
    to the gradient is finite where v = 0 (there sqrt has derivative 0, and what remains is the exact 1 / eps at the first step).

    Args:
        lr: step size.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator.
        eps_root: added under the root; a positive value smooths the meta-gradient.
        weight_decay: coefficient of 1/2 |w|^2, added to the gradient.

    Raises:
        ValueError: a number out of range.

    Cost:
        Two copies of the parameters.

    Reference:
        Kingma and Ba, ICLR 2015, arXiv:1412.6980, algorithm 1.
    """

    hyperparameters = ("lr", "beta1", "beta2", "eps", "eps_root", "weight_decay")
    beta1: Hyperparameter
    beta2: Hyperparameter

    def __init__(
        self,
        lr: Hyperparameter = 1e-3,
        betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
        *,
        eps: Hyperparameter = 1e-8,
        eps_root: Hyperparameter = 0.0,
        weight_decay: Hyperparameter = 0.0,
    ):
        super().__init__()
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"{type(self).__name__}: `betas` must be a pair, got {betas!r}. Write betas=(0.9, 0.999).")
        set_hyperparameter(self, "lr", lr)
        set_hyperparameter(self, "beta1", betas[0], below=1.0)
        set_hyperparameter(self, "beta2", betas[1], below=1.0)
        set_hyperparameter(self, "eps", eps)
        set_hyperparameter(self, "eps_root", eps_root)
        set_hyperparameter(self, "weight_decay", weight_decay)

    @property
    def betas(self) -> tuple[Hyperparameter, Hyperparameter]:
        """The decays of the two moments."""
        return self.beta1, self.beta2

    def slots(self, params: Leaves) -> Slots:
        return {"mean": [torch.zeros_like(p) for p in params], "square": [torch.zeros_like(p) for p in params]}

    def update(self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor) -> tuple[Leaves, Slots]:
        if not is_zero(hyper["weight_decay"]):
            params = self._require_params(params, f"weight_decay={hyper['weight_decay']}")
            grads = [g + hyper["weight_decay"] * p for g, p in zip(grads, params, strict=True)]
        return self._adam(grads, slots, hyper, step)

    @staticmethod
    def _adam(grads: Leaves, slots: Slots, hyper: Hyper, step: Tensor) -> tuple[Leaves, Slots]:
        beta1, beta2 = hyper["beta1"], hyper["beta2"]
        mean = [beta1 * m + (1 - beta1) * g for m, g in zip(slots["mean"], grads, strict=True)]
        square = [beta2 * v + (1 - beta2) * g * g for v, g in zip(slots["square"], grads, strict=True)]
        rate = hyper["lr"] / bias_correction(beta1, step, grads[0])
        unbias = 1 / bias_correction(beta2, step, grads[0])
        updates = [
            -rate * m / (tree.safe_sqrt(v * unbias + hyper["eps_root"]) + hyper["eps"]) for m, v in zip(mean, square, strict=True)
        ]
        return updates, {"mean": mean, "square": square}


class AdamW(Adam):
    """Adam with decoupled weight decay: u = -lr (m^ / (sqrt(v^ + eps_root) + eps) + weight_decay w).

    Equal to `torch.optim.AdamW`. Arguments, cost and errors as for `Adam`.

    Reference:
        Loshchilov and Hutter, ICLR 2019, arXiv:1711.05101, algorithm 2.
    """

    def __init__(
        self,
        lr: Hyperparameter = 1e-3,
        betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
        *,
        eps: Hyperparameter = 1e-8,
        eps_root: Hyperparameter = 0.0,
        weight_decay: Hyperparameter = 1e-2,
    ):
        super().__init__(lr, betas, eps=eps, eps_root=eps_root, weight_decay=weight_decay)

    def update(self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor) -> tuple[Leaves, Slots]:
        updates, after = self._adam(grads, slots, hyper, step)
        if not is_zero(hyper["weight_decay"]):
            params = self._require_params(params, f"weight_decay={hyper['weight_decay']}")
            updates = [u - hyper["lr"] * hyper["weight_decay"] * p for u, p in zip(updates, params, strict=True)]
        return updates, after


def bias_correction(beta: Value, step: Tensor, like: Tensor) -> Tensor:
    """Return 1 - beta^step in float64 if `like` is, else in float32; differentiable in beta."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    base = torch.as_tensor(beta, dtype=dtype, device=step.device)
    return 1 - base ** step.to(dtype)
