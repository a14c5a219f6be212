from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

import metaopt as mo
from metaopt import tree
from metaopt.tasks.corruption import flip_labels, long_tail, stratified_split
from metaopt.tasks.digits import digits
from optimizers import Adam

LR, MOMENTUM, WEIGHT_LR = 0.1, 0.9, 0.01


def load_script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "meta_weight_net.py"
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("meta_weight_net_script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


script = load_script()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The iteration


@pytest.fixture(params=["loss", "loss and class"])
def problem(request):
    """Return (learner, learner module, weight module, batches with clean ones), in float64.

    The batches are of digits.
    """
    torch.manual_seed(0)
    inputs = 1 if request.param == "loss" else 1 + script.CLASSES
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    weight_model = nn.Sequential(
        nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, 1), nn.Sigmoid()
    ).double()
    learner = script.MetaWeightNet(
        mo.functional(model), mo.functional(weight_model), Adam(WEIGHT_LR)
    )
    images, labels = digits()
    noisy = flip_labels(labels, 0.4, 10, generator())
    order = torch.randperm(len(labels), generator=generator()).view(-1, 1797 // 3)[:, :40]
    batches = [
        ((images[i[:30]].double(), noisy[i[:30]]), (images[i[30:]].double(), labels[i[30:]]))
        for i in order
    ]
    return learner, model, weight_model, batches


def by_hand(model, weight_model, params, velocity, theta, batch):
    """Return (next params, next velocity) as autograd functions of theta, without the library."""
    losses = F.cross_entropy(
        functional_call(model, params, (batch[0],)), batch[1], reduction="none"
    )
    seen = losses.detach()[:, None]
    if weight_model[0].in_features > 1:
        seen = torch.cat([seen, F.one_hot(batch[1], 10).double()], 1)
    weights = functional_call(weight_model, theta, (seen,))[:, 0]
    loss = (weights / weights.sum() * losses).sum()
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    velocity = [g if v is None else MOMENTUM * v + g for v, g in zip(velocity, grads)]
    return {name: p - LR * v for (name, p), v in zip(params.items(), velocity)}, velocity


def leaf(tensors):
    return {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}


def test_iterations_equal_a_hand_written_loop(problem):
    # Three iterations: momentum carries over, and each learner step uses the weight net just
    # improved.
    learner, model, weight_model, batches = problem
    params, velocity = leaf(dict(model.named_parameters())), [None] * 4
    theta = leaf(dict(weight_model.named_parameters()))
    adam = torch.optim.Adam(theta.values(), lr=WEIGHT_LR)
    state = tree.map(torch.Tensor.detach, learner.start(learner.net.params))
    for batch, clean in batches:
        hypergradient = grad(learner.meta_loss)(
            state["weights"], state, torch.tensor(LR, dtype=torch.float64), batch, clean
        )
        state = learner.step(state, torch.tensor(LR, dtype=torch.float64), batch, clean)

        after, _ = by_hand(model, weight_model, params, velocity, theta, batch)
        meta_loss = F.cross_entropy(functional_call(model, after, (clean[0],)), clean[1])
        for tensor, expected in zip(
            theta.values(), torch.autograd.grad(meta_loss, list(theta.values()))
        ):
            tensor.grad = expected
        for name, tensor in theta.items():  # 1e-10: float64 rounding of a few thousand operations
            torch.testing.assert_close(hypergradient[name], tensor.grad, rtol=1e-10, atol=1e-10)
            assert tensor.grad.abs().max() > 1e-6
        adam.step()
        after, after_velocity = by_hand(model, weight_model, params, velocity, theta, batch)
        params, velocity = leaf(after), [v.detach() for v in after_velocity]
        torch.testing.assert_close(
            state["params"], {k: v.detach() for k, v in params.items()}, rtol=1e-10, atol=1e-10
        )
        torch.testing.assert_close(
            state["weights"], {k: v.detach() for k, v in theta.items()}, rtol=1e-10, atol=1e-10
        )


def test_hypergradient_equals_a_finite_difference(problem):
    learner, _, _, [(batch, clean), (other, _), _] = problem
    lr = torch.tensor(LR, dtype=torch.float64)
    state = tree.map(torch.Tensor.detach, learner.start(learner.net.params))
    state = learner.step(state, lr, other, clean)
    hypergradient = grad(learner.meta_loss)(state["weights"], state, lr, batch, clean)
    direction = tree.map(
        lambda t: torch.randn(t.shape, generator=generator(1), dtype=t.dtype), state["weights"]
    )

    def along(radius: float) -> torch.Tensor:
        moved = tree.map(lambda t, d: t + radius * d, state["weights"], direction)
        return learner.meta_loss(moved, state, lr, batch, clean).detach()

    # truncation radius^2 = 1e-8 and rounding 1e-16 / radius = 1e-12, of values about 1e-3
    radius = 1e-4
    difference = (along(radius) - along(-radius)) / (2 * radius)
    slope = sum((g * d).sum() for g, d in zip(tree.leaves(hypergradient), tree.leaves(direction)))
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-9)
    assert slope.abs() > 1e-5


