# %% [markdown]
# # Train your own optimizer and use it
#
# A learned optimizer is a small network that looks at gradients and says how to step. This tutorial
# trains one in half a minute on one core, saves it, loads it, and uses it in a plain PyTorch loop,
# compared with Adam with a tuned learning rate.
#
# You need metaopt with the extra `scripts` ([install](../get-started.md#install)).

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import metaopt as mo
from metaopt.optimizers import EMA, Adam, ControlledMLP, Cosine

# %% [markdown]
# ## The optimizer and what it is trained on
#
# `ControlledMLP` has 289 weights. For each tensor of a network it chooses a direction, from the
# gradient and its averages, and the length of the step, from the loss and from how much of the run
# is over. Untrained it is close to Adam with small steps.
#
# A task is a training run of its own: a network 64-32-10 with fresh random weights, 80 steps on
# minibatches of 64 handwritten digits. `DigitsMLP` draws such tasks.

# %%
optimizer = ControlledMLP(orthogonal=False)
tasks = mo.tasks.DigitsMLP(hidden=(32,), batch_size=64)
STEPS = 80
print(sum(weight.numel() for weight in optimizer.parameters()), "weights")

# %% [markdown]
# ## Training it
#
# How good is an optimizer? We take the mean loss over the 80 steps. Backpropagation through 80
# steps of a learned optimizer has exploding gradients, so we use evolution. `NRES` makes pairs of
# training runs, in which the optimizer's weights are changed a little in opposite directions, and
# moves towards the better one of each pair. It needs no derivative of the loss with respect to the
# optimizer, and it looks at windows of 20 steps, so that the optimizer is updated four times in an
# episode (Li et al. 2023, [arXiv:2304.12180](https://arxiv.org/abs/2304.12180)). `Relative` makes
# the loss comparable over tasks, and `EMA` keeps an average of the optimizer's weights, which is
# what we use in the end.

# %%
OUTER_STEPS = 240
training = mo.MetaTraining(
    optimizer,
    tasks,
    estimator=mo.NRES(std=0.03, pairs=16, window=20, objective=mo.MeanLoss(mo.Relative())),
    outer=EMA(0.95, Adam(Cosine(0.01, OUTER_STEPS, final=0.0005), (0.9, 0.99))),
    horizon=STEPS,
    clip=280,
)
history = []
trainer = mo.Trainer(training, max_steps=OUTER_STEPS, progress=False)
for metrics in trainer:
    history.append(float(metrics["loss"]))
learned = training.evaluated()

# %% [markdown]
# `evaluate` runs optimizers on the same new tasks, none of which was seen in training. The
# opponent is Adam with the best of nine learning rates, and the same with a cosine schedule. Their
# rates are chosen by the mean loss on other tasks. In the picture, bands are two standard errors
# over 32 runs.

# %%
grid = [0.003, 0.006, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2]
candidates = {f"Adam {rate}": Adam(rate) for rate in grid}
candidates |= {f"cosine {rate}": Adam(Cosine(rate, STEPS)) for rate in grid}
tuning = mo.evaluate(candidates, tasks, horizon=STEPS, seeds=8, seed=1)


def best(start):
    return min((name for name in candidates if name.startswith(start)), key=tuning.mean)


tuned = {name: candidates[name] for name in (best("Adam"), best("cosine"))}
untrained = ControlledMLP(orthogonal=False)
report = mo.evaluate(
    {"learned": learned, **tuned, "untrained": untrained}, tasks, horizon=STEPS, seeds=32
)
print(report.table())

# %% Code of the picture tags=["fold"] alt="The objective falling while the optimizer is trained; and training curves on new tasks, on which the learned optimizer is fastest"
figure, (left, right) = plt.subplots(1, 2)
smooth = torch.tensor(history).unfold(0, 8, 4).mean(1)
left.plot(range(8, len(history) + 1, 4), smooth)
left.set(xlabel="updates of the optimizer", ylabel="log of loss over first loss")
for name, losses in report.curves.items():
    mean, error = losses.mean(0), losses.std(0) / len(losses) ** 0.5
    (line,) = right.plot(mean, label=name)
    right.fill_between(
        range(STEPS), mean - 2 * error, mean + 2 * error, color=line.get_color(), alpha=0.2
    )
