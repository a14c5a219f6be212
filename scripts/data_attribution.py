"""Which training examples made this prediction: the derivative through a whole training run.

    python scripts/data_attribution.py digits
    python scripts/data_attribution.py language

Each training example has a weight w_i in the loss, 1 at first. The score of example i for a test
example is d(test loss) / d w_i, where the test loss depends on w through every step of training.
The exact metagradient differentiates the steps (one backward pass gives all examples' scores);
implicit differentiation treats the last parameters as a solution, with a linear solver in place of
the inverse Hessian; T1 - T2 has the identity in its place, which leaves a product of two gradients.

They are judged by the linear datamodeling score: the same training is run again on 64 random halves
of the examples (those outside have weight 0, those inside 2, so that the mean stays 1), and for
each test example the real losses after these trainings are compared with sum_i w_i score_i, by
Spearman's rank correlation. All trainings run side by side under `vmap`, from the same weights and
in the same order; with `--other-seeds` once more from others. The damping of each approximation is
the best of a grid, judged by the score itself, which is in their favour.

Reference:
    Koh and Liang 2017, arXiv:1703.04730; Ilyas et al. 2022, arXiv:2202.00622; Park et al. 2023,
    arXiv:2303.14186 (the score); Engstrom et al. 2025, arXiv:2503.13751 (metagradients, and why
    training must be smooth for them: tanh and GELU, large batches, moderate rates).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

import metaopt as mo
from metaopt import tree
from metaopt._functional import Params
from metaopt.extras import extra
from metaopt.tasks.examples import digits_part
from metaopt.tasks.reading import ChunkTransformer, Documents
from metaopt.tasks.text import Alphabet, split_by_name, topics
from optimizers import SGD, Adam, Cosine, Warmup

with extra("scripts/data_attribution.py"):
    import command_line
    from attribution import (
        PART,
        Attribution,
        Part,
        Problem,
        Retraining,
        approximate,
        approximations,
        metagradients,
    )
    from attribution_report import (
        Judged,
        judge,
        plot_digits,
        plot_scores,
        show_passages,
        write_table,
    )
    from schedule_report import write_json

EXACT, SYMBOLS = "exact metagradient", 97


@dataclass(frozen=True)
class Config:
    """What both problems have."""

    examples: int = 1300
    """Training examples."""
    tests: int = 64
    """Test examples, each with scores of its own."""
    subsets: int = 64
    """Random halves of the training examples on which the training is run again."""
    other_seeds: int = 1
    """Number of repetitions of this from other initial weights and in another order."""
    steps: int = 200
    """Steps of training."""
    batch_size: int = 325
    """Examples in a minibatch; each epoch is shuffled anew."""
    lr: float = 0.03
    """Learning rate: of SGD with momentum .9 for digits, of Adam for the language model."""
    products: int = 30
    """Hessian products of a linear solver: steps of CG, columns of Nystrom, terms of Neumann."""
    dampings: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Grid for each solver."""
    memory: Literal["steps", "revolve"] = "steps"
    """What the exact metagradient keeps of the training: all states, or `snapshots` of them."""
    snapshots: int = 20
    """States that `--memory revolve` keeps."""
    at_once: int = 32
    """Test examples that are scored at once."""
    seed: int = 0
    """Of everything random."""
    threads: int = 1
    """Threads for torch."""
    json: Path | None = None
    """File of JSON to which the figures are added."""
    out: Path = Path("runs/data_attribution")
    """Folder for the plots, scores, checkpoints and TensorBoard events."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name in ("seed", "other_seeds") else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if self.batch_size > self.examples:
            raise ValueError(
                f"`batch_size` must be at most `examples`, got {self.batch_size} and "
                f"{self.examples}."
            )
        if not self.dampings or min(self.dampings) <= 0:
            raise ValueError(f"`dampings` must hold positive numbers, got {self.dampings}.")


@dataclass(frozen=True)
class Digits(Config):
    """Attribute the predictions of a perceptron on the handwritten digits."""

    hidden: int = 32
    """Width of the perceptron, 64-hidden-10 with tanh."""
    weight_decay: float = 1e-3
    """l in l/2 |params|^2, a part of the loss."""


@dataclass(frozen=True)
class Language(Config):
    """Attribute the predictions of a transformer on passages of Python's help topics."""

    examples: int = 384
    """Passages to train on."""
    tests: int = 16
    """Passages of other topics, each with scores of its own."""
    other_seeds: int = 0
    """Number of repetitions of the halves, with other initial weights and another order."""
    steps: int = 150
    """Steps of training."""
    batch_size: int = 48
    """Passages in a minibatch."""
    lr: float = 5e-3
    """Of Adam, after a warm-up of a tenth of the steps, with a cosine."""
    products: int = 8
    """Hessian products of a linear solver."""
    dampings: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    """Grid for each solver."""
    at_once: int = 4
    """Test passages that are scored at once."""
    width: int = 32
    """Of the transformer's embeddings."""
    length: int = 32
    """Characters in a passage that are predicted."""
    window: int = 16
    """Characters before its own that a position attends to."""
    weight_decay: float = 0.0
    """l in l/2 |params|^2, a part of the loss."""


