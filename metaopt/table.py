"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Sequence


def write_table(headers: Sequence[str], rows: Sequence[Sequence[str | float]], formats: Sequence[str]) -> str:
    """Return a line of headers, a rule, and a line per row; numbers stand to the right.

    Args:
        headers: one for each column.
        rows: one value for each column; in each column all text or all numbers.
        formats: how `format` writes the numbers of each column, for example ".4f"; "" for text, and for numbers as they are.
    """
    columns = []
    for header, form, *values in zip(headers, formats, *rows, strict=True):
        numeric = any(not isinstance(value, str) for value in values)
        cells = [header, *(format(value, form) for value in values)]
        width = max(len(header) + 2 * numeric, *map(len, cells))  # two more, to tell the header from that of a text beside it
        columns.append([cell.rjust(width) if numeric else cell.ljust(width) for cell in [cells[0], "-" * width, *cells[1:]]])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
