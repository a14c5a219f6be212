"""The gallery has a picture and a command of every program, and the release what it needs."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/pages/gallery.md").read_text()
# What checks or draws, and is of no interest by itself.
TOOLS = {
    *("absolute_links", "check_wheel", "draw_gallery", "draw_history", "draw_results"),
    *("record_results", "run_tutorials", "write_api_pages"),
}
PROGRAMS = {
    path.stem: path.relative_to(ROOT).as_posix()
    for folder in ("examples", "scripts")
    for path in sorted((ROOT / folder).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text() and path.stem not in TOOLS
}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_has_a_picture_and_a_command(name: str) -> None:
    (section,) = [part for part in PAGE.split("\n### ") if f"pictures/gallery/{name}.png" in part]
    assert f"```bash\npython {PROGRAMS[name]}" in section
    assert re.search(r"!\[[^]]{20,}\]", section), "a picture has a text for who cannot see it"
    assert re.search(r"\]\((results/[a-z-]+|benchmarks|guides/[a-z-]+)\.md", section)
    picture = (ROOT / f"docs/pages/pictures/gallery/{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) <= 40_000


@pytest.mark.usefixtures("scripts")
def test_pictures_are_drawn_from_runs_and_benchmarks(tmp_path: Path, capsys: Any) -> None:
    drawing = import_module("draw_gallery")
    assert drawing.PICTURES.keys() == PROGRAMS.keys()  # each program's
    (tmp_path / "maml_plus_plus").mkdir()
    text = "  MAML: test accuracy 0.700, with\nMAML++: test accuracy 0.800, with\n"
    (tmp_path / "maml_plus_plus/output.txt").write_text(text)
    names = ("maml_plus_plus", "bench", "meta_sgd")
    drawing.main(drawing.Config(names, runs=tmp_path, out=tmp_path / "out"))
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == ["bench", "maml_plus_plus"]
    assert "meta_sgd has not been run: add --run" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"`names` must be some of .*, got \['nothing'\]"):
        drawing.Config(("nothing",))


@pytest.mark.usefixtures("scripts")
def test_numbers_are_read_after_a_whole_name() -> None:
    read_row = import_module("gallery_plots").read_row
    text = "| MAML++: .5 |\n| MAML: -1.5e-3 ± 2 |"
    assert read_row(text, "MAML") == [-1.5e-3, 2.0]
    with pytest.raises(ValueError, match="a line must begin with 'ML'"):
        read_row(text, "ML")


@pytest.mark.usefixtures("scripts")
def test_links_of_the_readme_are_absolute_where_pypi_shows_it() -> None:
    absolute = import_module("absolute_links").absolute
    text = "[a](docs/b.md#c) ![d](e.svg) [![d](e.svg)](f) [g](#h) [i](https://j)"
    page, file = (
        f"https://{start}"
        for start in (
            "github.com/torch-metaopt/torch-metaopt/blob/v1",
            "raw.githubusercontent.com/torch-metaopt/torch-metaopt/v1",
        )
    )
    assert absolute(text, "v1") == (
        f"[a]({page}/docs/b.md#c) ![d]({file}/e.svg) [![d]({file}/e.svg)]({page}/f) [g](#h) [i](https://j)"
    )
    readme = absolute((ROOT / "README.md").read_text(), "v1")
    assert not re.search(r"\]\((?!https://|#)|(src|href)=\"(?!https://|#)", readme)


def test_what_publishes_is_pinned_and_checks_the_tag() -> None:
    workflow = (ROOT / ".github/workflows/publish.yml").read_text()
    actions = re.findall(r"uses: (\S+)", workflow)
    assert len(actions) == 5
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in actions)
    assert '"$GITHUB_REF_NAME" != "v$version"' in workflow
    assert workflow.index("check_wheel.py dist") < workflow.index("id-token: write")
    for script in re.findall(r"scripts/[a-z_.]+", workflow):
        assert (ROOT / script).exists(), script
