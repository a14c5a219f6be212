"""A language model that learns while it reads, chunk by chunk, and one that was trained for that.

    python scripts/language_model.py

docs/pages/results/language-model.md says what each way of reading reaches.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import vmap

import metaopt as mo
from metaopt._functional import Params
from metaopt.extras import extra
from metaopt.tasks.reading import ChunkTransformer, Documents, Passage, chunk_losses
from metaopt.tasks.text import Alphabet, library, split_by_name, topics
from optimizers import SGD, LSTMOptimizer, MLPOptimizer

with extra("scripts/language_model.py"):
    import command_line
    from language_model_report import plot, write_report

SYMBOLS = 97  # what can be printed in ASCII, the end of a line, and one for all others
PRETRAINING_CHUNKS = 16  # in a step
SHARES = {"sources": (0.7, 0.1), "topics": (0.5, 0.15)}  # of training and of validation
PRETRAINING = "pretraining"
STATIC, DYNAMIC, RATES, LEARNED = (
    "static",
    "dynamic evaluation",
    "meta-learned start and rates",
    "meta-learned start and optimizer",
)


@dataclass(frozen=True)
class Config:
    """Train a small language model in four ways, and let each read documents it never saw."""

    train: Literal["both", "sources", "topics"] = "both"
    """Training text: sources of the standard library, topics of Python's help, or both."""
    adapt: Literal["mlp", "block", "all"] = "mlp"
    """What changes while it reads: the MLP of the last block, the last block, or everything."""
    optimizer: Literal["lstm", "mlp"] = "lstm"
    """The learned optimizer, which all coordinates share."""
    hidden_size: int = 4
    """Width of the learned optimizer."""
    step_size: float = 0.03
    """Factor on the output of the learned optimizer."""
    width: int = 64
    """Width of the language model's embeddings."""
    blocks: int = 2
    """Number of the language model's blocks."""
    window: int = 64
    """Characters before its own that a position attends to."""
    chunk: int = 128
    """Characters that are predicted between two updates."""
    length: int = 32
    """Chunks of a document that are read in the test; shorter documents are left out."""
    documents: int = 40
    """Documents of each sort that are read in validation and in the test, at most."""
    passages: int = 2
    """Passages in a meta-gradient."""
    chunks: int = 16
    """Chunks of a passage in training."""
    pretrain_steps: int = 600
    """Steps of ordinary training, which all four have in common; a step is 16 chunks."""
    pretrain_lr: float = 4e-3
    """Rate of its Adam."""
    steps: int = 80
    """Steps after that, each on the same number of characters in every way."""
    static_steps: int | None = None
    """Those of the static model, if others: several times as many take as long as the others'."""
    lr: float = 2e-3
    """Rate of their Adam, which falls to 0."""
    rate_lr: float = 0.03
    """The same for the meta-learned rates."""
    optimizer_lr: float = 0.01
    """The same for the weights of the learned optimizer."""
    rate: float = 1.0
    """Where the meta-learned rates begin."""
    grid: tuple[float, ...] = (0.6, 1.2, 1.8, 2.4)
    """Rates of dynamic evaluation that are tried on the validation documents."""
    memory: Literal["full", "steps", "revolve"] = "steps"
    """What the meta-gradient keeps of a passage: graphs, states, or `snapshots` states."""
    snapshots: int = 4
    """States that `--memory revolve` keeps."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the initial weights and the order of the data; one training each."""
    threads: int = 1
    """Threads for torch."""
    out: Path = Path("runs/language-model")
    """Folder for the plot, the figures, checkpoints and TensorBoard events."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "resume" and isinstance(value, int | float) and value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if not self.grid or min(self.grid) <= 0:
            raise ValueError(f"`grid` must hold positive learning rates, got {self.grid}.")
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"`seeds` must hold seeds of at least 0, got {self.seeds}.")


class Way:
    """A language model, and how it changes while it reads.

    Args:
        model: a `ChunkTransformer`.
        optimizer: what moves a part of its weights after each chunk; None for nothing.
        prefix: of the names of those weights.
    """

    def __init__(self, model: nn.Module, optimizer: mo.Optimizer | None, prefix: str):
        self.model, self.optimizer, self.prefix = model, optimizer, prefix
        self.net = mo.functional(model)

    @property
    def moving(self) -> list[str]:
        """The names of the weights that change."""
        return [name for name in self.net.params if name.startswith(self.prefix)]

    def read(
        self,
        params: Params,
        passage: Passage,
        rule: mo.Rule = mo.Backprop(),  # noqa: B008
    ) -> Tensor:
        """Return the loss of each chunk of a passage, [chunks], in nats per character.

        A chunk is predicted with the present weights, and then a step is made on its loss.
        """
        if self.optimizer is None:
            return chunk_losses(self.net(params, passage.seen), passage.wanted)

        def loss(moving: Params, chunk: Passage, still: Params) -> Tensor:
            return chunk_losses(self.net({**still, **moving}, chunk.seen), chunk.wanted)

        moving = {name: params[name] for name in self.moving}
        still = {name: leaf for name, leaf in params.items() if name not in moving}
        return mo.minimize(
            loss, self.optimizer, moving, passage, meta=still, differentiate=rule
        ).losses

    @torch.no_grad()
    def read_all(self, passages: Passage, at_once: int = 16) -> Tensor:
        """Return the losses of many passages, [passages, chunks]; each begins anew."""
        found = vmap(lambda one: self.read(self.net.params, one), chunk_size=at_once)(passages)
        return found  # type: ignore[no-any-return]


class Learning:
    """Descends the mean loss of `way.read` over drawn passages, with Adam.

    Args:
        way: what is trained, with its optimizer.
        draw: draws the passages of a step.
        rates: of Adam, for the model and for the optimizer.
        schedule: the factor on them at a step.
        rule: how gradients pass through a passage.
        generator: what `draw` draws from.
    """

    def __init__(
        self,
        way: Way,
        draw: Callable[[], Passage],
        rates: tuple[float, float],
        schedule: Callable[[int], float],
        rule: mo.Rule,
        generator: torch.Generator,
    ):
        self.way, self.draw, self.generator = way, draw, generator
        learned = [] if way.optimizer is None else [*way.optimizer.parameters()]
        groups = [[*way.model.parameters()], learned]
        self.groups = [group for group in groups if group]
        pairs = zip(self.groups, rates, strict=False)
        self.outer = torch.optim.Adam(
            [{"params": group, "lr": rate} for group, rate in pairs], betas=(0.9, 0.98)
        )
        self.decay = torch.optim.lr_scheduler.LambdaLR(self.outer, schedule)
        self.meta_gradient = mo.meta_grad(
            lambda params, passage: way.read(params, passage, rule).mean(), learn=way.optimizer
        )

    def step(self) -> dict[str, float]:
        way = self.way
        grads, losses = self.meta_gradient(way.net.params, self.draw())
        if way.optimizer is not None:
            grads, of_optimizer = grads
            mo.assign_grads(way.optimizer, of_optimizer)
        mo.assign_grads(way.model, grads)
        for group in self.groups:
            nn.utils.clip_grad_norm_(group, 1.0)
        self.outer.step()
        self.decay.step()
        if isinstance(way.optimizer, SGD):  # a rate below 0 would climb
            for rate in way.optimizer.parameters():
                rate.detach().clamp_(min=0)
        return {"bits per character": losses.mean().tolist() / math.log(2)}

    def state_dict(self) -> dict[str, Any]:
        learned = self.way.optimizer
        return {
            "model": self.way.model.state_dict(),
            "optimizer": {} if learned is None else learned.state_dict(),
            "outer": self.outer.state_dict(),
            "decay": self.decay.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.way.model.load_state_dict(state["model"])
        if self.way.optimizer is not None:
            self.way.optimizer.load_state_dict(state["optimizer"])
        self.outer.load_state_dict(state["outer"])
        self.decay.load_state_dict(state["decay"])
        self.generator.set_state(state["generator"])


class Data(NamedTuple):
    """What is trained on, the validation documents, and the test documents of each sort."""

    alphabet: Alphabet
    training: Documents
    validation: Passage
    test: dict[str, Passage]


def read_data(config: Config) -> Data:
    """Split documents of both sorts by their names, and cut them into chunks."""
    shortest = config.length * config.chunk
    parts = {}
    for sort, texts in {"sources": library(), "topics": topics()}.items():
        long = {name: text for name, text in texts.items() if len(text) >= shortest}
        parts[sort] = split_by_name(long, SHARES[sort])
        if not all(parts[sort]):
            raise ValueError(
                f"`length` times `chunk` must leave {sort} for training, validation and test, got "
                f"{config.length} times {config.chunk}: only {len(long)} have as many characters. "
                "Read fewer chunks."
            )
    chosen = [sort for sort in parts if config.train in ("both", sort)]
    training = [text for sort in chosen for text in parts[sort][0].values()]
    alphabet = Alphabet.most_frequent(training, SYMBOLS)

    def documents(texts: Iterable[str]) -> Documents:
        return Documents(texts, alphabet, window=config.window, chunk=config.chunk)

    def some(sort: str, part: int) -> list[str]:
        return [*parts[sort][part].values()][: config.documents]

    validation = [text for sort in chosen for text in some(sort, 1)]
    test = {sort: documents(some(sort, 2)).beginnings(config.length) for sort in parts}
    characters = sum(len(text) for text in training)
    print(
        f"training on {len(training)} documents with {characters} characters, validation on "
        f"{len(validation)}; test on "
        + " and ".join(f"{len(passage.seen)} {sort}" for sort, passage in test.items())
        + f", of each the first {shortest} characters"
    )
    beginnings = documents(validation).beginnings(config.length)
    return Data(alphabet, documents(training), beginnings, test)


def draw_passages(
    documents: Documents, generator: torch.Generator, way: Way, passages: int, chunks: int
) -> Passage:
    """Draw passages, or for a model that does not change as many chunks from anywhere, as one."""
    if way.optimizer is not None:
        return documents.draw(generator, passages, chunks)
    seen, wanted = documents.draw(generator, passages * chunks, 1)
    return Passage(seen.transpose(0, 1), wanted.transpose(0, 1))


def train(config: Config, data: Data, seed: int) -> tuple[dict[str, Way], dict[str, float]]:
    """Return the four ways, trained, and the CPU seconds that each training took."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    seconds: dict[str, float] = {}

    def fit(name: str, way: Way, steps: int, lr: float) -> None:
        first = name == PRETRAINING
        size = (1, PRETRAINING_CHUNKS) if first else (config.passages, config.chunks)
        draw = partial(draw_passages, data.training, generator, way, *size)
        schedule = partial(warm_up if first else fall, steps=steps)
        of_optimizer = config.rate_lr if name == RATES else config.optimizer_lr
        rates, rule = (lr, of_optimizer), make_rule(config)
        learning = Learning(way, draw, rates, schedule, rule, generator)
        logger = mo.TensorBoardLogger(config.out / f"{name}, seed {seed}")
        started = time.process_time()
        mo.Trainer(
            learning,
            max_steps=steps,
            logger=logger,
            label=name,
            **command_line.saved(config, f"{name}, seed {seed}"),
            checkpoint_every=50,
        ).fit()
        seconds[name] = time.process_time() - started

    model = ChunkTransformer(
        data.alphabet.size,
        window=config.window,
        chunk=config.chunk,
        width=config.width,
        blocks=config.blocks,
    )
    fit(PRETRAINING, Way(model, None, ""), config.pretrain_steps, config.pretrain_lr)
    last = f"blocks.{config.blocks - 1}."
    prefix = {"mlp": f"{last}mlp.", "block": last, "all": ""}[config.adapt]
    static = Way(copy.deepcopy(model), None, prefix)
    start = {name: nn.Parameter(torch.tensor(config.rate)) for name in static.moving}
    ways = {
        STATIC: static,
        RATES: Way(copy.deepcopy(model), SGD(lr=start), prefix),
        LEARNED: Way(copy.deepcopy(model), make_learned(config, seed), prefix),
    }
    for name, way in ways.items():
        steps = (config.static_steps if name == STATIC else None) or config.steps
        fit(name, way, steps, config.lr)
    started = time.process_time()
    ways[DYNAMIC] = tune(static, config.grid, data.validation)
    seconds[DYNAMIC] = time.process_time() - started
    return {name: ways[name] for name in (STATIC, DYNAMIC, RATES, LEARNED)}, seconds


