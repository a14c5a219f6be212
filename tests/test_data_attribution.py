"""`scripts/data_attribution.py`: the metagradient by brute force, and scores that are known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import metaopt as mo

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import attribution_report

    monkeypatch.setattr(attribution_report, "DRAWS", 50)  # for time


def small(**options: Any) -> Any:
    import data_attribution

    given = {"examples": 12, "tests": 3, "subsets": 4, "steps": 3, "batch_size": 6, "hidden": 4}
    return data_attribution.Digits(**(given | options))


@pytest.mark.parametrize("memory", ["steps", mo.Revolve(2)], ids=["steps", "revolve"])
def test_the_metagradient_is_that_of_plain_autograd_through_the_training(
    memory: Any, float64: None
) -> None:
    import attribution
    import data_attribution

    problem = data_attribution.make_problem(small(), seed=1)
    problem = problem._replace(
        examples=(problem.examples[0].double(), problem.examples[1]),
        tests=(problem.tests[0].double(), problem.tests[1]),
    )
    weights = torch.ones(12, requires_grad=True)
    (w1, b1, w2, b2), velocity = problem.params.values(), [0.0] * 4
    params = [leaf.detach().requires_grad_() for leaf in (w1, b1, w2, b2)]

    def losses(params: Any, x: Tensor, y: Tensor) -> Tensor:
        logits = torch.tanh(x @ params[0].T + params[1]) @ params[2].T + params[3]
        return logits.logsumexp(1) - logits[torch.arange(len(y)), y]

    (x, y), tests = problem.examples, problem.tests
    for rows in problem.order:
        loss = (weights[rows] * losses(params, x[rows], y[rows])).sum() / 6
        loss = loss + 1e-3 / 2 * sum(p.square().sum() for p in params)
        slopes = torch.autograd.grad(loss, params, create_graph=True)
        velocity = [0.9 * v + slope for v, slope in zip(velocity, slopes, strict=True)]
        params = [p - 0.03 * v for p, v in zip(params, velocity, strict=True)]
    expected = torch.stack(
        [
            torch.autograd.grad(loss, weights, retain_graph=True)[0]
            for loss in losses(params, *tests)
        ]
    )
    assert expected.abs().min() > 0
    rule = mo.Backprop(memory=memory)
    found = attribution.metagradients(problem, rule, torch.arange(3))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_training_on_halves_is_training_with_their_weights(tmp_path: Path) -> None:
    import data_attribution

    config = small(steps=12, out=tmp_path)  # two parts, the second one short
    weights = data_attribution.half_subsets(config)
    assert weights.sum(1).tolist() == [12.0] * 4
    assert set(weights.flatten().tolist()) == {0.0, 2.0}
    real, _ = data_attribution.retrain(config, 0, weights)
    problem = data_attribution.make_problem(config, 0)
    for subset, losses in zip(weights, real.T, strict=True):
        expected = problem.test_losses(problem.train(subset), torch.arange(3))
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-4, atol=1e-5)  # float32
    assert real.std(1).min() > 1e-4


def test_scores_of_a_linear_world_are_1_and_of_an_unrelated_one_near_0(float64: None) -> None:
    from attribution_report import datamodeling_scores, judge, rank

    generator = torch.Generator().manual_seed(0)
    weights = 2 * (torch.rand(64, 30, generator=generator) < 0.5).double()
    scores = torch.randn(5, 30, generator=generator)
    real = 3 + scores @ weights.T
    assert datamodeling_scores(scores, weights, real).tolist() == pytest.approx([1.0] * 5)
    assert datamodeling_scores(-scores, weights, real).tolist() == pytest.approx([-1.0] * 5)
    assert rank(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]

    # ranks only: any rising function of the losses gives the same
    other = torch.randn(5, 30, generator=generator)
    judged = judge(
        {"exact": [("", scores, 1.0)], "other": [("a", -other, 1.0), ("b", other, 2.0)]},
        weights,
        real.exp(),
        [real],
        0,
    )
    figures = judged["exact"].figures
    assert (figures["score"], figures["other seeds"]) == pytest.approx((1.0, 1.0))
    assert figures["interval"] == pytest.approx([1.0, 1.0])
    figures = judged["other"].figures
    assert figures["score"] == max(figures["settings"].values())
    # 5 tests of correlations of deviation 1 / sqrt(63), 4 standard errors
    assert abs(figures["score"]) < 4 / (63 * 5) ** 0.5
    low, high = figures["interval"]
    assert low < figures["score"] < high < 1 - figures["below the exact"][0] + 1e-9


@pytest.mark.parametrize("kind", ["digits", "language"])
def test_from_the_command_line_and_again(kind: str, tmp_path: Path, capsys: Any) -> None:
    import command_line
    import data_attribution

    arguments = f"""{kind} --examples 12 --tests 3 --subsets 4 --steps 3 --batch-size 6 --products 2
        --dampings 0.1 --other-seeds {int(kind == "digits")} --memory revolve --snapshots 2
        --out {tmp_path} --json {tmp_path / "figures.json"}"""
    sizes = "--width 8 --length 8 --window 4" if kind == "language" else "--hidden 4"
    kinds = {"digits": data_attribution.Digits, "language": data_attribution.Language}
    config: Any = command_line.parse(kinds, f"{arguments} {sizes}".split())
    judged = data_attribution.main(config)
    printed = capsys.readouterr().out
    assert "| exact metagradient |" in printed
    assert ("| LDS, other seeds |" in printed) == (kind == "digits")
    assert ("test passage: " in printed) == (kind == "language")
    entry = json.loads((tmp_path / "figures.json").read_text())[kind]
    assert [*entry["methods"]] == [
        *("exact metagradient", "CG", "EKFAC + CG", "EKFAC", "KFAC", "Nystrom", "Neumann"),
        "T1 - T2",
    ]
    assert (tmp_path / "scores.png").exists()
    assert (tmp_path / "digits.png").exists() == (kind == "digits")
    if kind == "digits":
        again = data_attribution.main(dataclasses.replace(config, resume=True))
        for name, one in judged.items():  # from the checkpoints
            assert torch.equal(again[name].scores, one.scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tests": 0}, "`tests` must be at least 1, got 0"),
        ({"other_seeds": -1}, "`other_seeds` must be at least 0, got -1"),
        ({"batch_size": 13}, "`batch_size` must be at most `examples`, got 13 and 12"),
        ({"dampings": (0.0,)}, "`dampings` must hold positive numbers"),
    ],
)
def test_silly_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_more_digits_than_there_are_are_refused() -> None:
    import data_attribution

    with pytest.raises(ValueError, match="`tests` must be at most 450, got 451"):
        data_attribution.make_problem(small(tests=451), 0)