right.set(xlabel="step", ylabel="training loss", yscale="log")
right.legend()
plt.show()

# %% [markdown]
# ## Save, load, use
#
# `save` writes the weights and the configuration into one safetensors file. `as_torch` makes a
# `torch.optim.Optimizer` of it. The loop is the one you know; only `step` gets the loss, since
# this optimizer looks at it.

# %%
learned.save("my_optimizer.safetensors")
loaded = ControlledMLP.load("my_optimizer.safetensors")

images, labels = mo.tasks.table("digits")


def train_network(model, opt, seed, gets_loss):
    """Train in a plain loop, and return the losses."""
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(STEPS):
        rows = torch.randint(len(labels), (64,), generator=generator)
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        opt.zero_grad()
        loss.backward()
        if gets_loss:
            opt.step(loss=loss)
        else:
            opt.step()
        losses.append(loss.item())
    return losses


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
opt = mo.with_steps(loaded, STEPS).as_torch(model.parameters())  # it knows the number of steps
losses = train_network(model, opt, seed=0, gets_loss=True)
print(f"loss: {losses[0]:.2f} at first, {sum(losses[-8:]) / 8:.2f} at the end")

# %% [markdown]
# ## A network it has never seen
#
# It was trained on one kind of network only. Does it carry over to a deeper one, with another
# activation? The rate of torch's own Adam is tuned again for that network. The learned optimizer is
# used as it is.


# %%
def deeper(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 10)
    )


def by_adam(rate, seed):
    model = deeper(seed)
    return train_network(model, torch.optim.Adam(model.parameters(), rate), seed, False)


def by_ours(seed):
    model = deeper(seed)
    opt = mo.with_steps(loaded, STEPS).as_torch(model.parameters())
    return train_network(model, opt, seed, True)


def mean_loss(rate):
    return torch.tensor([by_adam(rate, seed) for seed in range(100, 104)]).mean()


rate = min(grid, key=mean_loss)
transfer = {
    "learned": torch.tensor([by_ours(seed) for seed in range(8)]),
    f"torch's Adam, {rate}": torch.tensor([by_adam(rate, seed) for seed in range(8)]),
}
for name, losses in transfer.items():
    means = losses.mean(1)
    print(f"{name:18} mean loss {means.mean():.3f} ± {means.std() / 8**0.5:.3f}")

# %% Code of the picture tags=["fold"] alt="Training curves of a deeper network with the learned optimizer and with tuned Adam"
figure, axis = plt.subplots()
for name, losses in transfer.items():
    (line,) = axis.plot(losses.mean(0), label=name)
    axis.fill_between(
        range(STEPS), losses.amin(0), losses.amax(0), color=line.get_color(), alpha=0.15
    )
axis.set(xlabel="step", ylabel="training loss", yscale="log")
axis.set_title("a deeper network; bands are the range of eight runs")
axis.legend()
plt.show()

# %% [markdown]
# ## What this does not show
#
# The optimizer knows runs of 80 steps of small networks on one data set, and both pictures show the
# training loss. Much longer runs and much wider layers are another matter. The package has weights
# that were trained on many small networks for seven minutes: `load_trained("small", steps=80)`.
# [Learned optimizers](../guides/learned-optimizers.md) says how, and the [results on unseen
# families](../results/learned-optimizers.md#families-they-never-saw) say where they win and where
# not.

# %% What this page claims, checked tags=["fold"]
assert report.mean("learned") < min(report.mean(name) for name in tuned)
assert transfer["learned"].mean() < transfer[f"torch's Adam, {rate}"].mean()
for before, after in zip(learned.parameters(), loaded.parameters(), strict=True):
    assert torch.equal(before, after)
