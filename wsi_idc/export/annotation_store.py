"""The tiles as a database of tiatoolbox (SQLiteStore), which `tiatoolbox visualize` lays over the slide."""

import errno
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from wsi_idc.export.tables import tile_columns
from wsi_idc.results import Result
from wsi_idc.slides.toolbox import without_log_handlers

SUFFIX = ".db"
VERSION = 1


def write(result: Result, path: Path) -> list[str]:
    """See `Format.write`."""
    import shapely

    with without_log_handlers():
        from tiatoolbox.annotation.storage import Annotation

    columns = tile_columns(result)
    shift = np.tile(np.asarray(result.origin, np.int64), 2)
    squares = result.squares(np.arange(result.slide.count)) + shift
    positive = columns.pop("positive")
    names = {True: result.positive, False: f"not {result.positive}"}
    left_out = ("minx", "miny", "width", "height")
    named = {name: values.tolist() for name, values in columns.items() if name not in left_out}
    annotations = []
    for number, box in enumerate(shapely.box(*squares.T)):
        values = {name: column[number] for name, column in named.items()}
        known = {name: value for name, value in values.items() if value == value}
        annotations.append(Annotation(box, {"type": names[bool(positive[number])], **known}))
    keys = [f"{row}-{column}" for row, column in result.cell.tolist()]
    try:
        store = _new_store(path)
        try:
            store.append_many(annotations, keys)
            store.commit()
        finally:
            store.close()
    except sqlite3.Error as error:
        # It says of a full disk, too, only in its own words.
        raise OSError(errno.EIO, f"the database cannot be written: {error}") from error
    return []


def _new_store(path: Path) -> Any:
    """An empty database."""
    from tiatoolbox.annotation.storage import SQLiteStore

    class Store(SQLiteStore):  # type: ignore[misc]
        compile_options = staticmethod(read_options)

    return Store(path, auto_commit=False)


def read_options() -> list[str]:
    """How SQLite was built: tiatoolbox's own way to ask first allows extensions to be loaded, which it never does, and
    which many a Python cannot."""
    with closing(sqlite3.connect(":memory:")) as connection:
        return [option for (option,) in connection.execute("pragma compile_options")]