def make_problem(config: Digits | Language, seed: int) -> Problem:
    """Return the training of a seed; the examples are those of `config.seed`."""
    data = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(seed)
    optimizer: mo.Optimizer
    if isinstance(config, Digits):
        examples, tests = ((x[:count], y[:count]) for (x, y), count in digits_of(config))
        hidden = config.hidden
        model = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))
        optimizer = SGD(config.lr, momentum=0.9)
    else:
        alphabet, examples, tests = passages(config, data)
        model = transformer(config, alphabet)
        rate = Warmup(Cosine(config.lr, config.steps), max(config.steps // 10, 1))
        # `eps_root` keeps the derivative of the square root bounded where gradients are small.
        optimizer = Adam(rate, betas=(0.9, 0.98), eps_root=1e-6)
    net = mo.functional(model)
    order = shuffle(config, torch.Generator().manual_seed(seed))
    return Problem(net, net.params, optimizer, order, examples, tests, config.weight_decay)


def digits_of(config: Digits) -> Iterator[tuple[tuple[Tensor, Tensor], int]]:
    """Yield the digits to train on and those for tests, with how many of them are used."""
    for is_training, count in ((True, config.examples), (False, config.tests)):
        part = digits_part(is_training)
        if count > len(part[1]):
            name = "examples" if is_training else "tests"
            raise ValueError(f"`{name}` must be at most {len(part[1])}, got {count}.")
        yield part, count


def passages(
    config: Language, generator: torch.Generator
) -> tuple[Alphabet, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Draw passages (what is seen, what is predicted) of some topics, and of others for tests."""
    training, _, others = split_by_name(topics(), (0.7, 0.15))
    alphabet = Alphabet.most_frequent(training.values(), SYMBOLS)

    def draw(texts: dict[str, str], count: int) -> tuple[Tensor, Tensor]:
        documents = Documents(texts.values(), alphabet, window=config.window, chunk=config.length)
        seen, wanted = documents.draw(generator, count, 1)
        return seen[:, 0], wanted[:, 0]

    return alphabet, draw(training, config.examples), draw(others, config.tests)


def transformer(config: Language, alphabet: Alphabet) -> nn.Module:
    """Return a transformer of one block, whose readout has a weight of its own."""
    model = ChunkTransformer(
        alphabet.size, window=config.window, chunk=config.length, width=config.width, blocks=1
    )
    model.readout.weight = nn.Parameter(model.readout.weight.detach().clone())
    return model


def shuffle(config: Config, generator: torch.Generator) -> Tensor:
    """Return the rows of each minibatch, [steps, batch]: a new order in each epoch."""
    batches = config.examples // config.batch_size
    epochs = [
        torch.randperm(config.examples, generator=generator)[: batches * config.batch_size]
        for _ in range(-(-config.steps // batches))
    ]
    return torch.cat(epochs).view(-1, config.batch_size)[: config.steps]


def half_subsets(config: Config) -> Tensor:
    """Return the weights of each half, [subsets, examples]: 2 inside, 0 outside."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    orders = torch.rand(config.subsets, config.examples, generator=generator).argsort(1)
    return 2.0 * (orders < config.examples // 2)


def fit(config: Config, part: Part, steps: int, label: str) -> float:
    """Make the steps, and return the CPU seconds that they took, those before a stop included."""
    logger = mo.TensorBoardLogger(config.out / "events" / label)
    saved = command_line.saved(config, label)
    mo.Trainer(part, max_steps=steps, logger=logger, label=label, **saved).fit()
    seconds: float = part.now["seconds"]
    return seconds


def retrain(config: Digits | Language, seed: int, weights: Tensor) -> tuple[Tensor, float]:
    """Return the test losses after each training of a seed, [tests, subsets], and CPU seconds."""
    problem = make_problem(config, seed)
    retraining = Retraining(problem, weights)
    parts = -(-config.steps // PART)
    with torch.no_grad():
        seconds = fit(config, retraining, parts, f"training on halves, seed {seed}")
        every = torch.arange(config.tests)
        losses = vmap(lambda params: problem.test_losses(params, every))(retraining.now["params"])
    return losses.T, seconds


def describe(problem: Problem, params: Params, seconds: float) -> str:
    """Say how well the training with all weights 1 did, and what the retraining cost."""
    every = [torch.arange(len(part[0])) for part in (problem.examples, problem.tests)]
    training = problem.losses(params, *problem.examples).mean()
    test = problem.test_losses(params, every[1]).mean()
    gradient = grad(problem.loss)(params, every[0], torch.ones(len(every[0])))
    return (
        f"loss of the training examples {training:.3f}, of the tests {test:.3f}; norm of the "
        f"gradient at the end {tree.norm(gradient):.3f}; training on halves took {seconds:.0f} CPU "
        "seconds"
    )


def read_passages(config: Language, problem: Problem) -> list[list[str]]:
    """Return the predicted characters of the training and of the test passages."""
    alphabet, *_ = passages(config, torch.Generator().manual_seed(config.seed))
    letters = alphabet.characters + "?"
    return [
        ["".join(letters[i] for i in row) for row in wanted.tolist()]
        for _, wanted in (problem.examples, problem.tests)
    ]


def main(config: Digits | Language) -> dict[str, Judged]:
    """Score with every method, train on halves, and write the table, plots and figures."""
    torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    weights, problem = half_subsets(config), make_problem(config, config.seed)
    real, seconds = retrain(config, config.seed, weights)
    others = [retrain(config, config.seed + 1 + i, weights)[0] for i in range(config.other_seeds)]
    with torch.no_grad():
        params = problem.train(torch.ones(config.examples))
        print(describe(problem, params, seconds))

    def attribute(label: str, score: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
        attribution = Attribution(score, config.tests, config.at_once)
        took = fit(config, attribution, len(attribution.parts), label)
        return torch.cat(attribution.now["scores"]), took

    memory = mo.Revolve(config.snapshots) if config.memory == "revolve" else config.memory
    exact = partial(metagradients, problem, mo.Backprop(memory=memory))
    scores = {EXACT: [("", *attribute(EXACT, exact))]}
    for name, grid in approximations(
        problem, params, config.products, config.dampings, config.seed
    ).items():
        scores[name] = []
        for i, solver in enumerate(grid):
            setting = f"damping {config.dampings[i]:g}" if len(grid) > 1 else ""
            label = f"{name}, {setting}" if setting else name
            score = partial(approximate, problem, params, solver)
            scores[name].append((setting, *attribute(label, score)))
    judged = judge(scores, weights, real, others, config.seed)
    table = write_table(judged)
    print(table)
    (config.out / "table.md").write_text(table + "\n")
    plot_scores(judged, config.out / "scores.png")
    exact_scores = judged[EXACT].scores
    if isinstance(config, Digits):
        plot_digits(problem.examples, problem.tests, exact_scores, config.out / "digits.png")
    else:
        print(show_passages(*read_passages(config, problem), exact_scores))
    if config.json:
        figures = {name: one.figures for name, one in judged.items()}
        key = type(config).__name__.lower()
        write_json(config.json, key, asdict(config), {"methods": figures})
    print(f"Plots and TensorBoard events: {config.out}")
    return judged


if __name__ == "__main__":
    command_line.run(main, {"digits": Digits, "language": Language}, __doc__)