def test_stacked_runs_equal_single_runs(problem):
    learner, _, _, batches = problem
    rates = torch.tensor([0.05, 0.1, 0.2], dtype=torch.float64)
    states = [
        tree.map(lambda t, k=k: t.detach() * (1 + 0.1 * k), learner.start(learner.net.params))
        for k in range(3)
    ]
    for state in states:
        state["opt_state"]["step"] = torch.zeros((), dtype=torch.int64)
        state["weights_opt_state"]["step"] = torch.zeros((), dtype=torch.int64)
    stacked, pairs = tree.stack(states), [tree.stack([b[i] for b in batches]) for i in range(2)]
    together = vmap(learner.step)(stacked, rates, *pairs)
    for k, (batch, clean) in enumerate(batches):
        alone = learner.step(states[k], rates[k], batch, clean)
        torch.testing.assert_close(tree.index(together, k), alone, rtol=1e-12, atol=1e-12)


def test_weight_net_learns_to_ignore_wrong_labels(tmp_path):
    config = script.Config(
        noise=0.4, learning_rates=(0.03,), lengths=(400,), seeds=2, seed=50, out=tmp_path
    )
    data = tree.stack([script.damaged_digits(config, seed) for seed in (50, 51)])
    with torch.no_grad():
        result = script.train("meta-weight-net", config, data)
        for _, weights, wrong in script.learned_weights(config, data, result):
            assert wrong.sum() == 400
            # Chance would be a ratio of 1.
            assert weights[wrong].mean() < 0.5 * weights[~wrong].mean()


# The comparison


@pytest.fixture(scope="module")
def data():
    config = script.Config(noise=0.3, imbalance=10, seeds=2)
    return tree.stack([script.damaged_digits(config, seed) for seed in range(2)])


def test_data_are_disjoint_and_the_clean_part_is_clean_and_balanced(data):
    images, _ = digits()
    duplicates = len(images) - len(images.unique(dim=0))
    for seed in range(2):
        one = script.Data(*tree.index(tuple(data), seed))
        train = len(one.labels) - 100
        assert one.wrong.sum() == round(0.3 * train)
        assert not one.wrong[train:].any()
        assert one.clean()[1].bincount().tolist() == [10] * 10
        assert len(one.test_labels) == 1797 - 10 * (10 + 100)
        # No image stands in two parts, up to duplicates in the data set itself.
        found = torch.cat([one.images, one.test_images])
        assert len(found.unique(dim=0)) >= len(found) - duplicates
    assert not torch.equal(data.test_images[0], data.test_images[1])
    again = script.damaged_digits(script.Config(noise=0.3, imbalance=10), 1)
    torch.testing.assert_close(tuple(again), tree.index(tuple(data), 1), rtol=0, atol=0)


