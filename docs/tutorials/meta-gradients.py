# %% [markdown]
# # Meta-gradients in ten minutes
#
# A training run is a function. Weights, data and settings go in; a loss comes out. metaopt runs the
# training and differentiates the loss with respect to any of them. This tutorial takes three such
# gradients on handwritten digits: of a learning rate, of twenty learning rates, and of the weights
# of the training examples. At the end it compares ways to compute them.
#
# You need metaopt with the extra `scripts` ([install](../get-started.md#install)). All of it runs
# in half a minute on one core.

# %%
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import metaopt as mo
from metaopt.optimizers import SGD, PerStep

# %% [markdown]
# ## A training run as a function
#
# The data are the 1,797 digits of scikit-learn, 8 x 8 pixels each. We train on 300 of them, look
# at 500 others to judge a run (validation), and keep the rest for the end (test).

# %%
images, labels = mo.tasks.table("digits")
train, validation, test = zip(images.split([300, 500, 997]), labels.split([300, 500, 997]))

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

# %% [markdown]
# `mo.functional(model)` is the model as a pure function of its parameters. `mo.minimize` runs an
# optimizer on a loss and returns the last parameters. It changes nothing in place; the model keeps
# its weights.

# %%
net = mo.functional(model)


def loss_fn(params, batch):
    x, y = batch
    return F.cross_entropy(net(params, x), y)


with torch.no_grad():
    out = mo.minimize(loss_fn, SGD(lr=0.1), net.params, train, steps=20)
print(f"training loss: {out.losses[0]:.2f} before, {loss_fn(out.params, train):.2f} after 20 steps")
print(f"validation loss: {loss_fn(out.params, validation):.2f} after 20 steps")

# %% [markdown]
# ## The gradient of a learning rate
#
# Is 0.1 a good learning rate? Make it a tensor that requires a gradient, train, and call
# `backward()` on the validation loss. The gradient flows back through all twenty steps.

# %%
lr = torch.tensor(0.1, requires_grad=True)
out = mo.minimize(loss_fn, SGD(lr=lr), net.params, train, steps=20)
loss_fn(out.params, validation).backward()
print(f"d loss / d lr = {lr.grad:.2f}")

# %% [markdown]
# It is negative: a larger rate would have been better. The gradient is exact, up to rounding. Two
# more training runs say the same:


# %%
def loss_after_training(lr, steps=20):
    out = mo.minimize(loss_fn, SGD(lr=lr), net.params, train, steps=steps)
    return loss_fn(out.params, validation)


with torch.no_grad():
    difference = (loss_after_training(0.101) - loss_after_training(0.099)) / 0.002
print(f"finite differences: {difference:.2f}")

# %% [markdown]
# The picture shows the validation loss over the learning rate. Each short line is drawn with one
# meta-gradient as its slope. Up to a rate of about 0.7 the curve is smooth and the slopes show the
# way down. Beyond, training overshoots, and the loss jumps from rate to rate. The gradient is still
# exact there, but it says little about the rates nearby. This is true for long or rough loops in
# general, and it is why there are other rules than backpropagation.

# %% Code of the picture tags=["fold"] alt="Validation loss after 20 steps over the learning rate, with its slope at six rates"
rates = torch.logspace(-2, 0.4, 160)
with torch.no_grad():
    losses = torch.stack([loss_after_training(rate) for rate in rates])

figure, axis = plt.subplots()
axis.plot(rates, losses, linewidth=1.5, label="loss after 20 steps")
for number, point in enumerate((0.02, 0.06, 0.15, 0.3, 0.5, 0.7)):
    at = torch.tensor(point, requires_grad=True)
    loss = loss_after_training(at)
    (slope,) = torch.autograd.grad(loss, at)
    near = torch.linspace(point / 1.35, point * 1.35, 20)
    tangent = loss.detach() + slope * (near - point)
    axis.plot(near, tangent, color="C1", label=None if number else "meta-gradient")
    axis.plot(point, loss.item(), "o", color="C1", markersize=5)
axis.set(xscale="log", xlabel="learning rate", ylabel="validation loss")
axis.set_xticks([0.01, 0.03, 0.1, 0.3, 1, 2], ["0.01", "0.03", "0.1", "0.3", "1", "2"])
axis.set_ylim(0, 2.6)
axis.legend()
plt.show()

# %% [markdown]
# ## Twenty learning rates at once
#
# Finite differences need two training runs for every number. One backward pass gives the gradient
# of any number of them. `PerStep` holds a learning rate for each of the twenty steps. We move them
# with plain Adam from torch, so that the validation loss falls:

