"""What rules, memories and estimators give and cost: the tables of docs/pages/choose/.

python scripts/compare_choices.py --publish                      # all, five minutes on one core
python scripts/compare_choices.py --parts estimators --publish   # one of them
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import metaopt as mo
from metaopt._functional import Params
from metaopt.diagnostics.memory import peak_memory
from metaopt.differentiate import Rule
from metaopt.extras import extra
from optimizers import SGD, MLPOptimizer, Positive, Within

with extra("scripts/compare_choices.py"):
    import command_line
    from bench_report import find_commit
    from choices_report import publish, read, write

CPU = torch.device("cpu")
Part = Literal["rules", "memory", "estimators"]
Loss = Callable[[Params, Any, Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    """Each part trains small networks on digits, and measures CPU time on one thread."""

    parts: tuple[Part, ...] = ("rules", "memory", "estimators")
    """What is compared."""
    examples: int = 300
    """Digits to train on, and as many to validate on."""
    width: int = 16
    """Hidden units of the network whose hypergradients are computed."""
    converge: int = 4000
    """Steps to a solution, before the rules are compared there."""
    steps: int = 50
    """Steps of the loop that begins at the solution."""
    early: int = 20
    """Steps of the loop that begins at random weights."""
    loop: int = 200
    """Steps of the loop that the memories are compared on."""
    horizon: int = 30
    """Steps of the episodes that the estimators look at."""
    window: int = 6
    """Steps of an estimator's window."""
    episodes: int = 16
    """Times that each estimator goes through 32 episodes, or pairs of them."""
    repeats: int = 3
    """Timings of each, in turns, of which the median is reported."""
    publish: bool = False
    """Put all that is in `out` into benchmarks/choices.json and docs/pages/choose/."""
    out: Path = Path("runs/choices")
    """Folder for the figures."""

    def __post_init__(self) -> None:
        if self.horizon % self.window or self.episodes < 2:
            raise ValueError(
                f"`horizon` must be a multiple of `window`, and `episodes` at least 2, got "
                f"{self.horizon}, {self.window} and {self.episodes}."
            )


# A bilevel problem


@dataclass(frozen=True)
class Problem:
    """An MLP 64-width-10 on digits, and the validation loss of where its training ends.

    `meta` is what the hypergradient is taken in, in float64.
    """

    net: mo.Functional
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    loss: Loss
    meta: Tensor
    optimizer: mo.Optimizer

    def hypergradient(self, rule: Rule, start: Params, steps: int) -> Tensor:
        """Return the slope in `meta` of the validation loss after the steps."""
        meta = self.meta.clone().requires_grad_()
        w = mo.minimize(
            self.loss,
            self.optimizer,
            start,
            self.train,
            steps=steps,
            meta=meta,
            differentiate=rule,
        ).params
        return torch.autograd.grad(cross_entropy(self.net, w, self.validation), meta)[0]

    def train_from(self, start: Params, steps: int) -> Params:
        """Return where the steps end."""
        with torch.no_grad():
            end: Params = mo.minimize(
                self.loss, self.optimizer, start, self.train, steps=steps, meta=self.meta
            ).params
        return end


def cross_entropy(net: mo.Functional, w: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(w, batch[0]), batch[1])


def make_problem(config: Config, kind: str) -> Problem:
    """Return a problem whose `meta` are "weight decays" of each tensor or "example weights"."""
    images, labels = mo.tasks.table("digits")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    first, second = order[: 2 * config.examples].split(config.examples)
    train, validation = ((images[rows].double(), labels[rows]) for rows in (first, second))
    net = mo.functional(make_mlp(config.width))
    decay = 1e-2

    def decayed(w: Params, batch: tuple[Tensor, Tensor], meta: Tensor) -> Tensor:
        sizes = torch.stack([leaf.square().sum() for leaf in w.values()])
        return cross_entropy(net, w, batch) + meta.exp() @ sizes

    def weighted(w: Params, batch: tuple[Tensor, Tensor], meta: Tensor) -> Tensor:
        x, y = batch
        losses = F.cross_entropy(net(w, x), y, reduction="none")
        return (meta * losses).mean() + decay * mo.tree.norm(w) ** 2

    loss, meta = {
        "weight decays": (decayed, torch.full((4,), decay).double().log()),
        "example weights": (weighted, torch.ones(config.examples).double()),
    }[kind]
    return Problem(net, train, validation, loss, meta, SGD(0.3, momentum=0.9))


def make_mlp(width: int) -> torch.nn.Module:
    """Return the network with weights that are the same on every machine."""
    model = torch.nn.Sequential(
        torch.nn.Linear(64, width), torch.nn.Tanh(), torch.nn.Linear(width, 10)
    ).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1]
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model


# Rules


