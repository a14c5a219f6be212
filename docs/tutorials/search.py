# %% [markdown]
# # Search over the discrete rest with Ax
#
# Gradients learn rates, weights and schedules. Some choices have no gradient: which optimizer, how
# wide a network, how many inner steps. They are the discrete rest. Here a search by
# [Ax](https://ax.dev) makes these choices, above a graph of levels in which gradients learn the
# rest.
#
# You need metaopt with the extras `scripts` and `blackbox` ([install](../get-started.md#install)),
# and a minute on one core.

# %%
import itertools

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import metaopt as mo
from metaopt.optimizers import SGD, Adam
from metaopt.tasks.corruption import flip_labels, stratified_split

# %% [markdown]
# ## The problem below
#
# The graph is that of [Clean a data set with meta-weight-net](meta-weight-net.md). The learner
# reads digits of which 40 % have a wrong label; above it, a weight net learns which examples to
# believe. What a search can add is the rest: the learner's optimizer and its rate, its width, its
# activation, and the number of its steps for each step of the weight net.

# %%
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}
STEPS = 180  # of the learner, in each trial

images, truth = mo.tasks.table("digits")
generator = torch.Generator().manual_seed(0)
clean, validation, train, test = stratified_split(truth, (10, 20, 80), generator)
given = flip_labels(truth[train], 0.4, 10, generator)


def learner_loss(levels, batch):
    losses = F.cross_entropy(levels.learner(batch[0]), batch[1], reduction="none")
    weights = levels.weights(losses.detach()[:, None]).squeeze(1)
    return (weights * losses).sum() / weights.sum()


def clean_loss(levels, batch):
    return F.cross_entropy(levels.learner(batch[0]), batch[1])


# %% [markdown]
# ## One trial
#
# A trial gets values, builds the graph with them, trains it, and returns a number: the loss on 200
# clean examples that no level has seen. All trials take 180 steps of the learner, so all cost
# about the same.


# %%
def make_optimizer(values):
    if values["optimizer"] == "adam":
        return Adam(lr=values["adam_rate"])
    return SGD(lr=values["sgd_rate"], momentum=values["momentum"])


def loss_on(model, rows):
    with torch.no_grad():
        logits = model(images[rows])
    return F.cross_entropy(logits, truth[rows]).item(), (
        logits.argmax(1) != truth[rows]
    ).float().mean().item()


