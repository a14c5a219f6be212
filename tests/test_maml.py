"""MAML: the sine waves, the meta-gradient of the convolutional network, and `scripts/maml.py`."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_omniglot import members, write

import metaopt as mo
from metaopt import tree
from metaopt.tasks.episode import Episode
from metaopt.tasks.omniglot import conv4
from metaopt.tasks.sinusoid import Sinusoids, sinusoid_mlp

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("maml")
    sys.path.remove(str(SCRIPTS))


def test_a_wave_is_a_sine_in_the_ranges_of_the_paper(float64):
    tasks = 2000
    (x, y), (x_query, y_query) = Sinusoids().sample(
        torch.Generator().manual_seed(0), tasks, shots=10, queries=3
    )
    assert x.shape == y.shape == (tasks, 10, 1)
    assert x_query.shape == y_query.shape == (tasks, 3, 1)
    assert -5 <= x.min() < -4.99
    assert 4.99 < x.max() <= 5
    # a sin(x - p) = (a cos p) sin x - (a sin p) cos x: two linear unknowns per wave, found on the
    # support points
    solution = torch.linalg.lstsq(torch.cat([x.sin(), -x.cos()], dim=-1), y).solution
    torch.testing.assert_close(
        torch.cat([x_query.sin(), -x_query.cos()], dim=-1) @ solution, y_query, rtol=0, atol=1e-6
    )
    amplitude, phase = (
        solution.norm(dim=1).flatten(),
        torch.atan2(solution[:, 1], solution[:, 0]).flatten(),
    )
    for value, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, math.pi)):
        assert low - 1e-6 <= value.min()
        assert value.max() <= high + 1e-6
        standard_error = (high - low) / math.sqrt(12 * tasks)
        assert abs(value.mean() - (low + high) / 2) < 4 * standard_error


def test_waves_repeat_under_a_seed_and_leave_the_global_generator_alone():
    state = torch.random.get_rng_state()
    first, again, other = (
        Sinusoids().sample(torch.Generator().manual_seed(seed), 2, shots=3, queries=3).query[1]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_wave_needs_points():
    with pytest.raises(
        ValueError, match=r"`tasks`, `shots` and `queries` must be positive, got 2, 0 and 5"
    ):
        Sinusoids().sample(torch.Generator(), 2, shots=0, queries=5)


def handwritten(params, images):
    """conv4, spelled out."""
    for index in range(4):
        images = F.conv2d(
            images, params[f"conv{index}.weight"], params[f"conv{index}.bias"], padding=1
        )
        mean, variance = (
            images.mean((0, 2, 3), keepdim=True),
            images.var((0, 2, 3), keepdim=True, correction=0),
        )
        images = (images - mean) / (variance + 1e-5).sqrt()
        images = (
            images * params[f"norm{index}.weight"][:, None, None]
            + params[f"norm{index}.bias"][:, None, None]
        )
        images = F.max_pool2d(images.relu(), 2)
    return images.flatten(1) @ params["head.weight"].T + params["head.bias"]


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("chunk_size", [1, None])
def test_the_meta_gradient_of_conv4_equals_a_loop_of_autograd(
    float64, script, chunk_size, first_order
):
    layout = torch.channels_last if chunk_size == 1 else torch.contiguous_format  # as in the script
    model = conv4(ways=3, filters=4).to(memory_format=layout)
    net = mo.functional(model)
    tasks, shots, queries, lr, steps = 3, 2, 3, 0.4, 2

    def part(count):
        return torch.rand(tasks, 3 * count, 1, 28, 28), torch.arange(3).repeat(count).expand(
            tasks, -1
        )

    episode = Episode(part(shots), part(queries))

    def loss(params, batch):
        return F.cross_entropy(net(params, batch[0]), batch[1])

    config = script.OmniglotConfig(
        data=Path(), inner_lr=lr, inner_steps=steps, first_order=first_order
    )
    grads, losses = mo.meta_grad(script.maml_loss(loss, config), chunk_size=chunk_size)(
        net.params, episode
    )

    expected_losses = []
    for index in range(tasks):
        (images, labels), (query, answers) = tree.index(episode, index)
        weights = net.params
        for _ in range(steps):
            value = F.cross_entropy(handwritten(weights, images), labels)
            inner = torch.autograd.grad(value, list(weights.values()), create_graph=not first_order)
            weights = {
                name: weight - lr * grad
                for (name, weight), grad in zip(weights.items(), inner, strict=True)
            }
        expected_losses.append(F.cross_entropy(handwritten(weights, query), answers))
    expected = torch.autograd.grad(torch.stack(expected_losses).mean(), list(net.params.values()))
    torch.testing.assert_close(losses, torch.stack(expected_losses).detach(), rtol=0, atol=1e-10)
    for (name, grad), reference in zip(grads.items(), expected, strict=True):
        # the gradients are of the order of 1 and float64 keeps 16 digits; a few are lost in the two
        # nested derivatives
        torch.testing.assert_close(
            grad, reference, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert max(grad.abs().max() for grad in grads.values()) > 0.01


def test_adapt_returns_the_parameters_after_each_number_of_steps(script):
    net = mo.functional(sinusoid_mlp())
    task = tree.index(
        Sinusoids().sample(torch.Generator().manual_seed(0), 1, shots=5, queries=5), 0
    )

    def loss(params, batch):
        return F.mse_loss(net(params, batch[0]), batch[1])

    path = script.adapt(loss, 0.01, (0, 1, 3), net.params, task)
    weights, expected = net.params, []
    for step in range(4):
        expected += [weights] if step in (0, 1, 3) else []
        grads = torch.autograd.grad(loss(weights, task.support), list(weights.values()))
        weights = {
            name: (weight - 0.01 * grad).detach().requires_grad_()
            for (name, weight), grad in zip(weights.items(), grads)
        }
    assert len(path) == 3
    for found, wanted in zip(path, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)  # the same float32 operations


@pytest.mark.parametrize("larger_is_better", [False, True])
def test_fine_tuning_takes_the_best_finite_rate_of_each_number_of_steps(script, larger_is_better):
    nan = math.nan
    means = {0.1: [1.0, 5.0, nan], 0.2: [2.0, 4.0, 3.0], 0.3: [nan, 6.0, 2.0]}

    def curves(rate, tasks):  # scores of two tasks around the mean; the test tasks are 10 higher
        return torch.tensor(means[rate]) + torch.tensor([[-1.0], [1.0]]) + tasks

    scores, rates = script.fine_tune(
        curves, tuple(means), 0.0, 10.0, larger_is_better=larger_is_better
    )
    assert rates == ([0.2, 0.3, 0.2] if larger_is_better else [0.1, 0.2, 0.3])
    assert scores.mean(0).tolist() == (
        [12.0, 16.0, 13.0] if larger_is_better else [11.0, 14.0, 12.0]
    )


def test_the_interval_of_known_scores(script):
    mean, margin = script.mean_and_margin(torch.tensor([[0.0], [1.0]]).repeat(50, 1))
    assert mean.item() == 0.5
    # the sample variance of 50 zeros and 50 ones is 25/99
    assert margin.item() == pytest.approx(1.96 * math.sqrt(25 / 99 / 100), rel=1e-6)


def test_the_sinusoid_run_learns_and_writes_what_it_says(script, tmp_path):
    config = script.SinusoidConfig(
        inner_steps=1,
        max_steps=400,
        pretrain_steps=100,
        test_tasks=100,
        test_steps=(0, 1, 5),
        out=tmp_path,
    )
    scores = script.run_sinusoid(config)
    assert {name: tuple(score.shape) for name, score in scores.items()} == {
        "MAML": (100, 3),
        "pretrained, rate tuned": (100, 3),
    }
    error = scores["MAML"].mean(0)
    # a constant 0 has the error E[a^2] / 2 = 4.3, the mean of all waves about 3.5; 400
    # meta-gradients are a start
    assert error[1] < error[0]
    assert error[2] < 3.4
    assert (tmp_path / "maml.png").stat().st_size > 10_000
    assert "| MAML " in (tmp_path / "report.md").read_text()
    assert list((tmp_path / "maml").glob("events*"))
    model = sinusoid_mlp()
    model.load_state_dict(load_file(tmp_path / "maml.safetensors"))
    draw = torch.Generator().manual_seed(script.TEST_SEED)
    x, y = (
        Sinusoids()
        .sample(draw, config.test_tasks, shots=config.shots, queries=config.test_queries)
        .query
    )
    # the saved weights have the reported error; float32 sums of 100 numbers
    torch.testing.assert_close(
        (model(x) - y).square().mean((1, 2)).detach(), scores["MAML"][:, 0], rtol=1e-4, atol=1e-5
    )


def lead(script) -> None:
    """Run it as a program, with `sys.argv`."""
    with pytest.raises(SystemExit) as stop:
        script.command_line.run(script.main, script.CONFIGS)
    assert stop.value.code == 0


def test_the_omniglot_run_learns_to_adapt(script, tmp_path, monkeypatch):
    archive = write(tmp_path / "images_background.zip", members())
    out = tmp_path / "run"
    command = [
        "maml.py",
        "omniglot",
        "--data",
        str(archive),
        "--out",
        str(out),
        "--ways",
        "3",
        "--queries",
        "2",
        "--test-queries",
        "3",
    ]
    sizes = [
        "--filters",
        "8",
        "--meta-batch",
        "2",
        "--max-steps",
        "40",
        "--pretrain-steps",
        "30",
        "--test-tasks",
        "20",
    ]
    rates = ["--inner-lr", "0.1", "--lr", "0.003"]
    monkeypatch.setattr(
        sys,
        "argv",
        [*command, *sizes, *rates, "--test-steps", "0", "1", "--test-alphabets", "Latin"],
    )
    lead(script)
    table = (out / "report.md").read_text()
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:-1]
        for line in table.splitlines()
        if line.startswith("|")
    }
    before, after = (float(cell.split("±")[0]) for cell in rows["MAML"])
    # characters are rectangles at three heights: easy, and 1/3 is chance
    assert before < 0.6
    assert after > 0.7
    assert float(rows["pretrained features, nearest centroid"][0].split("±")[0]) > 0.5
    assert (out / "maml.png").stat().st_size > 10_000
    model = conv4(3, 8)
    model.load_state_dict(load_file(out / "maml.safetensors"))


def test_the_omniglot_run_without_data_says_where_it_looked(script, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "maml.py",
            "omniglot",
            "--data",
            str(tmp_path / "nowhere"),
            "--out",
            str(tmp_path / "run"),
        ],
    )
    with pytest.raises(FileNotFoundError, match=r"No Omniglot data at .*nowhere"):
        lead(script)
