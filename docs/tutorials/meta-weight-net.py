# %% [markdown]
# # Clean a data set with meta-weight-net
#
# Labels are often wrong. Meta-weight-net trains a network on such data and learns, at the same
# time, which examples to believe. It needs a few examples whose labels are known to be right. Here
# a network learns handwritten digits of which 40 % have a wrong label. At the end the learned
# weights are used to clean the data set.
#
# The method is that of Shu et al. 2019 ([arXiv:1902.07379](https://arxiv.org/abs/1902.07379)). You
# need metaopt with the extra `scripts` ([install](../get-started.md#install)), and half a minute on
# one core.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import metaopt as mo
from metaopt.optimizers import SGD, Adam
from metaopt.tasks.corruption import flip_labels, stratified_split

# %% [markdown]
# ## Data with wrong labels
#
# Of each digit there are 100 examples to train on, 10 whose labels are known to be right, and the
# rest for the test. `flip_labels` gives 400 of the 1,000 training examples another label.

# %%
images, truth = mo.tasks.table("digits")


def split(seed):
    generator = torch.Generator().manual_seed(seed)
    clean, train, test = stratified_split(truth, (10, 100), generator)
    given = flip_labels(truth[train], 0.4, 10, generator)
    return (
        (images[train], given),
        truth[train],
        (images[clean], truth[clean]),
        (images[test], truth[test]),
    )


train, right_labels, clean, test = split(seed=0)
is_wrong = train[1] != right_labels
print(f"{is_wrong.sum()} of {len(is_wrong)} training labels are wrong")

# %% Code of the picture tags=["fold"] alt="Sixteen training digits with the labels that were given for them; wrong labels are red"
chosen = torch.randperm(1000, generator=torch.Generator().manual_seed(2))[:16]
figure, axes = plt.subplots(2, 8, figsize=(7.2, 2.3))
for axis, index in zip(axes.flat, chosen):
    axis.imshow(train[0][index].reshape(8, 8))
    axis.set_title(f"“{train[1][index]}”", color="C3" if is_wrong[index] else "C2")
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Two levels
#
# There are two networks. The **learner** classifies digits. The **weight net** looks at the loss
# of an example and says how much that example counts, between 0 and 1. The learner minimises the
# weighted loss:


# %%
def learner_loss(levels, batch):
    x, y = batch
    losses = F.cross_entropy(levels.learner(x), y, reduction="none")
    weights = levels.weights(losses.detach()[:, None]).squeeze(1)
    return (weights * losses).sum() / weights.sum()


# %% [markdown]
# The weight net has a loss of its own: that of the learner on the clean examples. It falls when
# the learner's next step is a good one. So its gradient passes through that step.


# %%
def clean_loss(levels, batch):
    x, y = batch
    return F.cross_entropy(levels.learner(x), y)


# %% [markdown]
# A `Level` puts a model, a loss, an optimizer and data together. An `Edge` says that the upper
# level is differentiated through the steps of the lower one; here that is one step. With
# `look_ahead=True` the learner first makes a trial step, then the weight net makes its step, and
# then the learner makes its real step with the new weights.


# %%
def make_learner(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))


def make_graph(seed, train, clean):
    model = make_learner(seed)
    weight_net = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
    batches = mo.Shuffled(train, batch_size=100, seed=seed)
    learner = mo.Level("learner", model, learner_loss, SGD(lr=0.03, momentum=0.9), data=batches)
    weights = mo.Level("weights", weight_net, clean_loss, Adam(lr=3e-4), data=[clean])
    return model, weight_net, mo.LevelGraph([mo.Edge(weights, learner, look_ahead=True)])


model, weight_net, graph = make_graph(0, train, clean)
print(graph)

# %% [markdown]
# 800 steps train both. Meanwhile we record the mean weights of right and of wrong examples. The
# training does not know which are which.


# %%
@torch.no_grad()
def error(model, examples):
    x, y = examples
    return (model(x).argmax(1) != y).float().mean().item()


@torch.no_grad()
def weigh(model, weight_net, examples):
    """Return the loss of each example, and its weight over the mean weight."""
    x, y = examples
    losses = F.cross_entropy(model(x), y, reduction="none")
    weights = weight_net(losses[:, None]).squeeze(1)
    return losses, weights / weights.mean()


history = []
for step in range(800):
    graph.step()
    if step % 20 == 19:
        weights = weigh(model, weight_net, train)[1]
        history.append([step + 1, weights[~is_wrong].mean(), weights[is_wrong].mean()])
print(f"mean weight of right labels {history[-1][1]:.2f}, of wrong labels {history[-1][2]:.2f}")

# %% [markdown]
# ## What it learned
#
# On the left: the mean weights during the training. They separate after a while, although nobody
# said which labels are wrong. In the middle: the weights at the end. On the right: the weight as a
# function of the loss. That curve is all that the weight net is.

