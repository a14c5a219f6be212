"""The comparison on a large model: sizes, data, and what all sides compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contenders.problems import MetaWeightNet

STEPS_BEFORE, SQUARE_BEFORE = 10, 1e-8  # of the memory that every run begins with


@dataclass(frozen=True)
class Scale:
    """One iteration of meta-weight-net on a pretrained transformer's size.

    A step of AdamW on sentences, the hypergradient by finite differences ("darts") or
    preconditioned by the optimizer ("sama"), a step of the weights. By default MiniLM's sizes with
    random weights, 22.7 million parameters; what is below a layer may be frozen.
    """

    rule: Literal["darts", "sama"]
    batch: int = 16
    length: int = 32
    frozen: int = 0
    width: int = 384
    layers: int = 6
    vocabulary: int = 30_522
    hidden: int = 100
    lr: float = 5e-5
    outer_lr: float = 1e-3
    radius: float = 0.01
    steps: int = 1
    folder: str | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return Classifier(self)

    def weights(self) -> nn.Module:
        """Return the network that gives an example a weight, from its loss."""
        return MetaWeightNet(hidden=self.hidden).weights()

    def data(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return a batch of (words, labels) for the learner and one for the weights.

        They have the same words: a displacement is then of what the batch sees.
        """
        generator = torch.Generator().manual_seed(2)
        size = (self.batch, self.length)
        words = torch.randint(self.vocabulary, size, generator=generator)
        noisy, clean = torch.randint(2, (2, self.batch), generator=generator)
        return (words, noisy), (words.flip(1), clean)


class Classifier(nn.Module):
    """A transformer of `transformers`, and two classes on the mean of what it says of the words."""

    def __init__(self, problem: Scale):
        super().__init__()
        import transformers  # which takes 2 s, and other comparisons do without

        if problem.folder is None:
            # dropout would be drawn in another order by every side
            config = transformers.BertConfig(
                vocab_size=problem.vocabulary,
                hidden_size=problem.width,
                num_hidden_layers=problem.layers,
                num_attention_heads=max(problem.width // 32, 1),
                intermediate_size=4 * problem.width,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
            self.encoder = transformers.BertModel(config, add_pooling_layer=False)
        else:
            self.encoder = transformers.AutoModel.from_pretrained(problem.folder).eval()
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)
        unused = getattr(self.encoder, "pooler", None)
        if unused is not None:
            unused.requires_grad_(False)
        if problem.frozen:
            self.encoder.embeddings.requires_grad_(False)
            self.encoder.encoder.layer[: problem.frozen].requires_grad_(False)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=words).last_hidden_state.mean(1))


def adam_slopes(
    grads: Sequence[Tensor], memory: Sequence[dict[str, Tensor]], group: dict[str, Any]
) -> list[Tensor]:
    """Return the derivative of Adam's last update in each entry of the gradient.

    Args:
        grads: the gradients of that step.
        memory: what `torch.optim.AdamW` remembers of each parameter after it.
        group: its options.
    """
    (beta1, beta2), found = group["betas"], []
    for g, state in zip(grads, memory, strict=True):
        t = state["step"]
        root = state["exp_avg_sq"].div(1 - beta2**t).sqrt_()
        below = root + group["eps"]
        slope = state["exp_avg"].mul(g).div_(root.mul_(below)).nan_to_num_(0.0)  # where g is 0
        slope.mul_(-(1 - beta2) / (1 - beta2**t)).add_(1 - beta1).div_(below)
        found.append(slope.mul_(-group["lr"] / (1 - beta1**t)))
    return found


def age(memory: Sequence[dict[str, Tensor]]) -> None:
    """Make the memory of `torch.optim.AdamW` that of some steps with gradients of usual sizes.

    At its first step Adam moves by the sign of the gradient, whose derivative is 0.
    """
    for state in memory:
        state["step"].fill_(STEPS_BEFORE)
        state["exp_avg_sq"].fill_(SQUARE_BEFORE)