def test_oracle_draws_right_labels_and_equal_classes(data):
    probability = script.sampling("oracle", data)
    assert probability.shape == (2, 1, data.labels.shape[1])
    for seed in range(2):
        assert not probability[seed, 0, data.wrong[seed]].any()
        by_class = torch.zeros(10).index_add(0, data.labels[seed], probability[seed, 0])
        torch.testing.assert_close(by_class, torch.full((10,), 0.1))  # float32 rounding


@pytest.mark.parametrize("method", ["plain", "meta-weight-net"])
def test_training_draws_the_damaged_set_uniformly(data, method):
    (probability,) = script.sampling(method, data)[0]
    train = len(probability) - 100
    torch.testing.assert_close(probability[:train], torch.full((train,), 1 / train))
    assert not probability[train:].any()


def test_clean_only_is_judged_on_examples_it_has_not_seen(data):
    probability = script.sampling("clean only", data)
    assert not probability[..., :-100].any()
    trained_on = probability[0, :, -100:] > 0
    assert trained_on.sum(1).tolist() == [80] * 5 + [100]
    labels = data.clean()[1][0]
    assert all(labels[seen].bincount().tolist() == [8] * 10 for seen in trained_on[:5])

    # logits of a classifier that is sure, and right exactly where `right` [trainings, 100] says
    def score(right):
        guess = torch.where(right, labels, (labels + 1) % 10)
        return script.score(
            20 * F.one_hot(guess, 10).float().expand(2, 1, *right.shape, 10),
            clean_twice(data, labels),
        )[0, 0]

    assert score(~trained_on) >= 100  # right on exactly what it has not seen, and wrong elsewhere
    assert score(trained_on) < 1
    # the other methods: one training, all examples
    assert score(torch.ones(1, 100, dtype=torch.bool)) >= 100


def clean_twice(data, labels):
    """Return `data` with the same clean labels in both seeds."""
    return data._replace(labels=torch.cat([data.labels[:, :-100], labels.expand(2, -1)], 1))


def test_choice_is_the_best_score_and_ties_go_to_the_lower_loss():
    accuracy = torch.arange(12.0).view(2, 2, 3)
    score = torch.tensor(
        [[[90.2, 91.1, 80.0], [91.3, 70.0, 85.0]], [[10.0, 20.0, 30.5], [0.0, 0.0, 30.4]]]
    )
    result = script.Result(accuracy, score, [])
    assert result.choose(longest=False).tolist() == [[1, 0], [0, 2]]
    assert result.choose(longest=True).tolist() == [[1, 2], [0, 2]]
    assert result.chosen(longest=False).tolist() == [3.0, 8.0]
    assert result.chosen(longest=True).tolist() == [5.0, 8.0]


def test_stars_mark_differences_above_two_standard_errors():
    values = torch.tensor([0.01, 0.02, 0.03])  # mean 2 %, standard error 1 / sqrt(3) = 0.58 %
    assert script.percent(values, signed=True) == "+2.0 ± 0.6 *"
    assert script.percent(values - 0.01, signed=True) == "+1.0 ± 0.6"
    assert script.percent(values) == "2.0 ± 0.6"


