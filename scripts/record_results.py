"""Run the demo and the examples, and keep what they print in benchmarks/programs.json.

    python scripts/record_results.py                # all of them, some 8 minutes of one core
    python scripts/record_results.py reweighting    # one of them anew

The figures of docs/pages/results.md come from that file: a test compares them with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from metaopt.extras import extra

with extra("scripts/record_results.py"):
    import tyro

ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks/programs.json"
DEMO = [
    "scripts/train_optimizer.py --optimizer mlp --task digits --out {out}",
    "scripts/evaluate.py --weights {out}/weights.safetensors --task digits --out {out}",
]
# name -> commands, of which the last one prints the result
PROGRAMS = {
    "demo": DEMO,
    **{
        path.stem: [f"examples/{path.name}"]
        for path in sorted((ROOT / "examples").glob("[!_]*.py"))
    },
}


@dataclass
class Config:
    """Which programs."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """"demo", or examples by the names of their files, without .py; by default all"""

    def __post_init__(self) -> None:
        unknown = {*self.names} - PROGRAMS.keys()
        if unknown:
            raise ValueError(f"`names` must be some of {[*PROGRAMS]}, got {sorted(unknown)}.")


def main(config: Config) -> None:
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    names = config.names or tuple(PROGRAMS)
    for name in tqdm(names):
        found[name] = run(PROGRAMS[name])
        text = json.dumps(dict(sorted(found.items())), indent=1, ensure_ascii=False)
        FILE.write_text(f"{text}\n")


def run(commands: list[str]) -> dict[str, Any]:
    """Return what the last of the commands prints, with what made it."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        for command in commands:
            process = subprocess.run(
                [sys.executable, *command.format(out=out).split()],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
        printed = process.stdout.replace(out, "FOLDER").splitlines()
    commit = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "commands": [command.format(out="FOLDER") for command in commands],
        "printed": printed,
        "seconds": round(time.perf_counter() - started),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": subprocess.check_output(commit, cwd=ROOT, text=True).strip(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
