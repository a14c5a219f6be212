"""The README's programs run as written, one after the other in one namespace."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_python_blocks_of_the_readme_run(tmp_path, monkeypatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 5
    (tmp_path / "readme.py").write_text("\n".join(blocks))
    monkeypatch.chdir(tmp_path)
    after = runpy.run_path(str(tmp_path / "readme.py"))
    assert after["report"].curves["learned"].shape == (8, 50)
    assert after["gradient"].abs().sum() > 0
    assert (tmp_path / "runs/readme/curves.png").exists()
    assert list((tmp_path / "runs/readme").glob("events.*"))


def test_the_commands_of_the_readme_exist() -> None:
    commands = set(re.findall(r"(scripts/[a-z_]+(?:\.py)?)", README.read_text()))
    assert {"scripts/demo", "scripts/test"} <= commands
    for command in commands:
        assert (README.parent / command).is_file(), command
