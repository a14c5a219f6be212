"""Run the demo, the examples and the scripts, and keep what they print in a file.

    python scripts/record_results.py                # all of them, some two hours of one core
    python scripts/record_results.py reweighting    # one of them anew
    python scripts/record_results.py omniglot --omniglot images_background_small1.zip

The figures of docs/pages/results.md come from that file, benchmarks/programs.json: a test compares
them with it.
"""

from __future__ import annotations

import json
import os
import shlex
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
TRAIN = "scripts/train_optimizer.py --out {out}"
EVALUATE = "scripts/evaluate.py --weights {out}/weights.safetensors --out {out} --task"
MLP = f"{TRAIN} --optimizer mlp --task digits"
LSTM = f"{TRAIN} --optimizer lstm --task quadratics"
ON_QUADRATICS = f"{EVALUATE} quadratics --seeds 512 --tuning-seeds 512"
IN_OTHER_DIMENSIONS = [f"{EVALUATE} quadratics-20 --seeds 512", f"{EVALUATE} quadratics-50"]
WHOLE = "--steps 400 --window 50 --finish 0 --second-order False"
WINDOWS = "--finish 0"
ONE_PHASE = "--finish 0 --validate-every 100"
LSTM_RECIPES = {  # 26,000 inner steps each, as the recipe has
    "5": f"--steps 5200 --window 5 {ONE_PHASE}",
    "10": f"--steps 2600 --window 10 {ONE_PHASE}",
    "20": f"--steps 1300 --window 20 {ONE_PHASE}",
    "20-unbounded": f"--steps 1300 --window 20 --clip 1e9 {ONE_PHASE}",
    "5-constant": f"--steps 5200 --window 5 --second-order False {ONE_PHASE}",
    "20-constant": f"--steps 1300 --window 20 --second-order False {ONE_PHASE}",
}
DIGITS = "scripts/meta_weight_net.py --out {out}"
LANGUAGE = "scripts/language_model.py --memory full --out {out}"
SEARCH = "scripts/search.py meta-weight-net --out {out}"
TWO_PROCESSES = "-m torch.distributed.run --nproc-per-node 2 scripts/scaling.py"
PROGRAMS = {
    "demo": [MLP, f"{EVALUATE} digits"],
    "digits-deep": [MLP, f"{EVALUATE} digits-deep"],
    **{f"mlp-whole-{n}": [f"{MLP} {WHOLE} --seed {n}", f"{EVALUATE} digits"] for n in (0, 1)},
    **{f"mlp-windows-{n}": [f"{MLP} {WINDOWS} --seed {n}", f"{EVALUATE} digits"] for n in range(3)},
    **{f"mlp-{n}": [f"{MLP} --seed {n}", f"{EVALUATE} digits"] for n in (1, 2)},
    "quadratics": [
        f"{LSTM} --steps 12000 --hidden-size 20 --batch 128 --clip 1e9 --finish 0 "
        "--validate-every 200",
        ON_QUADRATICS,
        *IN_OTHER_DIMENSIONS,
    ],
    "lstm": [LSTM, ON_QUADRATICS, *IN_OTHER_DIMENSIONS],
    **{f"lstm-{n}": [f"{LSTM} {way}", ON_QUADRATICS] for n, way in LSTM_RECIPES.items()},
    "stress": ["scripts/evaluate.py --task stress --trained small --out {out}"],
    "train_schedule": ["scripts/train_schedule.py --out {out}"],
    "maml": ["scripts/maml.py sinusoid --compile --out {out}"],
    "omniglot": ["scripts/maml.py omniglot --data {omniglot} --out {out}"],
    "meta_weight_net": [DIGITS],
    "meta_weight_net-60": [f"{DIGITS} --noise 0.6"],
    "meta_weight_net-tail": [f"{DIGITS} --noise 0 --imbalance 50"],
    "meta_weight_net-class": [f"{DIGITS} --noise 0 --imbalance 50 --weight-input 'loss and class'"],
    "language_model": [LANGUAGE],
    "language_model-long": [f"{LANGUAGE} --static-steps 180 --seeds 0"],
    "branin": ["scripts/search.py branin --backends random sobol optuna botorch ax --out {out}"],
    "search": [f"{SEARCH} --trials {trials}" for trials in (20, 40)],
    "search-5": [
        f"{SEARCH} --seed 5 --backends random botorch --trials {trials}" for trials in (20, 40)
    ],
    "scaling": ["scripts/scaling.py"],
    **{
        f"scaling-{what}": [f"{TWO_PROCESSES} --{what}"]
        for what in ("measure", "speed-up", "overlap")
    },
    **{
        path.stem: [f"examples/{path.name}"]
        for path in sorted((ROOT / "examples").glob("[!_]*.py"))
    },
}


@dataclass(frozen=True)
class Config:
    """Which programs."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of programs, those of examples by their files' names; by default all of them."""
    omniglot: Path | None = None
    """A folder or archive of Omniglot's images, which the program "omniglot" needs."""

    def __post_init__(self) -> None:
        unknown = {*self.names} - PROGRAMS.keys()
        if unknown:
            raise ValueError(f"`names` must be some of {[*PROGRAMS]}, got {sorted(unknown)}.")
        if self.omniglot is None and "omniglot" in (self.names or PROGRAMS):
            raise ValueError(
                'The program "omniglot" needs images of characters: --omniglot FOLDER_OR_ZIP. '
                "Without them, name the others."
            )


def main(config: Config) -> None:
    for name in tqdm(config.names or tuple(PROGRAMS)):
        found = run(PROGRAMS[name], config.omniglot)
        # another process may have written others meanwhile
        everything = json.loads(FILE.read_text()) if FILE.exists() else {}
        everything[name] = found
        text = json.dumps(dict(sorted(everything.items())), indent=1, ensure_ascii=False)
        FILE.write_text(f"{text}\n")


def run(commands: list[str], omniglot: Path | None) -> dict[str, Any]:
    """Return what the commands print, with what made it."""
    started, printed = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as out:
        for command in commands:
            process = subprocess.run(
                [sys.executable, *shlex.split(command.format(out=out, omniglot=omniglot))],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            printed += process.stdout.replace(out, "FOLDER").splitlines()
    commit = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "commands": [
            command.format(out="FOLDER", omniglot="FOLDER_OR_ZIP") for command in commands
        ],
        "printed": [line.replace(str(omniglot), "FOLDER_OR_ZIP") for line in printed],
        "seconds": round(time.perf_counter() - started),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": subprocess.check_output(commit, cwd=ROOT, text=True).strip(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