def warm_up(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / min(100, steps))


def fall(step: int, steps: int) -> float:
    return min((step + 1) / 5, 1 - step / steps)


def make_rule(config: Config) -> mo.Rule:
    memory = mo.Revolve(config.snapshots) if config.memory == "revolve" else config.memory
    return mo.Backprop(memory=memory)


def make_learned(config: Config, seed: int) -> mo.Optimizer:
    if config.optimizer == "mlp":
        return MLPOptimizer(config.hidden_size, step_size=config.step_size, seed=seed)
    return LSTMOptimizer(config.hidden_size, scale=config.step_size, seed=seed)


def tune(static: Way, grid: tuple[float, ...], validation: Passage) -> Way:
    """Return dynamic evaluation of a trained model, with the rate that reads validation best."""
    ways = {rate: Way(static.model, SGD(rate), static.prefix) for rate in grid}
    means = {rate: way.read_all(validation).mean().tolist() for rate, way in ways.items()}
    return ways[min(grid, key=lambda rate: math.inf if math.isnan(means[rate]) else means[rate])]


def save(way: Way, folder: Path) -> None:
    """Write the weights at which it begins to read, and its optimizer."""
    folder.mkdir(exist_ok=True)
    weights = {name: leaf.detach().contiguous() for name, leaf in way.net.params.items()}
    save_file(weights, folder / "model.safetensors")
    if way.optimizer is not None:
        way.optimizer.save(folder / "optimizer.safetensors")


