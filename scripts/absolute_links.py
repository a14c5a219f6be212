"""Make the relative links of a Markdown file absolute, for pages outside the repository.

    python scripts/absolute_links.py README.md v0.2.0

PyPI shows the README, and a relative link leads nowhere there. The file is changed in place: the
workflow that publishes does this just before it builds.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

REPOSITORY = "torch-metaopt/torch-metaopt"
PAGES = f"https://github.com/{REPOSITORY}/blob"
FILES = f"https://raw.githubusercontent.com/{REPOSITORY}"  # pictures, not pages about pictures
RELATIVE = r"\((?!https?://|#)"  # where a target begins


def absolute(text: str, ref: str) -> str:
    """Return the text with each relative link leading to the repository at a tag or branch."""
    text = re.sub(rf"(!\[[^][]*\]){RELATIVE}", rf"\1({FILES}/{ref}/", text)
    return re.sub(rf"(\]){RELATIVE}", rf"\1({PAGES}/{ref}/", text)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} FILE TAG")
    file, ref = Path(sys.argv[1]), sys.argv[2]
    file.write_text(absolute(file.read_text(), ref))
