"""A slide's tiles and regions as QuPath reads them: a GeoJSON FeatureCollection, written feature by feature.

First the regions above the threshold, each an annotation, strongest first; then every tile. All have level-0 pixels
from the slide's origin, as QuPath counts them where a file has bounds (MRXS).

What QuPath asks for (`qupath.lib.io`: PathIO, QuPathTypeAdapters, GsonTools; PathClass): rings are closed; an object's
`id` is a UUID, any other is passed over; a `classification` with a name has a `color`, or reading throws; class names
are not blank and have no line breaks, and a colon in one makes two classes of it; `measurements` as an object of name
and number is read from version 0.4 on, and a NaN in it throws. Unknown members of the collection are passed over.
"""

import gzip
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from wsi_idc import USE
from wsi_idc.console import printable
from wsi_idc.results import Result

SUFFIX = ".geojson"
VERSION = 1

LARGE = 20_000
"""Tiles from which the file is compressed, as `.geojson.gz`: some 8 MB."""
POSITIVE_COLOUR = (213, 94, 0)
OTHER_COLOURS = ((86, 180, 233), (0, 158, 115), (204, 121, 167), (240, 228, 66), (0, 114, 178))
"""Colours of the classes, Okabe and Ito's (Color Universal Design, 2008)."""
_IDS = uuid.UUID("6b1f3c0e-8f5a-5d53-9a53-2f0d7f3e7c11")
_AT_ONCE = 1024
"""Tiles that are held as Python's objects."""


def suffix(result: Result) -> str:
    """See `SeveralSuffixes.suffix`. QuPath opens both, from version 0.4 on."""
    return f"{SUFFIX}.gz" if result.slide.count >= LARGE else SUFFIX


def write(result: Result, path: Path) -> list[str]:
    """See `Format.write`."""
    with ExitStack() as stack:
        stream: Any = stack.enter_context(path.open("wb"))
        if suffix(result) != SUFFIX:
            # Without a name or a time in it, so that the same result gives the same bytes.
            stream = stack.enter_context(gzip.GzipFile("", "wb", 6, stream, mtime=0))
        for piece in pieces(result):
            stream.write(piece.encode("ascii"))
    return []


def pieces(result: Result) -> Iterator[str]:
    """The file's text, a feature at a time."""
    about = {
        "use": USE,
        "slide_id": result.slide_id,
        "model": result.model,
        "threshold": result.threshold,
        "origin": list(result.origin),
    }
    yield f'{{"type": "FeatureCollection", "wsi_idc": {_json(about)}, "features": ['
    comma = "\n"
    for features in (_regions(result), _tiles(result)):
        for feature in features:
            yield comma + _json(feature)
            comma = ",\n"
    yield "\n]}\n"


def _json(value: Any) -> str:
    """JSON in ASCII: what a terminal, a page or a reader of another encoding would misread stands as an escape."""
    return json.dumps(value, allow_nan=False)


def class_name(text: str) -> str:
    """A class's name that QuPath takes as one: in a line, without the colon that makes two of it."""
    return " ".join(printable(text).replace(":", " - ").split())


def _regions(result: Result) -> Iterator[dict[str, Any]]:
    import shapely

    name = class_name(result.positive)
    colour = _colours(result)[result.positive]
    about = {"model": result.model, "threshold": f"{result.threshold:.6g}", "use": USE}
    cells = result.cell
    for number, region in enumerate(result.regions, start=1):
        yield {
            "type": "Feature",
            "id": _id(result, "region", result.threshold, *cells[region.tiles[0]].tolist()),
            "geometry": json.loads(shapely.to_geojson(result.outline(region.tiles))),
            "properties": {
                "objectType": "annotation",
                "name": f"{name} {number}",
                "classification": {"name": name, "color": colour},
                "isLocked": True,
                "measurements": {
                    f"Mean P({name})": round(region.mean, 6),
                    f"Highest P({name})": round(region.highest, 6),
                    "Area mm^2": round(region.area_mm2, 9),
                    "Tissue mm^2": round(region.tissue_mm2, 9),
                    "Tiles": len(region.tiles),
                },
                "metadata": about,
            },
        }


def _tiles(result: Result) -> Iterator[dict[str, Any]]:
    colours = _colours(result)
    classes = {name: {"name": class_name(name), "color": colour} for name, colour in colours.items()}
    names, columns = _called_classes(result), _measurements(result)
    cells = result.cell
    for start in range(0, len(cells), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        squares = result.squares(np.arange(start, min(start + _AT_ONCE, len(cells)))).tolist()
        values = {name: column[some] for name, column in columns.items()}
        for number, ((row, column), (x0, y0, x1, y1)) in enumerate(zip(cells[some].tolist(), squares, strict=True)):
            yield {
                "type": "Feature",
                "id": _id(result, "tile", row, column),
                "geometry": {"type": "Polygon", "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]]},
                "properties": {
                    "objectType": "tile",
                    "classification": classes[names[start + number]],
                    "isLocked": True,
                    # By float32's own shortest digits; what is not known is left out.
                    "measurements": {
                        name: float(str(value[number]))
                        for name, value in values.items()
                        if value[number] == value[number]
                    },
                },
            }


def _id(result: Result, *parts: Any) -> str:
    """The same for the same thing in every export, and another for every other thing."""
    return str(uuid.uuid5(_IDS, json.dumps([result.slide_id, result.model, *parts])))


def _colours(result: Result) -> dict[str, list[int]]:
    """class -> red, green, blue."""
    others = [name for name in result.classes if name != result.positive]
    colours = {name: list(OTHER_COLOURS[place % len(OTHER_COLOURS)]) for place, name in enumerate(others)}
    return {result.positive: list(POSITIVE_COLOUR), **colours}


def _called_classes(result: Result) -> list[str]:
    """The class of each tile: the positive one from the threshold on, below it the most probable of the others."""
    others = [place for place, name in enumerate(result.classes) if name != result.positive]
    best = np.full(result.slide.count, others[0])
    if len(others) > 1:
        best = np.asarray(others)[result.each_class[:, others].argmax(axis=1)]
    places = np.where(result.called, result.classes.index(result.positive), best)
    return [result.classes[place] for place in places.tolist()]


def _measurements(result: Result) -> Mapping[str, Any]:
    """name -> float32 (n,)."""
    name = class_name(result.positive)
    columns = {f"P({name})": result.probability}
    if result.alone is not None:
        columns[f"P({name}) alone"] = result.alone
    if len(result.classes) > 2:
        for place, other in enumerate(result.classes):
            columns.setdefault(f"P({class_name(other)})", result.each_class[:, place])
    return {**columns, "Tissue": result.tissue, "Annotated": result.slide.idc}
