"""The command lines.

Each runs end to end in a small form, and says what is wrong when it cannot.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import metaopt as mo
from optimizers import SGD, AdafactorMLP, Adam, MLPOptimizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def test_train_then_evaluate(tmp_path, capsys) -> None:
    import evaluate
    import train_optimizer

    config = train_optimizer.Config(
        task="digits",
        horizon=6,
        steps=4,
        batch=2,
        hidden_size=4,
        validate_every=2,
        finish=0,
        out=tmp_path / "run",
    )
    train_optimizer.main(config)
    weights = tmp_path / "run/weights.safetensors"
    optimizer = MLPOptimizer.load(weights)
    assert optimizer.hidden_size == 4
    assert list((tmp_path / "run").glob("events.*"))

    evaluate.main(
        evaluate.Config(
            weights=(weights,),
            horizon=6,
            seeds=3,
            tuning_seeds=2,
            grid=(0.01, 0.1),
            out=tmp_path / "evaluation",
        )
    )
    printed = capsys.readouterr().out
    names = [
        "learned: MLPOptimizer",
        "Adam, lr 0.",
        "SGD, momentum 0.9, lr 0.",
        "SGD, Nesterov 0.9, lr 0.",
        "RMSprop, lr 0.",
    ]
    assert all(name in printed for name in names)
    expected = mo.evaluate({"learned": optimizer}, mo.tasks.DigitsMLP(), horizon=6, seeds=3).mean(
        "learned"
    )
    assert f"{expected:.4f}" in printed
    assert (tmp_path / "evaluation/digits.png").exists()


def test_a_truncated_lstm_on_quadratics(tmp_path) -> None:
    import train_optimizer

    train_optimizer.main(
        train_optimizer.Config(
            optimizer="lstm",
            task="quadratics",
            horizon=6,
            window=4,
            steps=3,
            batch=3,
            hidden_size=5,
            finish=2,
            finish_window=6,
            out=tmp_path,
        )
    )
    assert mo.Optimizer.load(tmp_path / "weights.safetensors").hidden_size == 5


@pytest.mark.parametrize("optimizer", ["adafactor-mlp", "rnn-mlp", "nn-adam"])
def test_each_optimizer_can_be_trained(optimizer: Any, tmp_path: Path) -> None:
    import train_optimizer

    config = train_optimizer.Config(
        optimizer=optimizer, task="quadratics-20", horizon=3, steps=2, batch=2, out=tmp_path
    )
    train_optimizer.main(config)
    kind, trained = (
        train_optimizer.OPTIMIZERS[optimizer],
        mo.Optimizer.load(tmp_path / "weights.safetensors"),
    )
    assert type(trained) is kind
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), kind().parameters()))


def test_training_goes_on_from_weights(tmp_path: Path) -> None:
    import train_optimizer

    AdafactorMLP(hidden_size=3, seed=5).save(tmp_path / "first")
    config = train_optimizer.Config(
        optimizer="adafactor-mlp",
        horizon=3,
        window=2,
        steps=1,
        finish=1,
        batch=1,
        start=tmp_path / "first",
        out=tmp_path,
    )
    train_optimizer.main(config)
    trained = AdafactorMLP.load(tmp_path / "weights.safetensors")
    assert trained.hidden_size == 3
    assert (tmp_path / "finish/weights.safetensors").exists()
    with pytest.raises(ValueError, match="holds a AdafactorMLP, not a MLPOptimizer"):
        train_optimizer.main(dataclasses.replace(config, optimizer="mlp"))


def test_a_recipe_fills_in_what_is_not_given() -> None:
    import train_optimizer

    config = train_optimizer.Config(optimizer="lstm", task="quadratics", batch=7)
    assert (config.window, config.second_order, config.batch) == (5, True, 7)
    assert train_optimizer.Config().finish == 120
    family, seen = train_optimizer.find_family(config)
    assert (family.functions, seen.batch) == (7, 1)
    assert train_optimizer.make_estimator(seen) == mo.TruncatedBackprop(5, 1, mo.Backprop(clip=1.0))
    other = train_optimizer.Config(optimizer="lstm", task="quadratics", estimator="pes")
    assert (other.window, other.batch, other.outer_lr) == (None, 8, 0.01)
    assert train_optimizer.find_family(other)[1] is other


@pytest.mark.parametrize("estimator", ["es", "pes", "nres"])
def test_training_by_evolution(estimator: Any, tmp_path: Path, capsys: Any) -> None:
    import train_optimizer

    config = train_optimizer.Config(
        task="quadratics",
        estimator=estimator,
        std=0.02,
        horizon=6,
        window=4,
        steps=3,
        batch=2,
        hidden_size=4,
        validate_every=1,
        out=tmp_path,
    )
    made = train_optimizer.make_estimator(config)
    kind, window = {"es": (mo.ES, 6), "pes": (mo.PES, 4), "nres": (mo.NRES, 4)}[estimator]
    assert type(made) is kind
    assert (made.std, made.pairs, made.window_of(6)) == (0.02, 2, window)
    train_optimizer.main(config)
    assert "mean validation loss" in capsys.readouterr().out
    assert MLPOptimizer.load(tmp_path / "weights.safetensors").hidden_size == 4


def test_train_schedule(tmp_path, capsys) -> None:
    import train_schedule

    config = train_schedule.Config(
        horizon=6, steps=3, batch=2, validate_every=1, seeds=3, grid=(0.1, 0.5), out=tmp_path
    )
    train_schedule.main(config)
    printed = capsys.readouterr().out
    assert all(
        name in printed for name in ("learned: lstm", "constant, best of 2", "cosine, best of 2")
    )
    learned = SGD.load(tmp_path / "lstm.safetensors")
    assert learned.lr.readout.abs().max() > 0
    assert (tmp_path / "schedule.png").exists()
    rates = train_schedule.observed_rates(SGD(0.3), mo.tasks.DigitsMLP(), horizon=4, seeds=2)
    torch.testing.assert_close(rates, torch.full((2, 4), 0.3))


def test_train_schedules_of_adam_on_the_final_loss(tmp_path, capsys) -> None:
    import train_schedule

    config = train_schedule.Config(
        kind=("gp", "policy"),
        optimizer="adam",
        objective="final",
        start="cosine",
        horizon=6,
        steps=2,
        batch=2,
        validation_seeds=2,
        seeds=3,
        grid=(0.01, 0.02),
        warmups=(0, 2),
        transfer=(8, 8),
        out=tmp_path,
        json=tmp_path / "schedules.json",
    )
    train_schedule.main(config)
    assert "cosine, best of 4" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "schedules.json").read_text()).values()
    assert [row["name"].split(",")[0] for row in entry["test"]] == [
        "learned: gp",
        "learned: policy",
        "cosine",
        "constant",
    ]
    assert [row["name"].split(",")[0] for row in entry["transfer"]] == [
        "cosine",
        "learned: gp",
        "learned: policy",
    ]
    assert Adam.load(tmp_path / "policy.safetensors").lr.net.readout.abs().max() > 0


@pytest.mark.parametrize(
    "script",
    [
        "train_optimizer.py",
        "evaluate.py",
        "train_schedule.py",
        "maml.py",
        "meta_weight_net.py",
        "language_model.py",
        "search.py",
    ],
)
def test_help_lists_the_options(script: str, monkeypatch, capsys) -> None:
    path = str(ROOT / "scripts" / script)
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(path, run_name="__main__")
    assert not end.value.code
    printed = capsys.readouterr().out
    assert "--out" in printed or "{" in printed


def test_a_missing_weights_file_is_named(tmp_path) -> None:
    import evaluate

    with pytest.raises(FileNotFoundError, match=r"No weights file at .*nowhere\.safetensors"):
        evaluate.main(evaluate.Config(weights=(tmp_path / "nowhere.safetensors",), out=tmp_path))


def test_the_demo_compares_in_the_folder_of_its_training(tmp_path, monkeypatch) -> None:
    """Its second command finds the checkpoints of the first, which are no matter of its."""
    train, compare = (
        line.split()[1:]
        for line in (ROOT / "scripts/demo").read_text().splitlines()
        if line.startswith(".venv/bin/python")
    )
    folder = tmp_path / train[train.index("--out") + 1]
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/step-00000001.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", compare)
    with pytest.raises(FileNotFoundError, match=r"No weights file at runs/demo"):
        runpy.run_path(str(ROOT / compare[0]), run_name="__main__")


def test_install_says_in_one_line_what_is_wrong(tmp_path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/install", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = subprocess.run(
        [tmp_path / "scripts/install"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": "no-such-python"},
        check=False,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "Python 3.11 or newer is needed" in done.stderr


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("train_optimizer", {"horizon": 0}, "`horizon` must be positive, got 0"),
        ("train_optimizer", {"steps": 0}, "`steps` must be positive, got 0"),
        ("train_optimizer", {"finish": -1}, "`finish` must be at least 0, got -1"),
        ("evaluate", {"grid": ()}, r"`grid` must hold positive learning rates, got \(\)"),
        ("evaluate", {"seeds": 0}, "`seeds` must be positive, got 0"),
        ("search", {"trials": 0}, "`trials` must be positive, got 0"),
        ("search", {"noise": 1.0}, r"`noise` must lie in \[0, 1\), got 1.0"),
        ("train_schedule", {"threads": 0}, "`threads` must be positive, got 0"),
        ("train_schedule", {"grid": (0.1, -1.0)}, "`grid` must hold positive learning rates"),
        (
            "train_schedule",
            {"warmups": (-1,)},
            r"`warmups` must hold numbers of steps, got \(-1,\)",
        ),
    ],
)
def test_silly_options_are_refused_before_anything_runs(
    script: str, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        importlib.import_module(script).Config(**options)


def test_an_optimizer_is_trained_on_families_and_judged_on_those_held_out(
    tmp_path, capsys, monkeypatch
) -> None:
    import evaluate
    import judging
    import train_on_families

    monkeypatch.setattr(judging, "OF_LEARNED", (1.0,))  # of the 14 rates, for time
    monkeypatch.setattr(judging, "HAND_DESIGNED", {"Adam": (Adam, (0.03,))})

    train_on_families.main(
        train_on_families.Config(
            steps=2,
            groups=1,
            pairs=2,
            window=5,
            horizon=(5, 8),
            validate_every=1,
            validation=1,
            out=tmp_path / "run",
        )
    )
    weights = tmp_path / "run/weights.safetensors"
    config = evaluate.Config(
        weights=(weights,),
        trained=("small",),
        task="held-out",
        families=("wine",),
        seeds=2,
        tuning_seeds=1,
        out=tmp_path / "table",
    )
    evaluate.main(config)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("Adam, cosine", "small, untuned", str(weights)))
    figures = json.loads((tmp_path / "table/judgement.json").read_text())
    assert figures["wine"]["small"]["own"]["rate"] == 1.0
    assert figures["wine"]["small"]["own"]["mean"] < figures["wine"][str(weights)]["own"]["mean"]
    assert (tmp_path / "table/held-out.png").exists()
    evaluate.main(dataclasses.replace(config, resume=True, seeds=3))  # seeds: nothing is run again
    assert printed.endswith(capsys.readouterr().out)
    with pytest.raises(ValueError, match=r"no family \['iris'\]; there are"):
        evaluate.main(evaluate.Config(task="held-out", families=("iris",)))
    with pytest.raises(ValueError, match="`steps` must be positive, got 0"):
        train_on_families.Config(steps=0)


def test_differences_from_random_search_are_paired_and_finite() -> None:
    import search

    curves = {"random": [[1.0], [2.0], [3.0]], "sobol": [[0.5], [2.5], [math.inf]]}
    printed = search.report(search.Config(backends=("random", "sobol"), seeds=3), curves)
    (row,) = (line.split() for line in printed.splitlines() if line.startswith("sobol"))
    assert row[3:9] == ["+0.000", "±", "0.500", "1", "of", "3"]
    first = {name: runs[:1] for name, runs in curves.items()}
    printed = search.report(search.Config(seeds=1), first)
    assert "-0.500" in printed
    assert "±" not in printed


def test_recorded_programs_get_the_places_of_their_data(tmp_path: Path) -> None:
    from record_results import run

    program = "-c 'import sys; print(*sys.argv[1:])'"
    found = run([f"{program} {{texts}} {{out}}"], {"texts": tmp_path / "o'clock data"})
    assert found["printed"] == ["ARCHIVE FOLDER"]
    assert found["commands"] == [f"{program} ARCHIVE FOLDER"]


def test_ways_to_search_are_compared_and_go_on(tmp_path, capsys) -> None:
    import search

    config = search.Config(
        problem="meta-weight-net", backends=("sobol",), trials=2, seeds=1, steps=20
    )
    config = dataclasses.replace(config, out=tmp_path)
    first = search.main(config)
    assert "Least loss after 2 trials" in capsys.readouterr().out
    assert (tmp_path / "meta-weight-net/best.png").exists()
    assert (tmp_path / "meta-weight-net/sobol.png").exists()
    longer = search.main(dataclasses.replace(config, trials=3))
    assert all(a >= b for name in first for a, b in zip(first[name], longer[name], strict=True))
    lines = (tmp_path / "meta-weight-net/sobol-0.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3  # the search; a begin and an end of three trials
