"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Sequence


def write_table(
    headers: Sequence[str], rows: Sequence[Sequence[str | float]], formats: Sequence[str]
) -> str:
    """Return a line of headers, a rule, and a line per row; numbers stand to the right.

    Args:
        headers: one for each column.
        rows: one value for each column; in each column all text or all numbers.
        formats: how `format` writes the numbers of each column, for example ".4f"; "" for text, and
            for numbers as they are.
    """
    columns = []
    for header, form, *values in zip(headers, formats, *rows, strict=True):
        numeric = any(not isinstance(value, str) for value in values)
        cells = [header, *(format(value, form) for value in values)]
        # Two more for numbers: flush right, a header would touch that of a text to its left.
        width = max(len(header) + 2 * numeric, *map(len, cells))
        lines = [cells[0], "-" * width, *cells[1:]]
        columns.append([line.rjust(width) if numeric else line.ljust(width) for line in lines])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
