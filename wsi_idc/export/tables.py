"""Tables of results: a row a tile, and a row a slide; as CSV, and as Parquet of the same columns."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc import USE
from wsi_idc.csvs import csv_text, safe_cell
from wsi_idc.files import whole_file, write_whole
from wsi_idc.results import Absent, Result

SLIDE_TABLES = ("csv", "parquet")
STRONGEST = 5
"""Regions that a slide's row names."""


def tile_columns(result: Result) -> dict[str, NDArray[Any]]:
    """A column a name, (n,) each, in the slide's order; WSInfer's come first.

    minx, miny, width, height are level-0 pixels of the file, as OpenSlide counts them; x, y count from the slide's
    origin, which differs where a file has bounds (MRXS).
    """
    slide = result.slide
    position = slide.position
    origin, (width, height) = result.origin, slide.grid.extent
    count = len(position)
    alone = result.alone
    return {
        "minx": position[:, 0].astype(np.int64) + origin[0],
        "miny": position[:, 1].astype(np.int64) + origin[1],
        "width": np.full(count, round(width), np.int64),
        "height": np.full(count, round(height), np.int64),
        f"prob_{result.positive}": result.probability,
        **({} if alone is None else {f"prob_{result.positive}_alone": alone}),
        "positive": result.called,
        "row": result.cell[:, 0],
        "column": result.cell[:, 1],
        "x": position[:, 0],
        "y": position[:, 1],
        "tissue": result.tissue,
        "label": slide.idc,
        "blur": result.blur,
        "pen": result.pen,
    }


def slide_row(result: Result) -> dict[str, Any]:
    """A slide in a row, as plain values: areas in mm2, regions in level-0 pixels from the slide's origin."""
    row = {
        **_about(result.slide.slide_id, result.model, "current", "", result.slide.attributes),
        "threshold": result.threshold,
        "committed": result.map.attributes.get("committed"),
        **asdict(result.measures),
    }
    regions = result.regions[:STRONGEST]
    for number in range(1, STRONGEST + 1):
        region = regions[number - 1] if number <= len(regions) else None
        x, y, width, height = region.bounds if region else (None,) * 4
        row |= {f"region{number}_{name}": value for name, value in zip(_BOUNDS, (x, y, width, height), strict=True)}
        row[f"region{number}_mm2"] = region.area_mm2 if region else None
        row[f"region{number}_mean"] = region.mean if region else None
    return row


_BOUNDS = ("x", "y", "width", "height")


def absent_row(absent: Absent, model: str) -> dict[str, Any]:
    """The row of a slide that has no result: what it is, and why."""
    attributes = absent.slide.attributes if absent.slide else {}
    return _about(absent.slide_id, model, absent.kind, absent.why, attributes)


def _about(slide_id: str, model: str, state: str, why: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: str(attributes.get(name) or "") for name in ("patient_id", "split", "label")}
    return {"slide_id": slide_id, **known, "model": model, "state": state, "why": why}


def write_slides(kind: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the table of slides.

    Raises:
        OSError: it cannot be written.
    """
    names = list(dict.fromkeys(name for row in rows for name in row)) if rows else list(_about("", "", "", "", {}))
    if kind == "csv":
        write_whole(path, csv_text(rows, names).encode())
        return
    import pyarrow as pa

    columns = {name: [row.get(name) for row in rows] for name in names}
    with whole_file(path) as stream:
        write_parquet(pa.table(columns), stream)


def write_tiles_csv(result: Result, path: Path) -> None:
    """Write a row a tile as CSV.

    Raises:
        OSError: it cannot be written.
    """
    columns = tile_columns(result)
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerow([safe_cell(name) for name in columns])
        # Numbers need no quotes: joined, they take half the time of a writer.
        stream.writelines(f"{','.join(row)}\n" for row in zip(*map(_texts, columns.values()), strict=True))


def _texts(values: NDArray[Any]) -> list[str]:
    """A column's numbers; float32 by its own shortest digits (0.1, not 0.10000000149011612), NaN as nothing."""
    if values.dtype == np.float32:
        return ["" if text == "nan" else text for text in map(str, values)]
    return list(map(str, values.astype(np.int64).tolist()))


def write_parquet(table: Any, stream: Any) -> None:
    """Write a table, with what it may be used for in its metadata."""
    from pyarrow import parquet

    parquet.write_table(table.replace_schema_metadata({"use": USE}), stream, compression="zstd")
