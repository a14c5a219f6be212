"""What a few-shot task is."""

from __future__ import annotations

from typing import NamedTuple

from metaopt.tree import Tree


class Episode(NamedTuple):
    """A task as two batches: adapt on `support`, be judged on `query`.

    A batch of tasks is one `Episode` whose leaves have the leading axis tasks, as `mo.meta_grad`
    takes it.
    """

    support: Tree
    query: Tree
