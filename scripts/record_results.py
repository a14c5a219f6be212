"""Run the demo, the examples and the scripts, and keep what they print in a file.

    python scripts/record_results.py reweighting    # one of them
    # all of them, some three hours of one core
    python scripts/record_results.py --omniglot images.zip --texts vaderSentiment-3.3.2.tar.gz

The figures of docs/pages/results come from that file, benchmarks/programs.json: a test compares
them with it. What stands on a page between `<!-- printed: NAME -->` and `<!-- /printed: NAME -->`
is written anew.
"""

from __future__ import annotations

import json
import os
import re
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
    from bench_report import find_commit

ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks/programs.json"
PAGES = ROOT / "docs/pages"
DATA = ("omniglot", "texts")
NAMES = {"out": "FOLDER", "omniglot": "FOLDER_OR_ZIP", "texts": "ARCHIVE"}  # as the file has them
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
TEXTS = "scripts/meta_weight_net.py text --data {texts} --out {out}"
WEIGHTS = f"{TEXTS} --seeds 2 --methods 'finite differences' SAMA"
INPUTS = {  # of the weight net, on seeds that no table has
    name: f"{TEXTS} --seed 100 --methods plain 'finite differences' --weight-input '{name}'"
    for name in ("loss", "loss and class", "history", "history and class")
}
LANGUAGE = "scripts/language_model.py --memory full --out {out}"
ATTRIBUTION = "scripts/data_attribution.py"
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
    "texts": [f"{WEIGHTS} --flip positive"],
    "texts-both": [WEIGHTS],
    **{f"texts-{name.replace(' ', '-')}": [command] for name, command in INPUTS.items()},
    **{
        f"domains-{target}": [f"examples/domains.py --data {{texts}} --target {target}"]
        for target in ("tweets", "amazon")
    },
    "language_model": [LANGUAGE],
    "language_model-long": [f"{LANGUAGE} --static-steps 150 --seeds 0"],
    "attribution": [f"{ATTRIBUTION} digits --out {{out}}"],
    "attribution-rough": [
        f"{ATTRIBUTION} digits --out {{out}} --lr 0.3 --other-seeds 0 --dampings 0.001 0.01 0.1"
    ],
    "attribution-language": [f"{ATTRIBUTION} language --out {{out}}"],
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
    """A folder or archive of Omniglot's images, for "omniglot"."""
    texts: Path | None = None
    """The archive of rated snippets, for those that begin with "texts", and "domains-..."."""

    def __post_init__(self) -> None:
        unknown = {*self.names} - PROGRAMS.keys()
        if unknown:
            raise ValueError(f"`names` must be some of {[*PROGRAMS]}, got {sorted(unknown)}.")
        for name in self.names or PROGRAMS:
            for option in DATA:
                if f"{{{option}}}" in PROGRAMS[name][0] and getattr(self, option) is None:
                    raise ValueError(
                        f"The program {name!r} needs data: --{option} PATH. Without them, name the "
                        "others."
                    )


def main(config: Config) -> None:
    data = {name: path for name in DATA if (path := getattr(config, name)) is not None}
    commit = find_commit()  # before what is written here changes the tree
    try:
        for name in tqdm(config.names or tuple(PROGRAMS)):
            found = run(PROGRAMS[name], data) | {"commit": commit}
            # another process may have written others meanwhile
            everything = json.loads(FILE.read_text()) if FILE.exists() else {}
            everything[name] = found
            text = json.dumps(dict(sorted(everything.items())), indent=1, ensure_ascii=False)
            write(FILE, f"{text}\n")
    finally:  # also of those before one that failed
        for page in PAGES.rglob("*.md"):
            old = page.read_text()
            if (new := show_printed(old)) != old:
                write(page, new)


def write(path: Path, text: str) -> None:
    """Replace a file at once, so that nobody reads a half."""
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(text)
    fresh.replace(path)


def show_printed(text: str) -> str:
    """Return a page with what programs printed, tables in Markdown, between their markers."""
    everything = json.loads(FILE.read_text())

    def show(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        printed = everything.get(name, {}).get("printed", [])
        return "\n".join([begin, *printed, end])

    pattern = r"(<!-- printed: (.+?) -->)\n.*?(<!-- /printed: \2 -->)"
    return re.sub(pattern, show, text, flags=re.DOTALL)


def run(commands: list[str], data: dict[str, Path]) -> dict[str, Any]:
    """Return what the commands print, with what made it; places are called by their names."""
    started, printed = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as out:
        places = {"out": out} | {name: str(path.resolve()) for name, path in data.items()}
        for command in commands:
            process = subprocess.run(
                [sys.executable, *(word.format(**places) for word in shlex.split(command))],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            printed += process.stdout.splitlines()
    for name, place in places.items():
        printed = [line.replace(place, NAMES[name]) for line in printed]
    return {
        "commands": [command.format(**NAMES) for command in commands],
        "printed": printed,
        "seconds": round(time.perf_counter() - started),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
