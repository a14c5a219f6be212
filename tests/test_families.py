"""Families of tasks: what they are, and that what is held out is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import metaopt as mo
from metaopt.meta_training import sample_tasks
from metaopt.tasks.examples import TRAINING, digits_part, table
from metaopt.tasks.families import log_uniform
from metaopt.tasks.networks import ACTIVATIONS

FAMILIES = {
    "mlp": mo.tasks.Supervised(mo.tasks.MLP((5, 3), "gelu"), held_out=6),
    "linear": mo.tasks.Supervised(mo.tasks.MLP(()), mo.tasks.Classes("wine"), 7),
    "conv": mo.tasks.Supervised(mo.tasks.ConvNet((2, 3))),
    "autoencoder": mo.tasks.Supervised(
        mo.tasks.MLP((4,), "tanh"), mo.tasks.Reconstruction(mo.tasks.Classes("breast_cancer"))
    ),
    "teacher": mo.tasks.Supervised(mo.tasks.MLP(), mo.tasks.Teacher(6, 3, noise=0.2)),
    "values": mo.tasks.Supervised(
        mo.tasks.MLP(), mo.tasks.Teacher(6, 3, regression=True), held_out=4
    ),
    "waves": mo.tasks.Supervised(mo.tasks.MLP((8,)), mo.tasks.Waves(), 10, held_out=5),
    "rescaled": mo.tasks.Rescaled(mo.tasks.Supervised(mo.tasks.MLP((5,))), (2.0, 0.5, 3.0, 1.0)),
    "quadratics": mo.tasks.NoisyQuadratics(4, 50.0, 0.1),
    "rosenbrock": mo.tasks.Rosenbrock(3),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_task_is_a_function_of_the_generator_and_can_be_learned(name: str) -> None:
    """The loss of the first batches goes down under a small step along the gradient."""
    family = FAMILIES[name]
    one, other = (sample_tasks(family, torch.Generator().manual_seed(3), 3, 5) for _ in range(2))
    for leaf, again in zip(mo.tree.leaves(tuple(one)), mo.tree.leaves(tuple(other)), strict=True):
        assert torch.equal(leaf, again)
    batch = mo.tree.map(lambda leaf: leaf[:, 0], one.batches)
    loss = torch.func.vmap(torch.func.grad_and_value(family.loss))
    grads, before = loss(one.params, batch)
    moved = mo.tree.map(lambda p, g: p - 1e-5 * g, one.params, grads)
    _, after = loss(moved, batch)
    assert (after < before).all()


def test_initial_weights_have_the_spread_that_is_said() -> None:
    for name, (_, variance) in ACTIVATIONS.items():
        network = mo.tasks.MLP((400,), name, 0.7)
        params = network.init(torch.Generator().manual_seed(0), 300, 10)
        std = params["weight0"].std()
        assert abs(std - 0.7 * math.sqrt(variance / 300)) < 0.01 * std  # 120,000 weights
        assert not params["bias0"].any()
    params = mo.tasks.ConvNet((64, 64)).init(torch.Generator().manual_seed(0), 64, 10)
    assert abs(params["weight1"].std() - math.sqrt(2 / 576)) < 0.02 * math.sqrt(2 / 576)
    assert params["weight"].shape == (10, 64 * 4)


def test_networks_equal_layers_of_torch() -> None:
    x = torch.randn(3, 64)
    generator = torch.Generator().manual_seed(0)
    params = mo.tasks.ConvNet((2, 3), "silu").init(generator, 64, 5)
    layers = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 2, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(2, 3, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(12, 5)),
    )
    with torch.no_grad():
        for p, own in zip(layers.parameters(), params.values(), strict=True):
            p.copy_(own)
    torch.testing.assert_close(mo.tasks.ConvNet((2, 3), "silu")(params, x), layers(x))


def test_digits_to_judge_on_are_never_drawn() -> None:
    (train, _), (test, labels) = digits_part(True), digits_part(False)
    assert (len(train), len(test)) == (TRAINING, 450)
    whole = {tuple(row) for row in table("digits")[0].tolist()}
    assert {tuple(row) for row in train.tolist()} | {tuple(row) for row in test.tolist()} == whole
    family = mo.tasks.Supervised(mo.tasks.MLP(()), mo.tasks.Classes())
    params = {"weight0": torch.zeros(10, 64), "bias0": torch.zeros(10)}
    params["bias0"][3] = 1
    assert family.accuracy(params) == (labels == 3).float().mean()
    wine = mo.tasks.Supervised(mo.tasks.MLP(()), mo.tasks.Classes("wine"))
    assert wine.accuracy(params) is None


def test_held_out_examples_of_a_task_are_in_none_of_its_batches() -> None:
    family = mo.tasks.Supervised(mo.tasks.MLP(), mo.tasks.Classes("wine"), 16, held_out=64)
    task = family.sample(torch.Generator().manual_seed(0), 50)
    seen = {tuple(row) for row in task.batches[0].flatten(0, 1).tolist()}
    assert len(seen) > 100
    assert not seen & {tuple(row) for row in task.held_out[0].tolist()}


def test_rescaled_is_the_same_function_of_other_parameters() -> None:
    family = mo.tasks.Supervised(mo.tasks.MLP((5,)))
    scaled = FAMILIES["rescaled"]
    plain, other = (f.sample(torch.Generator().manual_seed(1), 2) for f in (family, scaled))
    batch = mo.tree.index(plain.batches, 0)
    torch.testing.assert_close(
        family.loss(plain.params, batch), scaled.loss(other.params, batch), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(other.params["weight0"] * 2.0, plain.params["weight0"])
    with pytest.raises(ValueError, match="one for each tensor of the parameters, 4, got 2"):
        mo.tasks.Rescaled(family, (1.0, 2.0)).sample(torch.Generator(), 2)


def test_a_mixture_draws_in_proportion() -> None:
    first, second = mo.tasks.Quadratics(2), mo.tasks.Quadratics(3)
    mixture, generator = mo.tasks.Mixture(((3.0, first), (1.0, second))), torch.Generator()
    drawn = [mixture.draw(generator) for _ in range(400)]
    assert abs(drawn.count(first) - 300) < 4 * math.sqrt(400 * 3 / 16)
    with pytest.raises(ValueError, match="with positive weights"):
        mo.tasks.Mixture(((0.0, first),))


def test_random_networks_cover_their_ranges() -> None:
    """And what meta-training draws is nothing of what is held out."""
    mixture, generator = mo.tasks.small_networks(), torch.Generator().manual_seed(0)
    depths, activations, sizes, kinds = set(), set(), set(), set()
    for _ in range(300):
        family = mixture.draw(generator)
        inner = family.family if isinstance(family, mo.tasks.Rescaled) else family
        depths.add(len(inner.network.hidden))
        activations.add(inner.network.activation)
        sizes |= {inner.batch_size}
        assert all(8 <= width <= 40 for width in inner.network.hidden)
        kinds.add(type(inner.examples).__name__)
        assert getattr(inner.examples, "table", "digits") == "digits"
        family.sample(generator, 1)
    assert depths == {0, 1, 2, 3}
    assert activations == set(ACTIVATIONS)
    assert (min(sizes), max(sizes)) == (8, 64)
    assert kinds == {"Classes", "Teacher"}
    assert {log_uniform((2, 4), generator) for _ in range(50)} == {2, 3, 4}


def test_the_held_out_families_have_the_sizes_that_are_said() -> None:
    found = mo.tasks.held_out_families()
    task = {name: one.family.sample(torch.Generator(), 1) for name, one in found.items()}
    counts = {name: sum(p.numel() for p in task[name].params.values()) for name in task}
    assert counts == {
        "mlp": 64 * 64 + 64 + 64 * 32 + 32 + 32 * 10 + 10,
        "mlp, long": 64 * 64 + 64 + 64 * 32 + 32 + 32 * 10 + 10,
        "conv": 9 * 8 + 8 + 72 * 16 + 16 + 64 * 10 + 10,
        "wine": 13 * 16 + 16 + 16 * 3 + 3,
        "breast cancer": 30 * 24 + 24 + 24 * 2 + 2,
        "autoencoder": 2 * (64 * 32 + 32 * 8) + 32 + 8 + 32 + 64,
        "transformer": 5168,
        "LSTM": 7056,
    }
    assert [one.horizon for one in found.values()] == [100, 500, 200, 100, 200, 300, 300, 200]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mo.tasks.MLP((0,)), "MLP: `hidden` must be a positive integer, got 0"),
        (lambda: mo.tasks.MLP(activation="sin"), "MLP: `activation` must be .*got 'sin'"),
        (lambda: mo.tasks.Classes("iris"), "Classes: `table` must be .*got 'iris'"),
        (lambda: mo.tasks.Teacher(noise=-1), "Teacher: `noise` must not be negative, got -1"),
        (lambda: mo.tasks.NoisyQuadratics(3, 0.5), "at least 1 .* got 0.5 and 0.1"),
        (lambda: mo.tasks.Rosenbrock(1), "Rosenbrock: `dimension` must be .* 2, got 1"),
        (lambda: mo.tasks.RandomMLPs(widths=(9, 8)), "RandomMLPs: `widths` must be .* 9, got 8"),
        (
            lambda: mo.tasks.ConvNet((1,) * 4).init(torch.Generator(), 64, 2),
            "can be halved 4 times, got 64 pixels",
        ),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
