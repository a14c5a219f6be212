"""A script in several processes: `torchrun --nproc-per-node 2 scripts/train_optimizer.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import metaopt as mo


def run_on_ranks(main: Callable[[Any], Any], config: Any) -> None:
    """Run `main(config)` on this rank of the job, or alone if there is no other.

    All ranks come to the same result. Rank 0 shows it and writes it to `config.out`; what another
    writes goes to a folder of its own in there.
    """
    with mo.join_ranks() as ranks:
        if ranks.rank == 0:
            main(config)
            return
        out = config.out / f"rank{ranks.rank}"
        out.mkdir(parents=True, exist_ok=True)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            main(replace(config, out=out))