# %%
rates = nn.Parameter(torch.full((20,), 0.1))
outer = torch.optim.Adam([rates], lr=0.05)
history = []
for _ in range(60):
    out = mo.minimize(loss_fn, SGD(lr=PerStep(rates)), net.params, train, steps=20)
    loss = loss_fn(out.params, validation)
    outer.zero_grad()
    loss.backward()
    outer.step()
    history.append(loss.item())
print(f"validation loss: {history[0]:.2f} at first, {history[-1]:.3f} after 60 meta-gradients")

# %% [markdown]
# A fair opponent is the best constant rate. We try 40 of them and keep the one with the lowest
# validation loss. Neither side has seen the test digits. Both are judged from five fresh
# initialisations too, since the rates were learned on one.

# %%
constants = torch.logspace(-2, 0.5, 40)


@torch.no_grad()
def run(optimizer, seed):
    """Train from another initialisation, and return (validation loss, test error)."""
    torch.manual_seed(seed)
    fresh = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    start = dict(fresh.named_parameters())
    params = mo.minimize(loss_fn, optimizer, start, train, steps=20).params
    wrong = net(params, test[0]).argmax(-1) != test[1]
    return loss_fn(params, validation).item(), wrong.float().mean().item()


best = min(constants, key=lambda rate: run(SGD(lr=rate), seed=0)[0])
learned = PerStep(rates.detach())
errors = {}
for name, schedule in (("best constant rate", best), ("learned rates", learned)):
    errors[name] = torch.tensor([run(SGD(lr=schedule), seed)[1] for seed in range(1, 6)])
    mean, deviation = errors[name].mean(), errors[name].std()
    print(f"test error, {name}: {mean:.3f}, standard deviation over five starts {deviation:.3f}")

# %% Code of the picture tags=["fold"] alt="The twenty learned rates beside the best constant rate, and the validation loss falling while they are learned"
figure, (left, right) = plt.subplots(1, 2)
left.bar(range(1, 21), learned.values, color="C0", label="learned")
left.axhline(best, color="C1", label="best constant")
left.set(xlabel="step of the training run", ylabel="learning rate", xticks=[1, 5, 10, 15, 20])
left.set_ylim(0, 1.35 * learned.values.max())
left.legend(loc="upper left", ncols=2)
right.plot(history, color="C0", label="learned")
right.axhline(run(SGD(lr=best), seed=0)[0], color="C1", label="best constant")
right.set(xlabel="meta-gradients", ylabel="validation loss", ylim=(0, None))
right.legend()
plt.show()

# %% [markdown]
# ## The gradient of a data set
#
# Now 60 of the 300 training digits get a wrong label. Which ones? Give each example a weight, all
# 1, and ask how the validation loss would change with each weight. These weights go in as `meta`,
# and the loss gets them as its third argument.

# %%
generator = torch.Generator().manual_seed(0)
is_wrong = torch.zeros(300, dtype=torch.bool)
is_wrong[torch.randperm(300, generator=generator)[:60]] = True
other = (train[1] + torch.randint(1, 10, (300,), generator=generator)) % 10
noisy = train[0], torch.where(is_wrong, other, train[1])


def weighted_loss(params, batch, weights):
    x, y = batch
    return (weights * F.cross_entropy(net(params, x), y, reduction="none")).mean()


weights = torch.ones(300, requires_grad=True)
out = mo.minimize(weighted_loss, SGD(lr=0.5), net.params, noisy, steps=50, meta=weights)
loss_fn(out.params, validation).backward()

# %% [markdown]
# A positive gradient means: with more of this example, the validation loss would rise. One
# training run and one backward pass score all 300 examples. We look at the 60 with the largest
# gradients. For comparison we take the 60 with the largest training loss, a common rule of thumb.

# %%
with torch.no_grad():
    training_loss = F.cross_entropy(net(out.params, noisy[0]), noisy[1], reduction="none")
found = {}
for name, score in (("meta-gradient", weights.grad), ("training loss", training_loss)):
    found[name] = is_wrong[score.argsort(descending=True)[:60]].sum().item()
    print(f"of the 60 examples with the largest {name}, {found[name]} have a wrong label")

# %% Code of the picture tags=["fold"] alt="Histogram of the meta-gradients of right and of wrong examples: the wrong ones lie to the right"
figure, axis = plt.subplots(figsize=(7.2, 3))
scores = 1000 * weights.grad
bins = torch.linspace(scores.min(), scores.max(), 45)
axis.hist(scores[~is_wrong], bins, color="C0", alpha=0.8, label="right label")
axis.hist(scores[is_wrong], bins, color="C3", alpha=0.7, label="wrong label")
axis.axvline(0, color="0.5", linewidth=1)
axis.set(xlabel="d validation loss / d weight, in thousandths", ylabel="examples")
axis.legend()
plt.show()