# %% Code of the picture tags=["fold"] alt="Learned weights: those of wrong labels fall, and at the end most of them are near zero"
losses, weights = weigh(model, weight_net, train)
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(7.6, 3))
steps, of_right, of_wrong = zip(*history)
left.plot(steps, of_right, color="C0", label="right")
left.plot(steps, of_wrong, color="C3", label="wrong")
left.set(xlabel="step", ylabel="mean weight / mean", ylim=(0, None))
bins = torch.linspace(0, weights.max(), 25)
middle.hist(weights[~is_wrong], bins, color="C0", alpha=0.8, label="right label")
middle.hist(weights[is_wrong], bins, color="C3", alpha=0.7, label="wrong label")
middle.set(xlabel="weight / mean", ylabel="examples")
middle.legend()
for color, part in (("C0", ~is_wrong), ("C3", is_wrong)):
    right.scatter(losses[part], weights[part], s=5, color=color, alpha=0.5)
right.set(xscale="log", xlim=(1e-3, None), xlabel="loss of the example", ylabel="weight / mean")
plt.show()

# %% [markdown]
# ## Does it help?
#
# Three opponents train the same network with the same optimizer on the same number of steps:
#
# - **all, equal**: plain training on all 1,000 examples;
# - **clean only**: plain training on the 100 clean examples;
# - **oracle**: plain training on the 600 examples whose labels are right, which nobody knows.
#
# Each is repeated on three splits of the data with three initialisations.


# %%
@torch.no_grad()
def train_plainly(seed, examples, steps=800):
    model = make_learner(seed)
    batches = mo.Shuffled(examples, batch_size=100, seed=seed)
    net = mo.functional(model)

    def loss_fn(params, batch):
        return F.cross_entropy(net(params, batch[0]), batch[1])

    stream = (batches.batch_at(step) for step in range(steps))
    params = mo.minimize(loss_fn, SGD(lr=0.03, momentum=0.9), net.params, stream).params
    return lambda x: net(params, x)


def pick(examples, rows):
    return examples[0][rows], examples[1][rows]


errors = {name: [] for name in ("all, equal", "clean only", "meta-weight-net", "cleaned", "oracle")}
found = []
for seed in range(3):
    train, right_labels, clean, test = split(seed)
    is_wrong = train[1] != right_labels
    model, weight_net, graph = make_graph(seed, train, clean)
    for _ in range(800):
        graph.step()
    weights = weigh(model, weight_net, train)[1]
    kept = weights > 0.5
    found.append([(is_wrong & ~kept).sum() / is_wrong.sum(), (is_wrong & kept).sum() / kept.sum()])
    errors["meta-weight-net"].append(error(model, test))
    examples = {
        "all, equal": train,
        "clean only": clean,
        "cleaned": pick(train, kept),
        "oracle": pick(train, ~is_wrong),
    }
    for name, part in examples.items():
        errors[name].append(error(train_plainly(seed, part), test))

# %% [markdown]
# The fifth bar, **cleaned**, is a simple use of the result. We drop each example whose weight is
# less than half of the mean, and train plainly on what is left.

# %% Code of the picture tags=["fold"] alt="Test error of five ways to train, mean of three splits with their range"
means = {name: 100 * torch.tensor(values) for name, values in errors.items()}
figure, axis = plt.subplots(figsize=(7.2, 3))
colors = ["C5", "C5", "C0", "C2", "C5"]
for row, values in enumerate(means.values()):
    axis.barh(row, values.mean(), color=colors[row], alpha=0.8)
    axis.plot(values, [row] * len(values), "o", color="C1", markersize=5)
axis.set_yticks(range(len(means)), means)
axis.invert_yaxis()
axis.grid(axis="y", visible=False)
axis.set(xlabel="test error in percent; points are splits")
plt.show()

# %%
for name, values in means.items():
    print(f"{name:16} {values.mean():5.1f} % ± {values.std() / len(values) ** 0.5:.1f}")
share, left_over = 100 * torch.tensor(found).mean(0)
print(f"dropped: {share:.0f} % of the wrong labels; of what is kept {left_over:.0f} % is wrong")

# %% [markdown]
# The standard error is over the three splits. Meta-weight-net needs the hundred clean examples, and
# with few wrong labels there is little to gain. The [results on wrong
# labels](../results/noisy-labels.md) have other shares of noise, unequal classes, and texts.
#
# ## Where to go from here
#
# - [Levels](../guides/levels.md): the notation, and how edges are differentiated
# - [Three levels](three-levels.md) stacks one more on top
# - [Search over the discrete rest with Ax](search.md) finds the width and the rates of this graph

# %% What this page claims, checked tags=["fold"]
assert history[-1][2] < 0.6 * history[-1][1]
assert means["meta-weight-net"].mean() < means["all, equal"].mean()
assert means["meta-weight-net"].mean() < means["clean only"].mean()
assert means["cleaned"].mean() < means["all, equal"].mean()
