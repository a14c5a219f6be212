# %% [markdown]
# # Learn a schedule
#
# How should the learning rate change during a training run? Cosine decay is a good guess. Here we
# let the gradient decide: we differentiate whole training runs with respect to the schedule. The
# result is compared with the best constant rate and the best cosine.
#
# You need metaopt with the extra `scripts` ([install](../get-started.md#install)), and a minute on
# one core.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import metaopt as mo
from metaopt.optimizers import Adam, Cosine, MLPSchedule, Warmup

# %% [markdown]
# ## The training runs
#
# A run is 100 steps of Adam on minibatches of 64 handwritten digits. The network is 64-32-10 and
# starts from fresh random weights each time. A good schedule is one with which the loss is low in
# the end, on average over such runs. The end is the last ten steps.

# %%
STEPS = 100
runs = mo.tasks.DigitsMLP(hidden=(32,), batch_size=64)


def final(losses):
    return losses[:, -STEPS // 10 :].mean(1)


# %% [markdown]
# ## Two opponents
#
# Six constant rates, and six peaks of a cosine after a warm-up of five steps. Each is tried on 32
# runs. We keep the best of each kind.


# %%
def cosine(peak):
    return Warmup(Cosine(peak, STEPS), 5)


grid = [0.02, 0.04, 0.06, 0.09, 0.13, 0.2]
candidates = {f"constant {rate}": Adam(rate) for rate in grid}
candidates |= {f"cosine {rate}": Adam(cosine(rate)) for rate in grid}
tuning = mo.evaluate(candidates, runs, horizon=STEPS, seeds=32, seed=1)
scores = {name: final(losses).mean().item() for name, losses in tuning.curves.items()}
best = {
    kind: min((name for name in scores if name.startswith(kind)), key=scores.get)
    for kind in ("constant", "cosine")
}
for name in best.values():
    print(f"{name}: final loss {scores[name]:.3f}")

# %% Code of the picture tags=["fold"] alt="Final loss over the rate, for constant rates and for cosines"
figure, axis = plt.subplots(figsize=(7.2, 3))
for kind, color in (("constant", "C5"), ("cosine", "C1")):
    losses = [scores[f"{kind} {rate}"] for rate in grid]
    axis.plot(grid, losses, "o-", color=color, label=kind)
axis.set(xscale="log", yscale="log", xlabel="rate, or peak of the cosine", ylabel="final loss")
axis.set_xticks(grid, map(str, grid))
axis.set_yticks([0.1, 0.2, 0.4], ["0.1", "0.2", "0.4"])
axis.minorticks_off()
axis.legend()
plt.show()

# %% [markdown]
# ## A schedule that looks
#
# `MLPSchedule` is a small network. At each step it sees the loss, the norm of the gradient and how
# much of the run is over, and changes the rate by a bounded factor. It starts from a schedule of
# yours; here that is a cosine from the middle of the grid. Its last layer is zero at first, so
# untrained it *is* that cosine.

# %%
START = 0.09
learned = Adam(MLPSchedule(cosine(START), STEPS))
print(sum(weight.numel() for weight in learned.parameters()), "numbers to learn")

# %% [markdown]
# ## Learning it
#
# `MetaTraining` draws runs, differentiates them from the first to the last step, and moves the
# schedule by Adam. It minimises an objective of our own, the mean of the last ten losses. Every ten
# steps we validate on 64 other runs, and at the end the `Trainer` goes back to the schedule that
# was best there: training through a hundred steps is uneven.


# %%
class FinalLoss:
    """The mean loss of the last tenth of a run."""

    is_bounded = False

    def part(self, window, loss):
        return window.losses[-STEPS // 10 :].mean()


def validate():
    report = mo.evaluate({"": learned}, runs, horizon=STEPS, seeds=64, seed=2)
    validated.append(final(report.curves[""]).mean().item())
    return validated[-1]


OUTER, validated = 40, []
training = mo.MetaTraining(
    learned,
    runs,
    estimator=mo.FullUnroll(12, mo.Backprop(), objective=FinalLoss()),
    outer=Adam(Cosine(0.015, OUTER, final=0.0015)),
    horizon=STEPS,
    clip=1.0,
)
trainer = mo.Trainer(
    training, max_steps=OUTER, validate=validate, validate_every=10, progress=False
)
trainer.fit()
print("validation:", " ".join(f"{loss:.3f}" for loss in validated))

# %% [markdown]
# ## What it learned
#
# We judge all three on 200 new runs. They are the same for all three, so we compare run by run:
# the mean of the differences, and its standard error.

# %%
contenders = {"learned": learned} | {name: candidates[name] for name in best.values()}
report = mo.evaluate(contenders, runs, horizon=STEPS, seeds=200)
test = {name: final(losses) for name, losses in report.curves.items()}
gaps = {name: losses - test["learned"] for name, losses in test.items()}
for name, losses in test.items():
    print(f"{name:13} final loss {losses.mean():.4f}", end="")
    gap = gaps[name]
    print(
        f", above the learned one by {gap.mean():.4f} ± {gap.std() / 200**0.5:.4f}"
        if gap.any()
        else ""
    )


# %% Code of the picture tags=["fold"] alt="The learned rates beside the best cosine and the best constant, and the losses of the three"
def observed_rates(optimizer, runs_to_see=12):
    """Return the rate of each step of some runs, [runs, steps]."""
    generator, rates = torch.Generator().manual_seed(3), []
    for _ in range(runs_to_see):
        task = runs.sample(generator, STEPS)
        params, state = task.params, optimizer.init(task.params)
        for x, y in zip(*task.batches):
            grads, loss = torch.func.grad_and_value(runs.loss)(params, (x, y))
            rates.append(float(optimizer.values(state, loss=loss, grads=grads)["lr"]))
            updates, state = optimizer(grads, state, params, loss=loss)
            params = mo.apply_updates(params, updates)
    return torch.tensor(rates).reshape(runs_to_see, STEPS)


figure, (left, right) = plt.subplots(1, 2)
colors = {"learned": "C0", best["constant"]: "C5", best["cosine"]: "C1"}
with torch.no_grad():
    for name, optimizer in contenders.items():
        rates = observed_rates(optimizer)
        left.plot(rates.mean(0), color=colors[name], label=name)
        left.fill_between(range(STEPS), rates.amin(0), rates.amax(0), color=colors[name], alpha=0.2)
        right.plot(report.curves[name].mean(0), color=colors[name])
left.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
left.legend()
right.set(xlabel="step", ylabel="training loss", yscale="log")
plt.show()

# %% [markdown]
# The band is the range over twelve runs. It is so narrow that you hardly see it: what the schedule
# learned is mostly a curve. Its peak is lower than that of the best cosine, it stays there for the
# first third, and it falls later.
#
# ## Use it
#
# A schedule is a part of its optimizer. `save` and `load` keep both, and `as_torch` gives a
# `torch.optim.Optimizer` for a plain loop. It counts the steps itself; you give it the loss.

# %%
learned.save("adam_with_schedule.safetensors")
loaded = Adam.load("adam_with_schedule.safetensors")
network = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
opt = loaded.as_torch(network.parameters())
images, labels = mo.tasks.table("digits")
generator = torch.Generator().manual_seed(0)
for _ in range(STEPS):
    rows = torch.randint(len(labels), (64,), generator=generator)
    loss = F.cross_entropy(network(images[rows]), labels[rows])
    opt.zero_grad()
    loss.backward()
    opt.step(loss=loss)

# %% [markdown]
# The schedule belongs to this problem: 100 steps, this network, these data. For a longer run, learn
# it again.
#
# ## Where to go from here
#
# - [Optimizers and schedules](../guides/optimizers.md): all schedules, and how to write one
# - [Results](../results/schedules.md): five kinds of learned schedules, trained a little
#   longer, also on another network
# - [Train your own optimizer](train-an-optimizer.md): there more than the rate is learned

# %% What this page claims, checked tags=["fold"]
assert gaps[best["constant"]].mean() > 0.01
assert gaps[best["cosine"]].mean() > gaps[best["cosine"]].std() / 200**0.5
for before, after in zip(learned.parameters(), loaded.parameters(), strict=True):
    assert torch.equal(before, after)
