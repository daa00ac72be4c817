"""Rows of text as a Markdown table."""

from collections.abc import Mapping, Sequence


def padded_table(rows: Sequence[Mapping[str, str]]) -> str:
    """One line per row, its columns padded for the terminal; all rows have the columns of the first."""
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]}
    head = [column.rjust(width) for column, width in widths.items()]
    rule = ["-" * (width - 1) + ":" for width in widths.values()]
    body = [[row[column].rjust(width) for column, width in widths.items()] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))
