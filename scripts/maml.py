"""Model-agnostic meta-learning: an initialisation from which a few gradient steps learn a new task.

    python scripts/maml.py sinusoid --compile
    python scripts/maml.py sinusoid --compile --schedule lstm   # inner rates are learned too
    python scripts/maml.py omniglot --data FOLDER_OR_ZIP --ways 5 --shots 1

Inner steps are differentiated exactly, or not at all with --first-order. Finn, Abbeel, Levine 2017,
arXiv:1703.03400.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from inner_schedule import Kind, make_inner
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import metaopt as mo
from metaopt import tree
from metaopt._functional import Params
from metaopt.extras import extra
from metaopt.tasks.episode import Episode
from metaopt.tasks.omniglot import CharacterTasks, conv4, read_omniglot, split_alphabets
from metaopt.tasks.sinusoid import Sinusoids, sinusoid_mlp
from optimizers import SGD

with extra("scripts/maml.py"):
    import command_line
    from maml_plots import mean_and_margin, plot_omniglot, plot_sinusoid
    from tabulate import tabulate

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Params, Batch], Tensor]
FINE_TUNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
VALIDATION_SEED, TEST_SEED = 1_000_001, 1_000_002  # the same tasks whatever the training seed


@dataclass(kw_only=True)
class Config:
    """What both experiments have."""

    shots: int
    """examples (of each class) to adapt on"""
    queries: int
    """examples (of each class) that judge the adapted network in training"""
    test_queries: int
    """examples (of each class) that judge the adapted network in the test"""
    inner_lr: float
    """step size of the adaptation"""
    inner_steps: int = 1
    """gradient steps of the adaptation in training"""
    test_steps: tuple[int, ...]
    """numbers of gradient steps after which the test looks"""
    meta_batch: int
    """tasks in a meta-gradient"""
    max_steps: int
    """meta-gradients"""
    pretrain_steps: int
    """gradients of the pretraining that MAML is compared with"""
    lr: float = 1e-3
    """step size of the outer Adam"""
    first_order: bool = False
    """hold inner gradients constant (FOMAML)"""
    schedule: Kind = "none"
    """schedule of the inner rate, learned together with the initialisation"""
    per_tensor: bool = False
    """a schedule of its own for each tensor of the network"""
    schedule_lr: float = 1e-2
    """step size of the outer Adam for the schedule"""
    test_tasks: int = 600
    """tasks in the test"""
    seed: int = 0
    """seed of the initialisation and of the training tasks"""
    out: Path
    """folder for weights, plot, checkpoints and TensorBoard events"""
    resume: bool = False
    """go on from the newest checkpoints in `out`"""


@dataclass(kw_only=True)
class SinusoidConfig(Config):
    """Regression of sine waves from a few points."""

    shots: int = 10
    queries: int = 10
    test_queries: int = 100
    inner_lr: float = 0.01
    inner_steps: int = 5
    test_steps: tuple[int, ...] = (0, 1, 2, 3, 5, 10)
    meta_batch: int = 25
    max_steps: int = 30000
    pretrain_steps: int = 10000
    out: Path = Path("runs/maml-sinusoid")
    compile: bool = False
    """compile the meta-gradient; needs a C++ compiler"""


@dataclass(kw_only=True)
class OmniglotConfig(Config):
    """N-way K-shot classification of characters from alphabets that training never saw."""

    data: Path
    """an official images_*.zip, or a folder that holds some"""
    ways: int = 5
    """classes of a task"""
    shots: int = 1
    queries: int = 5
    test_queries: int = 15
    inner_lr: float = 0.4
    test_steps: tuple[int, ...] = (0, 1, 3, 10)
    meta_batch: int = 8
    max_steps: int = 2500
    pretrain_steps: int = 1500
    out: Path = Path("runs/maml-omniglot")
    filters: int = 32
    """channels of each of the four convolutions"""
    test_alphabets: tuple[str, ...] = ()
    """alphabets to hold out; by default the last two in five by name"""


class MetaLearning:
    """Descends the average of `task_loss` over sampled tasks with Adam."""

    def __init__(
        self,
        model: nn.Module,
        task_loss: Callable,
        sample: Callable[[torch.Generator], Any],
        config: Config,
        inner: nn.Module | None = None,
        **batching: Any,
    ):
        self.model, self.sample = model, sample
        self.net = mo.functional(model)
        # an optimizer with a constant rate has nothing to learn
        self.trained = [model, *([inner] if inner and list(inner.parameters()) else [])]
        learn = {"learn": inner} if len(self.trained) > 1 else {}
        self.meta_gradient = mo.meta_grad(task_loss, **learn, **batching)
        rates = (config.lr, config.schedule_lr)
        groups = [
            {"params": [*module.parameters()], "lr": lr}
            for module, lr in zip(self.trained, rates, strict=False)
        ]
        self.outer = torch.optim.Adam(groups)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.losses: list[float] = []

    def step(self) -> dict[str, float]:
        found, losses = self.meta_gradient(self.net.params, self.sample(self.generator))
        grads = found if len(self.trained) > 1 else (found,)
        for module, own in zip(self.trained, grads, strict=True):
            mo.assign_grads(module, own)
        self.outer.step()
        self.losses.append(losses.mean().item())
        return {"query loss": self.losses[-1]}

    def state_dict(self) -> dict[str, Any]:
        return {
            "trained": [module.state_dict() for module in self.trained],
            "outer": self.outer.state_dict(),
            "generator": self.generator.get_state(),
            "losses": self.losses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for module, own in zip(self.trained, state["trained"], strict=True):
            module.load_state_dict(own)
        self.outer.load_state_dict(state["outer"])
        self.generator.set_state(state["generator"])
        self.losses = [*state["losses"]]

    def fit(self, name: str, steps: int, config: Config) -> None:
        """Train, with events and weights in `config.out`."""
        mo.Trainer(
            self,
            max_steps=steps,
            logger=mo.TensorBoardLogger(config.out / name),
            label=name,
            **command_line.saved(config, name),
        ).fit()
        weights = {
            key: tensor.contiguous().clone() for key, tensor in self.model.state_dict().items()
        }
        save_file(
            weights,
            config.out / f"{name}.safetensors",
            metadata={"config": json.dumps(asdict(config), default=str)},
        )


def inner_of(config: Config, names: Iterable[str]) -> SGD:
    """Return the optimizer that adapts, of parameters with these names."""
    return make_inner(
        config.schedule,
        config.inner_lr,
        config.inner_steps,
        names if config.per_tensor else (),
        config.seed,
    )


def maml_loss(
    loss: Loss, config: Config, inner: SGD | None = None
) -> Callable[[Params, Episode], Tensor]:
    """Return L(w'; query), where w' is w after steps of `inner` on the support set."""
    rule = mo.FirstOrder() if config.first_order else mo.Backprop()
    optimizer = inner or SGD(lr=config.inner_lr)

    def task_loss(params: Params, task: Episode) -> Tensor:
        adapted = mo.minimize(
            loss, optimizer, params, task.support, steps=config.inner_steps, differentiate=rule
        ).params
        return loss(adapted, task.query)

    return task_loss


@torch.no_grad()
def adapt(
    loss: Loss, inner: float | SGD, steps: Sequence[int], params: Params, task: Episode
) -> list[Params]:
    """Return the parameters after each of these numbers of steps on the support set."""
    optimizer = inner if isinstance(inner, SGD) else SGD(lr=inner)
    path, state = [], optimizer.init(params)
    for done, wanted in zip((0, *steps), steps, strict=False):
        if wanted > done:
            params, state, *_ = mo.minimize(
                loss, optimizer, params, task.support, steps=wanted - done, opt_state=state
            )
        path.append(params)
    return path


def fine_tune(
    curves: Callable[[float, Episode], Tensor],
    rates: Sequence[float],
    validation: Episode,
    test: Episode,
    *,
    larger_is_better: bool,
) -> tuple[Tensor, list[float]]:
    """Return (scores [test tasks, steps], learning rates).

    For each number of steps the rate is the one that does best on validation tasks.
    """
    means = torch.stack([curves(rate, validation).mean(0) for rate in rates]) * (
        1 if larger_is_better else -1
    )
    best = [rates[row] for row in means.nan_to_num(nan=-math.inf).argmax(0).tolist()]
    scores = {rate: curves(rate, test) for rate in set(best)}
    return torch.stack([scores[rate][:, column] for column, rate in enumerate(best)], dim=1), best


def run_sinusoid(config: SinusoidConfig) -> dict[str, Tensor]:
    """Train, test, and write everything into `config.out`.

    The result is squared errors [test tasks, steps] by method.
    """
    torch.manual_seed(config.seed)
    model, pretrained, waves = sinusoid_mlp(), sinusoid_mlp(), Sinusoids()
    net = mo.functional(model)

    def loss(params: Params, batch: Batch) -> Tensor:
        x, y = batch
        return F.mse_loss(net(params, x), y)

    def curves(params: Params, inner: float | SGD, tasks: Episode) -> Tensor:
        def one(task: Episode) -> Tensor:
            return torch.stack(
                [
                    loss(adapted, task.query)
                    for adapted in adapt(loss, inner, config.test_steps, params, task)
                ]
            )

        with torch.no_grad():
            return torch.func.vmap(one)(tasks)

    sample = partial(
        waves.sample, tasks=config.meta_batch, shots=config.shots, queries=config.queries
    )
    inner = inner_of(config, net.params)
    MetaLearning(
        model, maml_loss(loss, config, inner), sample, config, inner, compile=config.compile
    ).fit("maml", config.max_steps, config)
    inner.save(config.out / "inner.safetensors")

    def joint(params: Params, task: Episode) -> Tensor:
        return loss(params, task.query)

    MetaLearning(pretrained, joint, sample, config, compile=config.compile).fit(
        "pretrained", config.pretrain_steps, config
    )
    draw = partial(
        waves.sample, tasks=config.test_tasks, shots=config.shots, queries=config.test_queries
    )
    validation, test = (
        draw(torch.Generator().manual_seed(seed)) for seed in (VALIDATION_SEED, TEST_SEED)
    )
    start = mo.functional(pretrained).params
    fine_tuned, best = fine_tune(
        partial(curves, start), FINE_TUNING_RATES, validation, test, larger_is_better=False
    )
    scores = {
        "MAML": curves(net.params, inner, test),
        "pretrained, rate tuned": fine_tuned,
    }
    report("mean squared error", scores, config, {"pretrained, rate tuned": best})
    kind = f"rate {config.inner_lr:g}" if config.schedule == "none" else config.schedule
    starts = {
        f"MAML, {kind}": (net.params, inner),
        f"pretrained, rate {best[-1]:g}": (start, best[-1]),
    }
    steps = (0, 1, config.test_steps[-1])
    adapted: dict[str, list] = {}
    for name, (params, lr) in starts.items():
        waves = adapted[name] = []
        for task in (tree.index(test, index) for index in range(2)):
            path = adapt(loss, lr, steps, params, task)
            waves.append(
                (
                    task,
                    {
                        f"gradient steps: {n}": net(at, task.query[0]).detach()
                        for n, at in zip(steps, path, strict=True)
                    },
                )
            )
    plot_sinusoid(config.out / "maml.png", scores, config.test_steps, adapted)
    return scores


def run_omniglot(config: OmniglotConfig) -> dict[str, Tensor]:
    """Train, test, and write everything into `config.out`.

    The result is accuracies [test tasks, steps] by method.
    """
    torch.manual_seed(config.seed)
    seen, unseen = split_alphabets(read_omniglot(config.data), config.test_alphabets)
    train = CharacterTasks(seen, rotations=True)
    validate_on = CharacterTasks(seen)
    test_on = CharacterTasks(unseen)
    print(
        f"training on {train.characters} characters of {', '.join(seen)}; test on "
        f"{test_on.characters} of {', '.join(unseen)}"
    )
    counts = {"ways": config.ways, "shots": config.shots, "queries": config.test_queries}
    validation = validate_on.sample(torch.Generator().manual_seed(VALIDATION_SEED), 40, **counts)
    test = test_on.sample(torch.Generator().manual_seed(TEST_SEED), config.test_tasks, **counts)
    # channels last is a third faster on CPU through both derivatives; `vmap` cannot take it, hence
    # chunk_size=1 below
    model = conv4(config.ways, config.filters).to(memory_format=torch.channels_last)
    net = mo.functional(model)
    untrained = tree.map(lambda tensor: tensor.detach().clone(), net.params)

    def loss(params: Params, batch: Batch) -> Tensor:
        images, labels = batch
        return F.cross_entropy(net(params, images), labels)

    def curves(params: Params, inner: float | SGD, tasks: Episode) -> Tensor:
        def one(task: Episode) -> Tensor:
            images, labels = task.query
            return torch.stack(
                [
                    accuracy(net(adapted, images), labels)
                    for adapted in adapt(loss, inner, config.test_steps, params, task)
                ]
            )

        with torch.no_grad():
            return torch.stack([one(task) for task in each(tasks, "adapting")])

    sample = partial(
        train.sample,
        tasks=config.meta_batch,
        ways=config.ways,
        shots=config.shots,
        queries=config.queries,
    )
    inner = inner_of(config, net.params)
    training = MetaLearning(
        model, maml_loss(loss, config, inner), sample, config, inner, chunk_size=1
    )
    training.fit("maml", config.max_steps, config)
    fine_tuned, best = fine_tune(
        partial(curves, untrained), FINE_TUNING_RATES, validation, test, larger_is_better=True
    )
    scores = {
        "MAML": curves(net.params, inner, test),
        "random initialisation, rate tuned": fine_tuned,
    }
    scores["pretrained features, nearest centroid"] = nearest_centroid(train, test, config)
    report("accuracy", scores, config, {"random initialisation, rate tuned": best})
    task = tree.index(test, 0)
    (adapted,) = adapt(loss, inner, config.test_steps[-1:], net.params, task)
    right = net(adapted, task.query[0]).argmax(-1) == task.query[1]
    title = f"Omniglot, {config.ways}-way {config.shots}-shot, on alphabets not seen in training: "
    title += ", ".join(unseen)
    plot_omniglot(
        config.out / "maml.png", scores, config.test_steps, task, right, training.losses, title
    )
    return scores


def nearest_centroid(train: CharacterTasks, test: Episode, config: OmniglotConfig) -> Tensor:
    """Return accuracies [test tasks, 1] by the nearest class mean.

    The features are trained to tell all training characters apart.
    """
    model = conv4(len(train.classes), config.filters)
    net = mo.functional(model)

    def loss(params: Params, batch: Batch) -> Tensor:
        images, labels = batch
        return F.cross_entropy(net(params, images), labels)

    def sample(generator: torch.Generator) -> Batch:
        images, labels = train.batch(generator, 64)
        return images[None], labels[None]  # one task without an inner loop

    MetaLearning(model, loss, sample, config, chunk_size=1).fit(
        "pretrained", config.pretrain_steps, config
    )
    features = nn.Sequential(*list(model)[:-1])

    def one(task: Episode) -> Tensor:
        support = F.normalize(features(task.support[0]))
        query = F.normalize(features(task.query[0]))
        centroids = torch.stack(
            [support[task.support[1] == label].mean(0) for label in range(config.ways)]
        )
        return accuracy(-torch.cdist(query, centroids), task.query[1])

    with torch.no_grad():
        return torch.stack([one(task) for task in each(test, "classifying")])[:, None]


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of rows whose largest entry is at the label."""
    return (logits.argmax(-1) == labels).float().mean()


def each(tasks: Episode, label: str) -> Iterator[Episode]:
    """Yield the tasks one by one, in a terminal under a progress bar."""
    for index in tqdm(range(len(tree.leaves(tasks)[0])), desc=label, leave=False, disable=None):
        yield tree.index(tasks, index)


def report(
    what: str, scores: dict[str, Tensor], config: Config, rates: dict[str, list[float]]
) -> None:
    """Print the table, and write it into `config.out`."""
    rows = [
        [
            name,
            *(
                f"{mean:.3f} ± {margin:.3f}"
                for mean, margin in zip(*mean_and_margin(s), strict=True)
            ),
        ]
        for name, s in scores.items()
    ]
    table = tabulate(
        rows,
        headers=[f"gradient steps (inner lr {config.inner_lr})", *config.test_steps],
        tablefmt="github",
    )
    tuned = [
        f"{name}: the best rates on other tasks are "
        + ", ".join(
            f"{rate:g} for {n}" for n, rate in zip(config.test_steps, best, strict=True) if n
        )
        + " steps."
        for name, best in rates.items()
    ]
    text = "\n\n".join(
        [f"{what} on {config.test_tasks} new tasks, mean ± 95 % interval", table, *tuned]
    )
    print(f"\n{text}")
    (config.out / "report.md").write_text(text + "\n")


def main(config: SinusoidConfig | OmniglotConfig) -> None:
    if isinstance(config, SinusoidConfig):
        torch.set_num_threads(1)  # tensors this small only make threads wait for each other
        run_sinusoid(config)
    else:
        run_omniglot(config)
    print(f"Plot, weights and TensorBoard events: {config.out}")


CONFIGS = {"sinusoid": SinusoidConfig, "omniglot": OmniglotConfig}

if __name__ == "__main__":
    command_line.run(main, CONFIGS, __doc__)
