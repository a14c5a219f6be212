"""Run the demo, the examples and some scripts, and keep what they print in a file.

    python scripts/record_results.py                # all of them, some 27 minutes of one core
    python scripts/record_results.py reweighting    # one of them anew

The figures of docs/pages/results.md come from that file, benchmarks/programs.json: a test compares
them with it.
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
EVALUATE = "scripts/evaluate.py --weights {out}/weights.safetensors --out {out} --task"
QUADRATICS = [
    "scripts/train_optimizer.py --optimizer lstm --task quadratics --steps 12000 --hidden-size 20 "
    "--batch 128 --clip 1e9 --finish 0 --validate-every 200 --out {out}",
    f"{EVALUATE} quadratics --seeds 512 --tuning-seeds 512",
    f"{EVALUATE} quadratics-20 --seeds 512",
    f"{EVALUATE} quadratics-50",
]
# name -> commands; those after the first, or the only one, print the result
PROGRAMS = {
    "demo": DEMO,
    "digits-deep": [DEMO[0], f"{EVALUATE} digits-deep"],
    "quadratics": QUADRATICS,
    "train_schedule": ["scripts/train_schedule.py --out {out}"],
    "maml": ["scripts/maml.py sinusoid --compile --out {out}"],
    "meta_weight_net": ["scripts/meta_weight_net.py --out {out}"],
    "meta_weight_net-60": ["scripts/meta_weight_net.py --noise 0.6 --out {out}"],
    "meta_weight_net-tail": [
        "scripts/meta_weight_net.py --noise 0 --imbalance 50 --out {out}",
    ],
    **{
        path.stem: [f"examples/{path.name}"]
        for path in sorted((ROOT / "examples").glob("[!_]*.py"))
    },
}


@dataclass
class Config:
    """Which programs."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """the demo, "digits-deep", "quadratics", or programs by their files' names; by default all"""

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
    """Return what the commands after the first print, or the only one, with what made it."""
    started, outputs = time.perf_counter(), []
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
            outputs.append(process.stdout.replace(out, "FOLDER").splitlines())
    commit = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "commands": [command.format(out="FOLDER") for command in commands],
        "printed": [line for lines in outputs[1:] or outputs for line in lines],
        "seconds": round(time.perf_counter() - started),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": subprocess.check_output(commit, cwd=ROOT, text=True).strip(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
