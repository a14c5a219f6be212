# %% [markdown]
# # Three levels
#
# A learning rate can be learned: a second optimizer moves it. But that optimizer has a learning
# rate too. Who sets that one? A third optimizer. This tutorial builds this tower, and shows what it
# is good for: the taller it is, the less the start matters.
#
# The idea is in Maclaurin et al. 2015 ([arXiv:1502.03492](https://arxiv.org/abs/1502.03492)) and
# Chandra et al. 2022 ([arXiv:1909.13371](https://arxiv.org/abs/1909.13371)). You need metaopt with
# the extra `scripts` ([install](../get-started.md#install)), and half a minute on one core.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import metaopt as mo
from metaopt.optimizers import SGD, Adam, Positive

# %% [markdown]
# ## Three levels and what each of them moves
#
# - **learner**: a network that reads handwritten digits. SGD moves it, with a learning rate α.
# - **rate**: the number α. Adam moves it, with a learning rate η.
# - **rate_of_rate**: the number η. Adam moves it, with a fixed learning rate.
#
# α is a parameter of the learner's optimizer. So that optimizer is the *model* of the level above.
# metaopt sees that both are the same module; you need to say nothing else. `Positive` learns the
# logarithm of a rate, so the rate cannot become negative.
#
# All three levels minimise the same thing, the loss of the network: the learner on one part of the
# digits, the two rates on another.

# %%
images, labels = mo.tasks.table("digits")
test = images[1400:], labels[1400:]


