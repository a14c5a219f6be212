"""The tables of docs/pages/choose/: their figures, and a small run of what measures them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def test_the_pages_show_the_figures_of_the_file() -> None:
    import choices_report
    from bench_report import between

    figures = json.loads((ROOT / "benchmarks/choices.json").read_text())
    assert figures.keys() == choices_report.PAGES.keys()
    for part, name in choices_report.PAGES.items():
        page = (ROOT / name).read_text()
        assert between(page, part, choices_report.tables(part, figures)) == page


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact rules are exact, and the tables can be made of what was found.

    Memory is measured by the library, which has tests of its own: the profiler takes seconds.
    """
    import choices_report
    import compare_choices

    monkeypatch.setattr(compare_choices, "peak_memory", lambda run, device: 2**20)
    every, some = compare_choices.rules_at, {"Backprop()", "Implicit(Direct())", "T1T2()"}
    monkeypatch.setattr(
        compare_choices,
        "rules_at",
        lambda *where, few: {
            name: rule for name, rule in every(*where, few=few).items() if name in some
        },
    )

    config = compare_choices.Config(
        parts=("rules", "memory"),
        examples=12,
        width=2,
        converge=3,
        steps=2,
        early=2,
        loop=4,
        repeats=1,
        out=tmp_path,
    )
    compare_choices.main(config)
    figures = choices_report.read(tmp_path)
    assert figures.keys() == {"rules", "starts", "memory"}
    decays = figures["rules"]["found"]["weight decays"]["rows"]
    assert decays["Backprop()"]["early"]["error"] < 1e-10
    assert decays["Implicit(Direct())"]["late"]["error"] < 1e-10
    assert decays["T1T2()"]["early"]["error"] > 1e-3
    memory = figures["memory"]["found"]
    for name in ('Backprop(memory="steps")', "Backprop(memory=Revolve(5))", "ForwardMode()"):
        assert memory[name]["error"] < 1e-10
    for part in figures:
        assert "<code>Backprop(" in choices_report.tables(part, figures)


def test_estimates_beside_the_exact_gradient() -> None:
    """A full unrolling has the size and direction of another one; half of it has half the size."""
    import torch
    from compare_choices import Config, Draws, summarise

    import metaopt as mo
    from optimizers import SGD, Positive

    config, optimizer = Config(horizon=2, window=2), SGD(Positive(0.05))
    draws = Draws(config, mo.FullUnroll(2, mo.Backprop()), optimizer, seed=0)
    for _ in range(3):
        draws.draw()
    mean = torch.stack(draws.means).mean(0)
    assert summarise(draws, mean)["size"] == pytest.approx(1)
    assert summarise(draws, mean)["cosine"] == pytest.approx(1)
    assert summarise(draws, 2 * mean)["size"] == pytest.approx(0.5)


def test_a_window_that_does_not_divide_the_horizon_is_refused() -> None:
    from compare_choices import Config

    with pytest.raises(ValueError, match="`horizon` must be a multiple of `window`"):
        Config(horizon=5, window=2)