def main(config: Config) -> dict[str, dict[str, Tensor]]:
    """Train and test; return bits per character by sort and way, [seeds, documents, chunks]."""
    torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    data = read_data(config)
    curves: dict[str, dict[str, list[Tensor]]] = {sort: {} for sort in data.test}
    runs: list[dict[str, Any]] = []
    for seed in config.seeds:
        ways, seconds = train(config, data, seed)
        for name, way in ways.items():
            save(way, config.out / f"{name}, seed {seed}")
        learned = {name: str(way.optimizer) for name, way in ways.items()}
        runs.append({"seed": seed, "seconds": seconds, "optimizers": learned})
        for name, way in ways.items():
            started = time.process_time()
            for sort, passages in data.test.items():
                bits = way.read_all(passages) / math.log(2)
                curves[sort].setdefault(name, []).append(bits)
            seconds[f"{name}, test"] = time.process_time() - started
        found = {
            sort: {name: torch.stack(bits) for name, bits in by_way.items()}
            for sort, by_way in curves.items()
        }
        report = write_report(found, runs, config.chunk)  # after each seed, of all so far
        print(report.text)
        (config.out / "report.json").write_text(
            json.dumps({"config": asdict(config), **report.figures}, default=str, indent=1)
        )
        plot(found, config.chunk, config.out / "reading.png")
    print(f"Plot, figures and TensorBoard events: {config.out}")
    return found


if __name__ == "__main__":
    command_line.run(main, Config, shares=False)  # it pretrains on one passage at a time