@pytest.mark.parametrize("weight_input", ["loss", "loss and class"])
def test_end_to_end(tmp_path, capsys, weight_input):
    config = script.Config(
        noise=0.2,
        imbalance=5,
        learning_rates=(0.03, 0.1),
        lengths=(10, 40),
        seeds=2,
        batch_size=20,
        weight_input=weight_input,
        out=tmp_path,
    )
    threads = torch.get_num_threads()
    try:
        results = script.main(config)
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert all(method in printed for method in script.METHODS)
    assert "20 % wrong labels and long-tailed classes 1:5" in printed
    for result in results.values():
        assert result.test_accuracy.shape == (2, 2, 2)
        assert result.test_accuracy[:, :, 1].max() > 0.4  # chance is 0.1
    # where it was stopped early, it goes on: here behind the first of the four methods
    shutil.rmtree(tmp_path / "checkpoints/oracle")
    try:
        again = script.main(dataclasses.replace(config, resume=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(again[method].score, result.score) for method, result in results.items())
    assert (tmp_path / "meta_weight_net.png").stat().st_size > 10_000
    assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": 1.0}, r"`share` of wrong labels must lie in \[0, 1\), got 1.0"),
        ({"imbalance": 0.5}, r"`ratio` .* must lie in \[1, 100\], got 0.5"),
        ({"imbalance": 101.0}, r"`ratio` .* must lie in \[1, 100\], got 101.0"),
        ({"seeds": 1}, "`seeds` must be at least 2, got 1"),
        ({"lengths": (100, 50)}, "`lengths` must be positive and rising"),
        ({"learning_rates": ()}, "`learning_rates` must be positive and rising"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(script.Config(), **changes)


# The damage


@pytest.mark.parametrize("share", [0.0, 0.123, 0.4, 0.99])
def test_flipped_share_is_exact(share):
    labels = torch.arange(1000) % 10
    before = labels.clone()
    flipped = flip_labels(labels, share, 10, generator())
    assert (flipped != labels).sum() == round(1000 * share)
    assert flipped.min() >= 0
    assert flipped.max() <= 9
    assert torch.equal(labels, before)
    assert torch.equal(flipped, flip_labels(labels, share, 10, generator()))
    assert share == 0 or not torch.equal(flipped, flip_labels(labels, share, 10, generator(1)))


def test_wrong_labels_are_uniform_over_the_other_classes():
    flipped = flip_labels(torch.full((10_000,), 3), 0.9, 10, generator())
    counts = flipped.bincount(minlength=10)
    assert counts[3] == 1000
    others = counts[torch.arange(10) != 3]
    # Each is binomial(9000, 1 / 9): 1000 with standard deviation 30; five of them.
    assert (others - 1000).abs().max() < 150


@pytest.mark.parametrize(
    ("ratio", "largest"), [(1, 100), (2, 100), (50, 100), (100, 100), (50, 150)]
)
def test_long_tail_is_exact(ratio, largest):
    labels = (torch.arange(10 * largest) % 10)[torch.randperm(10 * largest, generator=generator(5))]
    kept = long_tail(labels, ratio, generator())
    assert len(kept.unique()) == len(kept)
    sizes = labels[kept].bincount(minlength=10).sort(descending=True).values
    assert sizes[0] == largest
    assert sizes[0] == ratio * sizes[-1]
    assert sizes.tolist() == [round(largest * ratio ** (-k / 9)) for k in range(10)]
    assert torch.equal(kept, long_tail(labels, ratio, generator()))
    assert not torch.equal(kept, long_tail(labels, ratio, generator(1)))


def test_split_is_stratified_disjoint_and_complete():
    labels = digits()[1]
    first, second, rest = stratified_split(labels, (10, 100), generator())
    assert labels[first].bincount().tolist() == [10] * 10
    assert labels[second].bincount().tolist() == [100] * 10
    assert torch.equal(torch.cat([first, second, rest]).sort().values, torch.arange(1797))
    assert torch.equal(first, stratified_split(labels, (10, 100), generator())[0])
    assert not torch.equal(first, stratified_split(labels, (10, 100), generator(1))[0])


def test_corruption_errors():
    labels = torch.arange(20) % 2
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"`share` of wrong labels must lie in \[0, 1\)"):
            flip_labels(labels, share, 2, generator())
    with pytest.raises(ValueError, match="`classes` must be at least 2, got 1"):
        flip_labels(labels, 0.1, 1, generator())
    for ratio in (0.9, 10.5, float("nan")):
        with pytest.raises(
            ValueError, match=r"`ratio` of the largest to the smallest class must lie in \[1, 10\]"
        ):
            long_tail(labels, ratio, generator())
    with pytest.raises(
        ValueError, match="`sizes` must add up to at most the 10 examples of class 0"
    ):
        stratified_split(labels, (5, 6), generator())