def rules_at(problem: Problem, end: Params, *, few: bool) -> dict[str, Rule]:
    """Return the rules by what one writes for them.

    Args:
        problem: that is differentiated.
        end: where the loop ends, for the Kronecker factors of the curvature there.
        few: whether `meta` is small enough for forward mode.
    """
    factors = mo.KroneckerFactors(problem.net, end, problem.train[0])
    rules: dict[str, Rule] = {
        "Backprop()": mo.Backprop(),
        'Backprop(memory="steps")': mo.Backprop(memory="steps"),
        "Backprop(window=10)": mo.Backprop(window=10),
        "Implicit(Direct())": mo.Implicit(mo.Direct()),
        "Implicit(ConjugateGradient(max_steps=20))": mo.Implicit(mo.ConjugateGradient(20)),
        "Implicit(NormalCG(max_steps=20))": mo.Implicit(mo.NormalCG(20)),
        "Implicit(GMRES(max_steps=20))": mo.Implicit(mo.GMRES(20)),
        "Implicit(Neumann(0.3, terms=20))": mo.Implicit(mo.Neumann(0.3, 20)),
        "Implicit(NystromCG(rank=20, max_steps=20))": mo.Implicit(
            mo.NystromCG(rank=20, max_steps=20)
        ),
        "Implicit(KFAC(factors, damping=0.01))": mo.Implicit(mo.KFAC(factors, damping=0.01)),
        "T1T2()": mo.T1T2(),
        "FiniteDifference()": mo.FiniteDifference(),
        "SAMA()": mo.SAMA(),
        "Penalty()": mo.Penalty(),
        "EvolutionStrategy(std=0.01, pairs=16)": mo.EvolutionStrategy(0.01, 16),
    }
    return rules | ({"ForwardMode()": mo.ForwardMode()} if few else {})


def compare_rules(config: Config) -> dict[str, Any]:
    """Return, by problem and rule, direction and size near a solution and early, time, memory."""
    return {kind: _compare_rules(config, kind) for kind in ("weight decays", "example weights")}


def _compare_rules(config: Config, kind: str) -> dict[str, Any]:
    problem = make_problem(config, kind)
    few = len(problem.meta) < 10
    begin = {name: leaf.detach() for name, leaf in problem.net.params.items()}
    solution = problem.train_from(begin, config.converge)
    early = rules_at(problem, problem.train_from(begin, config.early), few=few)
    late = rules_at(problem, solution, few=few)
    exact_early = problem.hypergradient(mo.Backprop(), begin, config.early)
    # at a solution the theorem is exact, and what is left of the start is not
    exact_late = problem.hypergradient(mo.Implicit(mo.Direct()), solution, config.steps)
    runs = {
        name: lambda rule=rule: problem.hypergradient(rule, solution, config.steps)
        for name, rule in late.items()
    }
    costs = measure(runs, config.repeats)

    def early_row(name: str) -> dict[str, float] | None:
        try:
            found = problem.hypergradient(early[name], begin, config.early)
        except ValueError:  # the curvature is indefinite there, and this solver says so
            return None
        return beside(exact_early, found)

    rows = {
        name: {
            "late": beside(exact_late, costs[name].result),
            "early": early_row(name),
            **costs[name].figures(),
        }
        for name in runs
    }
    slope = torch.func.grad(problem.loss)(solution, problem.train, problem.meta)
    return {"slope": float(mo.tree.norm(slope)), "numbers": len(problem.meta), "rows": rows}


def beside(exact: Tensor, found: Tensor) -> dict[str, float]:
    """Return cosine and relative error of a hypergradient."""
    return {
        "cosine": float(F.cosine_similarity(found, exact, dim=0)),
        "error": float((found - exact).norm() / exact.norm()),
    }


def compare_starts(config: Config) -> dict[str, Any]:
    """Return the same for the initial parameters of five steps, as in MAML."""
    problem = make_problem(config, "example weights")

    def slope(rule: Rule) -> Tensor:
        start = {name: leaf.detach().requires_grad_() for name, leaf in problem.net.params.items()}
        w = mo.minimize(
            problem.loss,
            SGD(0.3),
            start,
            problem.train,
            steps=5,
            meta=problem.meta,
            differentiate=rule,
        ).params
        outer = cross_entropy(problem.net, w, problem.validation)
        return mo.tree.ravel(torch.autograd.grad(outer, [*start.values()]))

    rules = {
        "Backprop()": mo.Backprop(),
        'Backprop(memory="steps")': mo.Backprop(memory="steps"),
        "FirstOrder()": mo.FirstOrder(),
        "EvolutionStrategy(std=0.01, pairs=16)": mo.EvolutionStrategy(0.01, 16),
    }
    runs = {name: lambda rule=rule: slope(rule) for name, rule in rules.items()}
    exact, costs = slope(mo.Backprop()), measure(runs, 5 * config.repeats)
    return {
        name: {"early": beside(exact, cost.result), **cost.figures()}
        for name, cost in costs.items()
    }


