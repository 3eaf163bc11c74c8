"""CSV as every command writes it: one way to tell a number, and no text that a spreadsheet takes for a formula."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from wsi_idc.console import printable

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
Texts = Literal["safe", "exact"]
"""How texts are told: "safe" as `safe_cell` has them; "exact" as they are, in tables that are read back by name."""


def safe_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula, and no terminal for a command."""
    shown = printable(text).replace("\n", "\\n")
    return f"'{shown}" if text.startswith(_FORMULA) else shown


def csv_text(rows: Iterable[Mapping[str, Any]], names: Sequence[str] | None = None, texts: Texts = "safe") -> str:
    """A table with a head.

    Args:
        rows: values by name; one that is not there is empty.
        names: the columns; those of all rows, in the order in which they come up, where it is None.
        texts: how texts are told.
    """
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row)) if names is None else names
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([_cell(name, texts) for name in names])
    writer.writerows([_cell(row.get(name), texts) for name in names] for row in rows)
    return stream.getvalue()


def _cell(value: Any, texts: Texts) -> str:
    """A value as CSV has it; floats by their shortest form that reads back the same, NaN and None as nothing."""
    if value is None or value != value:
        return ""
    return safe_cell(value) if isinstance(value, str) and texts == "safe" else str(value)
