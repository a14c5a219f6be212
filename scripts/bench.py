"""metaopt beside its peers: the same meta-gradients, timed in turns, one process a side.

    python scripts/bench.py sinusoid omniglot --threads 2
    python scripts/bench.py lstm transformer --write

Before anything is timed, every side's gradient is compared with that of the first, or where it is
known with the exact one; a difference ends the run. Results go to `--out`, where later runs add
theirs; the tables show everything that is there. `--write` publishes them: a line for each in
benchmarks/history.jsonl, the ratios on other pages, and the tables in docs/pages/benchmarks.md,
where those of other comparisons stay.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import command_line
import numpy as np
import tyro
from bench_process import Contender
from bench_report import Memory, Times, publish, read, tables, write
from contenders.large_model import Scale
from contenders.sides import COMPARISONS, Side, function_of
from tqdm import tqdm

Name = Literal[
    "sinusoid",
    "omniglot",
    "lstm",
    "meta-training",
    "meta-training-nres",
    "transformer",
    "meta-weight-net",
    "imaml",
    "regression-darts",
    "regression-cg",
    "regression-neumann",
    "trainer",
    "many-tensors",
    "attention",
    "attention-causal",
    "attention-masked",
    "scale-darts",
    "scale-sama",
    "scale-darts-64",
    "scale-sama-64",
    "scale-darts-frozen",
    "scale-sama-frozen",
    "scale-darts-frozen-16",
    "scale-sama-frozen-16",
    "bilevel-100",
    "bilevel-10000",
    "optimizer-steps-26k",
    "optimizer-steps-269k",
    "optimizer-steps-5m",
]
Group = Literal["scale", "bilevel", "optimizer-steps"]
GROUPS = {
    group: tuple(name for name in get_args(Name) if name.startswith(f"{group}-"))
    for group in get_args(Group)
}


@dataclass
class Config:
    """What to compare, and how thoroughly."""

    comparisons: tyro.conf.Positional[tuple[Name | Group, ...]] = ()
    """comparisons; by default all. "scale" stands for those on a large model, about six minutes;
    "bilevel" for those on quadratics; "optimizer-steps" for steps of learned optimizers
    """
    threads: int = 1
    """number of cores of each process"""
    repeats: int = 20
    """number of timings of each side; one lasts .1 s, or one run if that is longer"""
    longest: int = 256
    """inner steps up to which memory is measured; 0 leaves memory out, 2000 takes half an hour for
    the transformer
    """
    max_gib: float = 10.0
    """runs that would need more memory are left out"""
    model: Path | None = None
    """folder of a model that `transformers` reads, for "scale"; by default random weights"""
    out: Path = Path("runs/bench")
    """folder for the results"""
    write: bool = False
    """publish all results in `out`, in benchmarks/history.jsonl and the pages that show them"""

    def __post_init__(self) -> None:
        if self.threads < 1 or self.repeats < 1:
            raise ValueError(
                f"`threads` and `repeats` must be positive, got {self.threads} and {self.repeats}."
            )
        if self.threads > len(os.sched_getaffinity(0)):
            raise ValueError(
                f"`threads` must be at most {len(os.sched_getaffinity(0))}, the cores at hand, got "
                f"{self.threads}."
            )


def compare(
    function: str, sides: Sequence[Side], problem: Any, threads: int, repeats: int, tolerance: float
) -> list[Times]:
    """Time the sides in turns.

    Raises:
        ValueError: two gradients differ, or one and the exact one.
    """
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    with ExitStack() as stack:
        contenders = []
        for side in tqdm(sides, desc=f"{function}: starting", leave=False, disable=None):
            contenders.append(stack.enter_context(Contender(side, function, problem, threads)))
        results = {contender.name: contender.result() for contender in contenders}
        errors = check(results, sides, problem, tolerance)
        for contender in contenders:
            contender.seconds()  # finds out how many runs fill a repetition
        for _ in tqdm(range(repeats), desc=f"{function}: timing", leave=False, disable=None):
            for contender in contenders:
                times[contender.name].append(contender.seconds())
        return [
            Times(contender.name, contender.first, times[contender.name], errors[contender.name])
            for contender in contenders
        ]


def check(
    results: dict[str, dict[str, np.ndarray]],
    sides: Sequence[Side],
    problem: Any,
    tolerance: float,
) -> dict[str, float | None]:
    """Return the error of each side, of the exact gradient's norm, where the problem has that.

    Else all sides must agree, and their errors are None.

    Raises:
        ValueError: a side is further than it may be from the exact gradient, or from the first.
    """
    if not hasattr(problem, "exact"):
        check_equal(results, tolerance)
        return dict.fromkeys(results)
    exact = {name: value.numpy() for name, value in problem.exact().items()}
    errors: dict[str, float | None] = {}
    for side in sides:
        found = results[side.name]
        check_equal({"the exact gradient": exact, side.name: found}, side.error)
        gaps = [np.linalg.norm(found[name] - value) for name, value in exact.items()]
        norms = [np.linalg.norm(value) for value in exact.values()]
        errors[side.name] = float(np.linalg.norm(gaps) / np.linalg.norm(norms))
    return errors


def check_equal(results: dict[str, dict[str, np.ndarray]], tolerance: float) -> None:
    """Raise if a side's gradient is not that of the first side, tensor by tensor.

    Raises:
        ValueError: names, shapes or numbers differ; the message says whose and by how much.
    """
    (first, expected), *others = results.items()
    whole = np.sqrt(sum(np.square(value, dtype=np.float64).sum() for value in expected.values()))
    for name, result in others:
        shapes, own = (
            {key: value.shape for key, value in arrays.items()} for arrays in (expected, result)
        )
        if shapes != own:
            raise ValueError(
                f"{name} and {first} do not compute the same tensors: {own} and {shapes}."
            )
        for key, value in expected.items():
            # some are zero but for rounding, such as those of biases before batch norm
            scale = max(np.linalg.norm(value), 1e-2 * whole)
            error = np.linalg.norm(result[key].astype(np.float64) - value) / scale
            if not error <= tolerance:
                raise ValueError(
                    f"{name} and {first} differ in {key!r} by {error:.1e} of its norm, more than "
                    f"{tolerance}."
                )


def measure(
    function: str,
    side: Side,
    problem: Any,
    lengths: Sequence[int],
    threads: int,
    limit: float,
    length: str = "steps",
) -> list[Memory]:
    """Return the memory that problems of these lengths need, each in a fresh process.

    Where that would exceed the limit, nothing runs, and an estimate is the last entry.
    """
    done: list[Memory] = []
    for steps in lengths:
        expected = _extrapolated(done, steps)
        if expected > limit:
            return [*done, Memory(side.name, steps, expected, None, None)]
        with Contender(
            side, function, replace(problem, **{length: steps}), threads, exact_memory=True
        ) as contender:
            done.append(Memory(side.name, steps, contender.grown, contender.peak, contender.first))
    return done


def _extrapolated(points: list[Memory], steps: int) -> int:
    """Return the memory on the line through the last two points, or through one and the origin."""
    if not points:
        return 0
    last = points[-1]
    before, at = (points[-2].grown, points[-2].steps) if points[1:] else (0, 0)
    return last.grown + (last.grown - before) * (steps - last.steps) // (last.steps - at)


def chosen(config: Config) -> list[str]:
    """Return the names of the comparisons that are asked for."""
    asked = config.comparisons or tuple(COMPARISONS)
    return [name for one in asked for name in GROUPS.get(one, (one,))]


def main(config: Config) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cold:
        # what earlier runs compiled would hide the time that it takes
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cold
        for name in chosen(config):
            comparison = COMPARISONS[name]
            if comparison.missing is not None:
                print(f"{name} is left out: {comparison.missing}")
                continue
            problem, function = comparison.problem, function_of(name)
            if config.model is not None and isinstance(problem, Scale):
                problem = replace(problem, folder=str(config.model.resolve()))
            sides = [side for side in comparison.sides if side.missing is None]
            for side in comparison.sides:
                if side.missing is not None:
                    print(f"{side.name} is left out of {name}: {side.missing}")
            repeats = min(config.repeats, comparison.repeats)
            times = compare(function, sides, problem, config.threads, repeats, comparison.tolerance)
            write(config.out, name, config.threads, problem, times)
            rows: list[Memory] = []
            for side in tqdm(
                [side for side in sides if side.lengths],
                desc=f"{name}: memory",
                leave=False,
                disable=None,
            ):
                is_loop, limit = comparison.length == "steps", config.max_gib * 2**30
                lengths = [n for n in side.lengths if not is_loop or n <= config.longest]
                rows += measure(
                    function, side, problem, lengths, config.threads, limit, comparison.length
                )
                if rows:  # what is there is kept if a later side takes too long
                    write(config.out, name, config.threads, problem, rows)
    results = read(config.out)
    print(tables(results))
    if config.write:
        publish(results)


if __name__ == "__main__":
    command_line.run(main, Config, __doc__, shares=False)
