"""Damaging a labelled data set on purpose: wrong labels and unequal classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stratified_split(
    labels: Tensor, sizes: Sequence[int], generator: torch.Generator
) -> list[Tensor]:
    """Return disjoint random parts with exactly sizes[i] examples of every class.

    The last part is everything that is left.

    Args:
        labels: class of each example, [n], int64.
        sizes: examples of each class in each part.
        generator: source of the randomness.

    Returns:
        `len(sizes) + 1` tensors of indices into `labels`, each grouped by class.

    Raises:
        ValueError: a class has fewer than sum(sizes) examples.
    """
    parts: list[list[Tensor]] = [[] for _ in range(len(sizes) + 1)]
    for label in labels.unique():
        members = torch.nonzero(labels == label).squeeze(1)
        if len(members) < sum(sizes):
            raise ValueError(
                f"`sizes` must add up to at most the {len(members)} examples of class {label}, got "
                f"{tuple(sizes)}."
            )
        shuffled = members[torch.randperm(len(members), generator=generator)]
        for part, chosen in zip(
            parts, shuffled.split([*sizes, len(members) - sum(sizes)]), strict=True
        ):
            part.append(chosen)
    return [torch.cat(part) for part in parts]


def flip_labels(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """Return a copy in which exactly round(share n) labels are wrong.

    A wrong label is another class, each of the others equally likely.

    This is symmetric noise; "uniform" noise that may also hit the true class has the wrong share (1
    - 1 / classes) share.

    Args:
        labels: [n], int64, in 0 ... classes - 1.
        share: share of wrong labels, in [0, 1).
        classes: number of classes.
        generator: source of the randomness.

    Raises:
        ValueError: `share` outside [0, 1), or fewer than two classes.

    Reference:
        Zhang, Bengio, Hardt, Recht, Vinyals 2017, arXiv:1611.03530, section 2.
    """
    if not 0 <= share < 1:
        raise ValueError(
            f"`share` of wrong labels must lie in [0, 1), got {share}. Write 0.4 for 40 %."
        )
    if classes < 2:
        raise ValueError(
            f"`classes` must be at least 2, got {classes}. With one class no label can be wrong."
        )
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    offset = torch.randint(1, classes, (len(wrong),), generator=generator)
    return labels.index_put((wrong,), (labels[wrong] + offset) % classes)


def long_tail(labels: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    """Return indices of a random subset whose class sizes fall exponentially from m to m / ratio.

    The class of rank k = 0 ... C - 1 keeps round(m ratio^(-k / (C - 1))) examples, where m is the
    size of the smallest class; the ranks are drawn at random.

    Args:
        labels: class of each example, [n], int64.
        ratio: size of the largest class over that of the smallest, from 1 to m.
        generator: source of the randomness.

    Raises:
        ValueError: `ratio` below 1, or so large that the smallest class would be empty.

    Reference:
        Cui, Jia, Lin, Song, Belongie 2019, arXiv:1901.05555, section 5.1.
    """
    present, counts = labels.unique(return_counts=True)
    largest, last = min(counts.tolist()), max(len(present) - 1, 1)
    if not 1 <= ratio <= largest:
        raise ValueError(
            f"`ratio` of the largest to the smallest class must lie in [1, {largest}], got "
            f"{ratio}. The largest class can have {largest} examples and the smallest must keep "
            "one. Write 50 for 1:50."
        )
    kept = []
    for rank, label in enumerate(present[torch.randperm(len(present), generator=generator)]):
        members = torch.nonzero(labels == label).squeeze(1)
        size = round(largest * ratio ** (-rank / last))
        kept.append(members[torch.randperm(len(members), generator=generator)[:size]])
    return torch.cat(kept)