def train_and_validate(values):
    torch.manual_seed(0)
    width, activation = values["width"], ACTIVATIONS[values["activation"]]
    model = nn.Sequential(nn.Linear(64, width), activation(), nn.Linear(width, 10))
    weight_net = nn.Sequential(nn.Linear(1, 50), nn.ReLU(), nn.Linear(50, 1), nn.Sigmoid())
    batches = mo.Shuffled((images[train], given), batch_size=100, seed=0)
    learner = mo.Level("learner", model, learner_loss, make_optimizer(values), data=batches)
    weights = mo.Level(
        "weights", weight_net, clean_loss, Adam(lr=1e-3), data=[(images[clean], truth[clean])]
    )
    graph = mo.LevelGraph([mo.Edge(weights, learner, steps=values["inner_steps"])])
    for _ in range(STEPS // values["inner_steps"]):
        graph.step()
    loss, wrong = loss_on(model, validation)
    return {"loss": loss, "error": wrong, "test error": loss_on(model, test)[1]}


# %% [markdown]
# ## A space with conditions
#
# `Float`, `Int` and `Choice` are the kinds of values. `log=True` searches orders of magnitude. A
# condition `when=` says that a value exists only together with another one: momentum belongs to
# SGD, and each optimizer has a rate of its own.

# %%
space = {
    "optimizer": mo.Choice("sgd", "adam"),
    "sgd_rate": mo.Float(1e-3, 3.0, log=True, when={"optimizer": "sgd"}),
    "momentum": mo.Float(0.0, 0.95, when={"optimizer": "sgd"}),
    "adam_rate": mo.Float(1e-4, 0.3, log=True, when={"optimizer": "adam"}),
    "width": mo.Int(4, 128, log=True),
    "activation": mo.Choice("relu", "tanh"),
    "inner_steps": mo.Int(1, 12),
}

# %% [markdown]
# ## The search
#
# `Ax` begins with a few points that fill the space, and then models what it has seen. For
# comparison, random search makes the same number of trials, with three seeds.

# %%
TRIALS = 18


def search_with(backend):
    search = mo.BlackBox("meta-weight-net", space, backend=backend)
    search.run(train_and_validate, TRIALS, progress=False)
    return search


ax = search_with(mo.Ax(seed=0))
others = [search_with(mo.RandomSearch(seed=seed)) for seed in range(3)]

# %% [markdown]
# The best trials of Ax. An empty field is a value that does not exist in that trial.

# %% tags=["varies"]
print(ax.table(rows=6))


# %% Code of the picture tags=["fold"] alt="The least validation loss after each trial, for Ax and for random search with three seeds"
def best_so_far(search):
    losses = [trial.loss if trial.status == "done" else float("inf") for trial in search.trials]
    return torch.tensor(losses).cummin(0).values


figure, axis = plt.subplots(figsize=(7.2, 3))
numbers = range(1, TRIALS + 1)
for number, other in enumerate(others):
    axis.step(
        numbers,
        best_so_far(other),
        where="post",
        color="C5",
        linewidth=1.2,
        label=None if number else "random search, three seeds",
    )
axis.step(numbers, best_so_far(ax), where="post", color="C0", label="Ax")
axis.plot(numbers, [trial.loss for trial in ax.trials], "o", color="C0", markersize=4, alpha=0.5)
axis.set(
    xlabel="trial",
    ylabel="validation loss",
    yscale="log",
    ylim=(None, 5),
    xticks=range(2, TRIALS + 1, 2),
)
axis.set_yticks([0.25, 0.5, 1, 2], ["0.25", "0.5", "1", "2"])
axis.minorticks_off()
axis.set_title("points: each trial of Ax; lines: the best so far")
axis.legend()
plt.show()

# %% [markdown]
# All trials of Ax in one picture. Each line is a trial; it says which value it had on each axis. On
# the axis at the right, trials are in the order of their loss.

# %% Code of the picture tags=["fold"] alt="Parallel coordinates of all trials of Ax; the best five are blue"
names = [*space, "loss"]
ranked = sorted((trial for trial in ax.trials if trial.status == "done"), key=lambda t: -t.loss)


def height(name, trial):
    """Return where a trial stands on an axis, from 0 to 1; None where it has no such value."""
    if name == "loss":
        return 1 - ranked.index(trial) / (len(ranked) - 1)
    return space[name].to_unit(trial.values[name]) if name in trial.values else None


figure, axis = plt.subplots(figsize=(7.6, 3.6))
for rank, trial in enumerate(ranked):
    is_best = rank >= len(ranked) - 5
    color, alpha = ("C0", 0.9) if is_best else ("C5", 0.35)
    places = [(x, y) for x, name in enumerate(names) if (y := height(name, trial)) is not None]
    for (x, y), (next_x, next_y) in itertools.pairwise(places):
        line = "-" if next_x == x + 1 else ":"
        axis.plot([x, next_x], [y, next_y], line, color=color, alpha=alpha, linewidth=1.5)
axis.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
axis.set_yticks([0, 1], ["low", "high"])
axis.set_title("blue: the best five trials; dotted: over a value that is not there")
axis.grid(axis="y", visible=False)
plt.show()

# %% [markdown]
# ## What it found

# %% tags=["varies"]
random = torch.tensor([best_so_far(other)[-1] for other in others])
errors = [100 * search.best.metrics["test error"] for search in (ax, *others)]
print(f"validation loss after {TRIALS} trials: Ax {ax.best.loss:.2f}")
print("random search:", " ".join(f"{loss:.2f}" for loss in random))
print(f"test error of the best trial: Ax {errors[0]:.0f} %")
print("random search:", " ".join(f"{error:.0f} %" for error in errors[1:]))

# %% [markdown]
# In this run Ax found a region and then stayed there: Adam, tanh, a step of the weight net after
# each step of the learner. One search of each kind proves little: another seed gives another
# order. The guide has [five splits of the data for four backends](../guides/black-box.md#figures).
#
# Other backends are used in the same way: `mo.Optuna(seed)`, `mo.BoTorch(seed)`, `mo.Sobol(seed)`.
# With `journal="search.jsonl"` each trial is written down, and the same program continues after a
# crash. With `executor=` trials run in parallel.
#
# ## Where to go from here
#
# - [Search without gradients](../guides/black-box.md): conditions, journals, many processes, early
#   stopping
# - [Clean a data set with meta-weight-net](meta-weight-net.md): the graph below
# - [Three levels](three-levels.md): rates by gradients

# %% What this page claims, checked tags=["fold"]
assert all(trial.status == "done" for trial in ax.trials)
assert all(("momentum" in t.values) == (t.values["optimizer"] == "sgd") for t in ax.trials)
assert ax.best.loss < 1.2 * random.mean()
assert ax.best.metrics["test error"] < 0.15
