"""The command lines of all scripts: what is read, shown and saved, and how they end."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import metaopt as mo

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import command_line  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """A configuration with a field of each kind."""

    steps: int = 3
    """Outer steps."""
    rates: tuple[float, ...] = (0.1, 0.2)
    """Rates tried."""
    start: Path | None = None
    """Weights to begin with."""
    exact: bool = False
    """Exact or not."""
    maybe: bool | None = None
    """By default as it is best."""
    out: Path = Path("runs/x")
    """Folder."""
    resume: bool = False
    """Go on."""

    def __post_init__(self) -> None:
        if self.steps <= 0:
            raise ValueError(f"`steps` must be positive, got {self.steps}.")


def lead(main: Any, *arguments: str, monkeypatch: Any, config: Any = Config) -> int:
    """Run a script and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["scripts/some.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        command_line.run(main, config)
    code = stop.value.code
    return code if isinstance(code, int) else 1


def test_a_saved_configuration_is_read_back(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    found: list[Config] = []
    options = ["--steps", "7", "--rates", "0.5", "--exact", "--maybe", "True", "--start", "a b"]
    assert lead(found.append, *options, "--out", str(tmp_path), monkeypatch=monkeypatch) == 0
    assert "  rates = (0.5,)" in capsys.readouterr().out.splitlines()
    file = str(tmp_path / "some.json")
    assert lead(found.append, "--config", file, monkeypatch=monkeypatch) == 0
    assert lead(found.append, f"--config={file}", "--steps", "9", monkeypatch=monkeypatch) == 0
    assert found[0] == found[1] == Config(7, (0.5,), Path("a b"), True, True, tmp_path)
    assert found[2] == dataclasses.replace(found[0], steps=9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "got .*saved.json: Expecting property name"),
        ("[1]", "it holds a list"),
        ('{"step": 1}', r"it has \['step'\]; known are \['steps'"),
        ('{"steps": "many"}', "steps"),
        ('{"steps": -1}', "`steps` must be positive, got -1"),
        ('{"rates": {"a": 1}}', "rates"),
        (None, "No such file"),
    ],
)
def test_a_wrong_file_ends_it_before_any_work(
    text: str | None, message: str, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    file = tmp_path / "saved.json"
    if text is not None:
        file.write_text(text)
    assert lead(pytest.fail, "--config", str(file), monkeypatch=monkeypatch) == 2
    captured = capfd.readouterr()
    assert re.search(message, captured.err + captured.out)


def test_how_it_ends(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def fail(error: BaseException) -> Any:
        def main(config: Config) -> None:
            raise error

        return main

    out = ["--out", str(tmp_path)]
    stopped = fail(KeyboardInterrupt("SIGINT after step 3. Run it again with `resume=True`."))
    assert lead(stopped, *out, monkeypatch=monkeypatch) == 130
    assert "Interrupted. SIGINT after step 3." in capsys.readouterr().err
    assert lead(fail(mo.CheckpointError("not ours")), *out, monkeypatch=monkeypatch) == 1
    assert "Error: not ours" in capsys.readouterr().err
    assert lead(pytest.fail, "--steps", "0", monkeypatch=monkeypatch) == 2
    assert lead(pytest.fail, "--stepp", "1", monkeypatch=monkeypatch) == 2
    mo.Checkpoints(tmp_path / "checkpoints/part").save(1, {})
    assert lead(pytest.fail, *out, monkeypatch=monkeypatch) == 2
    assert "has checkpoints. Add --resume to go on" in capsys.readouterr().err
    assert lead(lambda config: None, *out, "--resume", monkeypatch=monkeypatch) == 0


def test_what_cannot_be_shared_is_done_by_one_process(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    done: list[Any] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["program.py", "--out", str(tmp_path / "out")])
    for rank in ("1", "0"):
        assert not done
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="0"):
            command_line.run(done.append, Config, shares=False)
        assert (tmp_path / "out").exists() == (rank == "0")
    captured = capsys.readouterr()
    assert captured.out.count("steps = 3") == 1
    assert captured.err.count("Nothing here can be shared: one process works") == 1
    assert len(done) == 1


def test_subcommands(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    found: list[Config] = []
    configs = {"one": Config, "other": dataclasses.make_dataclass("Other", [("out", Path)])}
    out = ["--out", str(tmp_path)]
    assert lead(found.append, "other", *out, monkeypatch=monkeypatch, config=configs) == 0
    assert dataclasses.asdict(found[0]) == {"out": tmp_path}
    assert lead(pytest.fail, "third", monkeypatch=monkeypatch, config=configs) == 2
    assert lead(pytest.fail, "--help", monkeypatch=monkeypatch, config=configs) == 0
    assert "{one,other}" in capsys.readouterr().out


def test_an_interrupted_script_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """SIGTERM while it trains; the weights are then those of an uninterrupted run."""
    import train_optimizer

    options = ["--task", "quadratics", "--horizon", "5", "--batch", "2", "--finish", "0"]
    options += ["--validate-every", "4", "--steps", "9", "--hidden-size", "4"]

    def train(folder: str, *more: str) -> int:
        given = [*options, "--out", str(tmp_path / folder), *more]
        return lead(
            train_optimizer.main, *given, monkeypatch=monkeypatch, config=train_optimizer.Config
        )

    assert train("straight") == 0
    step, calls = mo.MetaTraining.step, itertools.count(1)

    def signalled(training: mo.MetaTraining) -> Any:
        if next(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(training)

    with monkeypatch.context() as patched:
        patched.setattr(mo.MetaTraining, "step", signalled)
        assert train("parts") == 130
    assert "Interrupted. SIGTERM after step 6 of 9. It is saved in" in capsys.readouterr().err
    assert train("parts", "--resume") == 0
    assert next(calls) == 7
    one, other = (
        mo.Optimizer.load(tmp_path / name / "weights.safetensors") for name in ("straight", "parts")
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