def minibatches(first, last, seed):
    """100 random digits of those with numbers first to last, forever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(first, last, (100,), generator=generator)
        yield images[rows], labels[rows]


def loss(levels, batch):
    x, y = batch
    return F.cross_entropy(levels.learner(x), y)


# %% [markdown]
# Two edges join the three levels. The rate makes one step for five steps of the learner; its
# gradient passes through these five. The rate of the rate makes one step for two steps of the rate;
# its gradient passes through two steps of the rate, and through the ten steps of the learner inside
# them.


# %%
def make_network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def make_graph(alpha, eta=0.02, seed=0, levels=3):
    network, own = make_network(seed), 10 * seed  # seeds of the minibatches
    learner_sgd = SGD(lr=Positive(alpha))
    rate_adam = Adam(lr=Positive(eta) if levels == 3 else eta, betas=(0.5, 0.9))
    learner = mo.Level("learner", network, loss, learner_sgd, minibatches(0, 1000, own))
    rate = mo.Level("rate", learner_sgd, loss, rate_adam, minibatches(1000, 1400, own + 1))
    edges = [mo.Edge(rate, learner, steps=5)]
    if levels == 3:
        top = Adam(lr=0.2)
        rate_of_rate = mo.Level(
            "rate_of_rate", rate_adam, loss, top, minibatches(1000, 1400, own + 2)
        )
        edges.append(mo.Edge(rate_of_rate, rate, steps=2))
    return network, mo.LevelGraph(edges)


network, graph = make_graph(alpha=0.001)
print(graph)

# %% [markdown]
# The last lines say in which order things happen. `graph.draw("graph.png")` draws the same:

# %% Code of the picture tags=["fold"] alt="The graph: three boxes above each other, and the edges between them"
with plt.style.context("default"):
    graph.draw("graph.png")
picture = plt.imread("graph.png")
figure, axis = plt.subplots(figsize=(4, 4 * picture.shape[0] / picture.shape[1]))
axis.imshow(picture)
axis.axis("off")
plt.show()

# %% [markdown]
# ## Is the gradient of the top level right?
#
# It passes through two optimizers and twelve steps. `hypergradient_check` compares it with
# finite differences of the whole tower, in float64.

# %% tags=["varies"]
print(mo.hypergradient_check(graph, "rate_of_rate").table())

# %% [markdown]
# ## From a bad start
#
# α = 0.001 is much too small: with that rate the network would learn nearly nothing. η = 0.02 is
# small too. We run the tower for 40 steps, which are 400 steps of the network, and watch both
# rates. `graph.values()` has them.

# %%
history = {"learner/lr": [], "rate/lr": []}
for _ in range(40):
    graph.step()
    for name, values in history.items():
        values.append(float(graph.values()[name]))
print(f"the learner's rate: 0.001 -> {history['learner/lr'][-1]:.2f}")
print(f"the rate's rate: 0.02 -> {history['rate/lr'][-1]:.2f}")

# %% Code of the picture tags=["fold"] alt="The two rates over the steps of the top level: first the upper one rises, then the lower one"
figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9))
left.plot(history["rate/lr"], color="C1")
left.set(xlabel="steps of the top level", ylabel="η, the rate of the rate", yscale="log")
left.set_yticks([0.03, 0.1, 0.3], ["0.03", "0.1", "0.3"])
left.minorticks_off()
right.plot(history["learner/lr"])
right.set(xlabel="steps of the top level", ylabel="α, the rate", yscale="log")
plt.show()

# %% [markdown]
# ## The taller, the less it matters how one starts
#
# Now α starts at five values over four powers of ten. From each start the same network is trained
# for 400 steps with one level (α stays), with two (α is learned, η stays at 0.02) and with three.
# Everything is repeated with three seeds.

# %%
starts = [1e-4, 1e-3, 1e-2, 0.1, 1.0]


def test_loss(alpha, levels, seed):
    if levels == 1:
        network = make_network(seed)
        net, stream = mo.functional(network), minibatches(0, 1000, 10 * seed)

        def loss_fn(params, batch):
            return F.cross_entropy(net(params, batch[0]), batch[1])

        with torch.no_grad():
            batches = (next(stream) for _ in range(400))
            params = mo.minimize(loss_fn, SGD(lr=alpha), net.params, batches).params
            return loss_fn(params, test).item()
    network, graph = make_graph(alpha, seed=seed, levels=levels)
    for _ in range(40 if levels == 3 else 80):
        graph.step()
    with torch.no_grad():
        return F.cross_entropy(network(test[0]), test[1]).item()


final = {
    levels: torch.tensor(
        [[test_loss(alpha, levels, seed) for alpha in starts] for seed in range(3)]
    )
    for levels in (1, 2, 3)
}
print("α starts at" + "".join(f"{alpha:9g}" for alpha in starts))
for levels, losses in final.items():
    name = f"{levels} level{'s' * (levels > 1)}"
    print(f"{name:11}" + "".join(f"{value:9.3f}" for value in losses.mean(0)))

# %% Code of the picture tags=["fold"] alt="Test loss over the rate at the start for one, two and three levels: with three the curve is nearly flat"
figure, axis = plt.subplots()
for levels, losses in final.items():
    (line,) = axis.plot(starts, losses.mean(0), "o-", label=f"{levels} level{'s' * (levels > 1)}")
    axis.fill_between(starts, losses.amin(0), losses.amax(0), color=line.get_color(), alpha=0.2)
axis.set(xscale="log", xlabel="α at the start", ylabel="test loss after 400 steps", ylim=(0, None))
axis.set_title("mean and range of three seeds")
axis.legend()
plt.show()

# %% [markdown]
# With one level only a large α works. With two, α has to be right within about a factor of ten.
# With three, all five starts end within a narrow band.
#
# Two things are left out. The top level has a rate of its own, 0.2, and we tried two values for it.
# And from a start of α = 3 nothing helps: the first steps move the network so far away that it does
# not recover.
#
# ## Where to go from here
#
# - [Levels](../guides/levels.md): data of each level, starts, copies, large models
# - `examples/learning_by_ignoring.py` has three levels for another purpose: which examples to
#   pretrain on ([its results](../results/index.md#examples))
# - [Search over the discrete rest](search.md): a level above that needs no gradient

# %% What this page claims, checked tags=["fold"]
assert mo.hypergradient_check(graph, "rate_of_rate", tolerance=1e-3)
assert history["learner/lr"][-1] > 0.03
assert final[3].mean(0).max() < 0.6
assert final[2].mean(0).max() > 1.5
assert final[1].mean(0).max() > 2