# Memory


def compare_memories(config: Config) -> dict[str, Any]:
    """Return, by rule, the error in a rate and a decay through a long loop, time and memory."""
    problem = make_problem(config, "weight decays")
    start = {name: leaf.detach() for name, leaf in problem.net.params.items()}

    def slopes(rule: Rule) -> Tensor:
        given = torch.tensor([0.3, -4.6], dtype=torch.float64, requires_grad=True)
        out = mo.minimize(
            problem.loss,
            SGD(given[0], momentum=0.9),
            start,
            problem.train,
            steps=config.loop,
            meta=given[1].expand(4),
            differentiate=rule,
        )
        outer = cross_entropy(problem.net, out.params, problem.validation)
        return torch.autograd.grad(outer, given)[0]

    exact = slopes(mo.Backprop())
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: lambda rule=rule: slopes(rule) for name, rule in memories_in(folder).items()}
        costs = measure(runs, config.repeats)
        return {
            name: {"error": beside(exact, cost.result)["error"], **cost.figures()}
            for name, cost in costs.items()
        }


def memories_in(folder: str) -> dict[str, Rule]:
    """Return what can be done about memory, by what one writes for it."""
    disk = mo.Revolve(20, store="disk", directory=folder)
    return {
        'Backprop(memory="full")': mo.Backprop(),
        'Backprop(memory="steps")': mo.Backprop(memory="steps"),
        'Backprop(memory="steps", microbatches=4)': mo.Backprop(memory="steps", microbatches=4),
        'Backprop(memory="steps", hvp="forward")': mo.Backprop(memory="steps", hvp="forward"),
        "Backprop(memory=Revolve(50))": mo.Backprop(memory=mo.Revolve(50)),
        "Backprop(memory=Revolve(20))": mo.Backprop(memory=mo.Revolve(20)),
        "Backprop(memory=Revolve(5))": mo.Backprop(memory=mo.Revolve(5)),
        'Backprop(memory=Revolve(20, store="disk", ...))': mo.Backprop(memory=disk),
        "Backprop(window=50)": mo.Backprop(window=50),
        'Backprop(window=50, memory="steps")': mo.Backprop(window=50, memory="steps"),
        "ForwardMode()": mo.ForwardMode(),
    }


# Estimators


UNITS = 32  # tasks or pairs of an estimate


@dataclass(frozen=True)
class Trained:
    """What is trained, and by how much evolution perturbs it."""

    optimizer: mo.Optimizer
    std: float
    is_smooth: bool  # whether backpropagation gives the reference, or evolution


def make_trained() -> dict[str, Trained]:
    """Return what is trained, by what one would say of it."""
    with fixed_seed(0):
        return {
            "a rate and a momentum": Trained(
                SGD(Positive(0.03), momentum=Within(0.9)), std=0.1, is_smooth=True
            ),
            "a rate that overshoots": Trained(
                SGD(Positive(1.0), momentum=Within(0.9)), std=0.1, is_smooth=False
            ),
            "a learned optimizer": Trained(MLPOptimizer(hidden_size=4), std=0.01, is_smooth=True),
        }