# %% [markdown]
# The rule of thumb is as good here, and a little better. But it can only find examples that do not
# fit. The gradient says what each example does to the loss you care about, for any reason. [Clean a
# data set with meta-weight-net](meta-weight-net.md) continues from here and trains with learned
# weights.
#
# ## Rules: how the gradient is computed
#
# Backpropagation keeps every step in memory. If that takes too much memory or time, pass another
# *rule* as `differentiate=`. The loop and the loss stay as they are.
#
# First the time. We take the gradient of the learning rate through 100 steps, by each rule in
# turn, three times, and keep the median of the CPU times.

# %%
rules = {
    "everything": mo.Backprop(),
    "all states": mo.Backprop(memory="steps"),
    "eight states": mo.Backprop(memory=mo.Revolve(8)),
    "forward mode": mo.ForwardMode(),
    "last 20 steps": mo.Backprop(window=20),
    "first order": mo.FirstOrder(),
}
start = mo.tree.map(torch.Tensor.detach, net.params)  # only the rate is asked for
seconds = {name: [] for name in rules}
for _ in range(3):
    for name, rule in rules.items():
        lr = torch.tensor(0.1, requires_grad=True)
        begin = time.process_time()
        out = mo.minimize(loss_fn, SGD(lr=lr), start, train, steps=100, differentiate=rule)
        loss_fn(out.params, validation).backward()
        seconds[name].append(time.process_time() - begin)
times = {name: sorted(found)[1] for name, found in seconds.items()}

# %% [markdown]
# Memory and error are measured by `mo.compare_rules`. It takes the problem as a graph of levels:
# below, the network, which makes 100 steps; above, its optimizer, whose learning rate is learned.
# The [guide to levels](../guides/levels.md) explains the notation.


# %% tags=["varies"]
def level_loss(levels, batch):
    x, y = batch
    return F.cross_entropy(levels.network(x), y)


inner = SGD(lr=nn.Parameter(torch.tensor(0.1)))
network = mo.Level("network", model, level_loss, inner, data=[train])
rate = mo.Level("rate", inner, level_loss, SGD(lr=0.1), data=[validation])
graph = mo.LevelGraph([mo.Edge(upper=rate, lower=network, steps=100)])
comparison = mo.compare_rules(graph, list(rules.values())[1:], "rate", repeats=1)

print(f"{'kept':14}{'relative error':>15}{'time':>7}{'MiB':>7}")
for name, measured in zip(rules, comparison.rules):
    relative, memory = times[name] / times["everything"], measured.memory / 2**20
    print(f"{name:14}{measured.relative_error:15.3f}{relative:7.1f}{memory:7.2f}")

# %% Code of the picture tags=["fold"] alt="Time and memory of six rules; those that are exact need between a small part of the memory and all of it"
figure, axis = plt.subplots()
for name, measured in zip(rules, comparison.rules):
    is_exact = measured.relative_error < 1e-3
    across, up = times[name] / times["everything"], measured.memory / 2**20
    axis.plot(across, up, "o" if is_exact else "s", color="C0" if is_exact else "C1", markersize=8)
    axis.annotate(name, (across, up), (8, 4), textcoords="offset points")
axis.plot([], [], "o", color="C0", label="exact")
axis.plot([], [], "s", color="C1", label="approximate")
axis.set(xlabel="time, in that of plain backpropagation", ylabel="memory in MiB", yscale="log")
axis.margins(x=0.3, y=0.2)
axis.set_xlim(0, None)
axis.set_yticks([0.3, 1, 3, 10], ["0.3", "1", "3", "10"])
axis.minorticks_off()
axis.legend()
plt.show()

# %% [markdown]
# - `memory="steps"` and `memory=Revolve(n)` repeat steps in the backward pass. The gradient is the
#   same, memory falls, and time grows.
# - `ForwardMode()` carries the derivative along with the steps. It keeps nothing, and its time
#   grows with the number of things that are learned. Here that is one.
# - A window and `FirstOrder()` leave something out. The column "relative error" says how much. It
#   is not small: leave something out only where you know that it does not matter.
# - The times are those of a small network, relative to the first. For a large one the order may
#   differ.
#
# ## Where to go from here
#
# - [How to choose a rule](../choose/rule.md), and [a memory](../choose/memory.md)
# - [Long loops and memory](../guides/long-loops.md)
# - [Learn a schedule](schedule.md) learns a whole curve of learning rates on minibatches

# %% What this page claims, checked tags=["fold"]
assert abs(difference / -0.91 - 1) < 0.1
assert errors["learned rates"].mean() < errors["best constant rate"].mean()
assert found["meta-gradient"] >= 40
assert all(rule.relative_error < 1e-3 for rule in comparison.rules[:4])
assert all(rule.memory < comparison.rules[0].memory for rule in comparison.rules[1:4])
