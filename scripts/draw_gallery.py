"""Draw the pictures of docs/pages/gallery.md from what the programs leave in their run folders.

    python scripts/draw_gallery.py                      # draws what has been run
    python scripts/draw_gallery.py maml reptile --run   # runs these two before, then draws them
    python scripts/draw_gallery.py --run                # runs everything that is missing, 8 minutes

Each program runs with the options given here. What it prints goes to output.txt in its folder, and
a program that has this file is not run again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gallery_pictures as pictures
from gallery_plots import save, use_style

from metaopt.extras import extra

with extra("scripts/draw_gallery.py"):
    import tyro

ROOT = Path(__file__).parents[1]


@dataclass
class Config:
    """Which pictures, and where runs and pictures are."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """programs by the names of their files, without .py; by default all"""
    run: bool = False
    """run programs that have not been run"""
    runs: Path = ROOT / "runs/gallery"
    """folder of the run folders"""
    out: Path = ROOT / "docs/pages/pictures/gallery"
    """folder of the pictures"""

    def __post_init__(self) -> None:
        unknown = {*self.names} - PICTURES.keys()
        if unknown:
            raise ValueError(f"`names` must be some of {[*PICTURES]}, got {sorted(unknown)}.")


@dataclass(frozen=True)
class Picture:
    """How a program is run for its picture, and how that is drawn.

    Attributes:
        draw: (run folder, what the program printed) -> a figure, or the file that the run left.
        options: of the program; {run} stands for its folder. Some runs are shorter than those of
            docs/pages/results, and the gallery says so.
        recorded: whether it is drawn from figures in benchmarks/ or docs/, without a run.
    """

    draw: Callable[[Path, str], Any]
    options: str = ""
    recorded: bool = field(default=False, kw_only=True)


def left(name: str) -> Callable[[Path, str], Path]:
    """Return a function of the run's folder whose result is the picture that the run left there."""
    return lambda run, printed: run / name


PICTURES = {
    "architecture_search": Picture(pictures.architecture_search),
    "data_distillation": Picture(left("images.png"), "--out {run}/images.png"),
    "domains": Picture(pictures.domains),
    "implicit_maml": Picture(pictures.implicit_maml),
    "implicit_middle": Picture(pictures.implicit_middle),
    "learning_by_ignoring": Picture(pictures.learning_by_ignoring),
    "learning_rate_of_learning_rate": Picture(pictures.learning_rate_of_learning_rate),
    "maml_plus_plus": Picture(pictures.maml_plus_plus, "--steps 50"),
    "meta_curvature": Picture(pictures.meta_curvature, "--steps 300"),
    "meta_sgd": Picture(pictures.meta_sgd, "--steps 400"),
    "reweighting": Picture(left("weights.png"), "--out {run}/weights.png"),
    "virtual_step": Picture(pictures.virtual_step),
    "weight_decay": Picture(pictures.weight_decay),
    "bench": Picture(pictures.bench, recorded=True),
    "compare_choices": Picture(pictures.compare_choices, recorded=True),
    "compare_inner_rates": Picture(pictures.compare_inner_rates, recorded=True),
    "data_attribution": Picture(pictures.data_attribution, recorded=True),
    "evaluate": Picture(
        left("digits.png"), "--trained mlp --seeds 24 --tuning-seeds 8 --out {run}"
    ),
    "language_model": Picture(pictures.language_model, recorded=True),
    "maml": Picture(
        pictures.maml, "sinusoid --compile --max-steps 2000 --pretrain-steps 2000 --out {run}"
    ),
    "meta_weight_net": Picture(
        pictures.meta_weight_net, "--learning-rates 0.03 --lengths 50 100 200 400 --out {run}"
    ),
    "reptile": Picture(pictures.reptile, "--max-steps 2000 --out {run}"),
    "scaling": Picture(pictures.scaling),
    "search": Picture(
        left("branin/best.png"), "branin --backends random optuna --seeds 3 --out {run}"
    ),
    "train_on_families": Picture(pictures.train_on_families, recorded=True),
    "train_optimizer": Picture(
        pictures.train_optimizer, "--steps 100 --finish 20 --validate-every 10 --out {run}"
    ),
    "train_schedule": Picture(pictures.train_schedule, recorded=True),
}


def run_program(name: str, options: str, runs: Path) -> None:
    """Run an example or a script, and keep what it prints.

    Raises:
        CalledProcessError: it failed.
    """
    folder = next(part for part in ("examples", "scripts") if (ROOT / part / f"{name}.py").exists())
    run = runs / name
    run.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / folder / f"{name}.py")]
    command += options.format(run=run).split()
    env = {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), **os.environ}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    (run / "output.txt").write_text(done.stdout)


def main(config: Config) -> None:
    """Run what is to be run, and draw what has been."""
    use_style()
    for name in config.names or PICTURES:
        picture, run = PICTURES[name], config.runs / name
        output = run / "output.txt"
        if config.run and not picture.recorded and not output.exists():
            run_program(name, picture.options, config.runs)
        if picture.recorded or output.exists():
            printed = "" if picture.recorded else output.read_text()
            save(picture.draw(run, printed), config.out / f"{name}.png")
            print(config.out / f"{name}.png")
        else:
            print(f"{name} has not been run: add --run", file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