def make_estimators(window: int, std: float) -> dict[str, mo.Estimator]:
    """Return the estimators by what one writes for them."""
    return {
        "FullUnroll(differentiate=Backprop())": mo.FullUnroll(UNITS, mo.Backprop()),
        "FullUnroll()": mo.FullUnroll(UNITS),
        f"TruncatedBackprop({window}, differentiate=Backprop())": mo.TruncatedBackprop(
            window, UNITS, mo.Backprop()
        ),
        f"ES({std})": mo.ES(std, UNITS),
        f"TruncatedES({std}, window={window})": mo.TruncatedES(std, UNITS, window=window),
        f"PES({std}, window={window})": mo.PES(std, UNITS, window=window),
        f"NRES({std}, window={window})": mo.NRES(std, UNITS, window=window),
    }


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """While entered, torch's generator begins at `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def compare_estimators(config: Config) -> dict[str, Any]:
    """Return, by what is trained and by estimator, bias, noise, time and memory."""
    return {name: _compare_estimators(config, one) for name, one in make_trained().items()}


class Draws:
    """Estimates of one estimator at a fixed optimizer, whole episodes at a time."""

    def __init__(self, config: Config, estimator: Any, optimizer: mo.Optimizer, seed: int) -> None:
        self.config, self.estimator, self.optimizer = config, estimator, optimizer
        self.units = getattr(estimator, "tasks", None) or estimator.pairs
        self.family = mo.tasks.DigitsMLP(hidden=(8,), batch_size=32)
        self.theta = {name: leaf.detach() for name, leaf in optimizer.named_parameters()}
        self.generator, self.state = torch.Generator().manual_seed(seed), estimator.init()
        self.means: list[Tensor] = []
        self.squares: list[float] = []
        self.seconds: list[float] = []

    def estimate(self) -> Any:
        estimate = self.estimator(
            self.optimizer,
            self.theta,
            self.family,
            self.config.horizon,
            self.state,
            self.generator,
        )
        self.state = estimate.state
        return estimate

    def warm_up(self) -> None:
        """Make the estimates of an episode: the first pairs begin with no noise behind them."""
        for _ in range(self.estimator.windows(self.config.horizon)):
            self.estimate()

    def draw(self) -> None:
        """Go through one episode: note the mean, the mean of squares, the time of one unit."""
        count, sums = self.estimator.windows(self.config.horizon), []
        weights = torch.full((self.units,), 1 / self.units)
        begin = time.process_time()
        for _ in range(count):
            estimate = self.estimate()
            sums.append(mo.tree.ravel(estimate.weighted_sum(weights)).double())
            self.squares.append(float(estimate.norms.double().square().mean()))
        self.seconds.append((time.process_time() - begin) / (count * self.units))
        self.means.append(torch.stack(sums).mean(0))


def _compare_estimators(config: Config, trained: Trained) -> dict[str, Any]:
    optimizer, std = trained.optimizer, trained.std
    reference = mo.FullUnroll(UNITS, mo.Backprop()) if trained.is_smooth else mo.ES(std, 2 * UNITS)
    exact = Draws(config, reference, optimizer, seed=1)
    draws = {
        name: Draws(config, estimator, optimizer, seed=2)
        for name, estimator in make_estimators(config.window, std).items()
    }
    for one in draws.values():
        one.warm_up()
    for _ in range(config.episodes):
        exact.draw()
        exact.draw()
        for one in draws.values():
            one.draw()
    truth = torch.stack(exact.means).mean(0)
    rows = {name: summarise(one, truth) for name, one in draws.items()}
    for name, one in draws.items():
        rows[name]["bytes"] = peak_memory(one.estimate, CPU)
    return {"numbers": len(truth), "std": std, "rows": rows}


def summarise(draws: Draws, truth: Tensor) -> dict[str, float]:
    """Return bias and noise beside the exact meta-gradient g.

    "size" is <m, g> / <g, g> of the mean m, with its standard error; "noise" is the standard
    deviation of one task or pair over |g|; the noise that is left in m is taken off its norm in
    the cosine.
    """
    means, length = torch.stack(draws.means), truth.norm()
    mean = means.mean(0)
    along = means @ truth / length**2
    left = (means - mean).square().sum() / (len(means) * (len(means) - 1))  # E |m - E m|^2
    square = (mean.square().sum() - left).clamp(min=0)
    noise = (statistics.mean(draws.squares) - float(square)) ** 0.5 / float(length)
    seconds = statistics.median(draws.seconds)
    return {
        "size": float(along.mean()),
        "size error": float(along.std() / len(along) ** 0.5),
        "cosine": min(1.0, float(mean @ truth / (square.sqrt() * length))),
        "noise": noise,
        "seconds": seconds,
        "seconds to the gradient": seconds * noise**2,
    }


# Costs


class Cost(NamedTuple):
    """What a run gave, its CPU seconds, and the bytes that it needed at most."""

    result: Any
    seconds: float
    bytes: int

    def figures(self) -> dict[str, float]:
        return {"seconds": self.seconds, "bytes": self.bytes}


def measure(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Cost]:
    """Return the costs of each; times are medians of runs in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results = {}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.process_time()
            results[name] = run()
            seconds[name].append(time.process_time() - begin)
    return {
        name: Cost(results[name], statistics.median(seconds[name]), peak_memory(run, CPU))
        for name, run in runs.items()
    }


PARTS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "rules": compare_rules,
    "starts": compare_starts,
    "memory": compare_memories,
    "estimators": compare_estimators,
}


def main(config: Config) -> None:
    torch.set_num_threads(1)
    names = [name for name in PARTS if (name if name != "starts" else "rules") in config.parts]
    commit = find_commit()  # of the source that runs, whatever happens to the files meanwhile
    for name in names:
        begin = time.process_time()
        write(config.out, name, PARTS[name](config), config, commit)
        print(f"{name}: {time.process_time() - begin:.0f} s", flush=True)
    if config.publish:
        publish(read(config.out))


if __name__ == "__main__":
    command_line.run(main, Config, __doc__, shares=False, has_checkpoints=False)
