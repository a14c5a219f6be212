"""A script in several processes: `torchrun --nproc-per-node 2 scripts/train_optimizer.py`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import metaopt as mo


def run_on_ranks(main: Callable[[Any], Any], config: Any, *, shares: bool = True) -> None:
    """Run `main(config)` on this rank of the job, or alone if there is no other.

    All ranks come to the same result. Rank 0 shows it and writes it to `config.out`; what another
    writes goes to a folder of its own in there.

    Args:
        main: does the work.
        config: of the run.
        shares: whether its work can be shared; if not, rank 0 does it, and says so.
    """
    if not shares:
        if is_first_rank():
            if os.environ.get("WORLD_SIZE", "1") != "1":
                text = "Nothing here can be shared: one process works, the others have ended."
                print(text, file=sys.stderr)
            main(config)
        return
    with mo.join_ranks() as ranks:
        if ranks.rank == 0:
            main(config)
            return
        out = config.out / f"rank{ranks.rank}"
        out.mkdir(parents=True, exist_ok=True)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            main(replace(config, out=out))


def is_first_rank() -> bool:
    """Return True in the process that shows what the others have too; asked before they join."""
    return os.environ.get("RANK", "0") == "0"
