"""Which part of each tile is IDC, by an annotation: QuPath GeoJSON, ASAP XML, or a mask picture.

Polygons are cut into pieces of few vertices, so that a tile is only ever compared with what lies near it, and what
meets in a tile is united there, so that overlapping ones never count twice. Coordinates are the slide's level-0 pixels.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from numpy.typing import NDArray

from wsi_idc import USE
from wsi_idc.errors import AnnotationError, system_advice
from wsi_idc.grid import Grid

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element
from wsi_idc.settings import EmptyAnnotation
from wsi_idc.sources import check_source
from wsi_idc.units import FILE_ORIGIN, Level0Px

GEOJSON = (".geojson", ".json", ".geojson.gz", ".json.gz")
ASAP = (".xml",)
PICTURES = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")

_MAX_BYTES = 2**30
_MAX_COORDINATE = 1e9
_PIECE_VERTICES = 128
_PIECES_AT_ONCE = 64
_CLASSES_SHOWN = 8
_GEOMETRIES_WITHOUT_AREA = ("Point", "MultiPoint", "LineString", "MultiLineString")


@dataclass(frozen=True)
class Region:
    """One annotated area of a file.

    Args:
        classes: the names of its class, and for ASAP of the groups above it; empty: unclassified.
        name: what the annotation itself is called; "" if nothing.
        polygons: valid shapely polygons, in level-0 pixels.
    """

    classes: tuple[str, ...]
    name: str
    polygons: list[Any]


def idc_fraction(
    annotation: Path,
    class_name: str,
    grid: Grid,
    cells: NDArray[np.integer],
    *,
    origin: tuple[Level0Px, Level0Px] = FILE_ORIGIN,
    empty: EmptyAnnotation = "unknown",
) -> tuple[NDArray[np.float32], list[str]]:
    """The part of each tile's area that the annotation says is IDC.

    Areas of another class are not IDC; where there are only such, somebody looked and found no IDC. In a file without
    any class, those named `class_name` are; if none is, all are. A file without any area may be one that nobody has
    filled in yet. In a mask picture every pixel says one or the other: see `tissue.mask_picture`.

    Args:
        annotation: GeoJSON, ASAP XML or a picture of the whole slide, told apart by the suffix.
        class_name: the class that is IDC, in any case.
        grid: the slide's grid.
        cells: int (n, 2) of row, column.
        origin: the slide's top-left in the file's own level-0 pixels (x, y); ASAP counts from the file's, QuPath from
            the slide's.
        empty: what the tiles of a file without any area are.

    Returns:
        float32 (n,), 0 to 1, NaN where unknown; and what a user should know of them, a line each.

    Raises:
        AnnotationError: the file cannot be read or used, or lies wholly outside the slide.
    """
    if _suffix(annotation) in PICTURES:
        from wsi_idc.tissue import mask_picture, tile_fraction

        mask = mask_picture(annotation, grid.size)
        warnings = [] if mask.any() else ["the annotation is all black: no tile is positive"]
        return tile_fraction(mask, grid, cells), warnings
    regions = read_regions(annotation)
    if not regions:
        value = np.nan if empty == "unknown" else 0.0
        told = f"the annotation marks no area: its tiles are taken to be {empty} (--empty-annotation)"
        return np.full(len(cells), value, np.float32), [told]
    if _suffix(annotation) in ASAP and any(origin):
        regions = [replace(region, polygons=_shifted(region.polygons, origin)) for region in regions]
    _check_place(annotation, regions, grid)
    chosen = _of_class(regions, class_name)
    polygons = [polygon for region in chosen for polygon in region.polygons]
    try:
        fraction = _covered(polygons, grid, cells)
    except shapely.errors.GEOSException as error:
        raise AnnotationError(annotation, f"its polygons cannot be used ({error})", "export it again") from error
    return fraction, [] if chosen else [_other_classes(regions, class_name)]


def _shifted(polygons: Sequence[Any], origin: tuple[int, int]) -> list[Any]:
    """The polygons as they lie from an origin."""
    return list(shapely.transform(np.array(polygons, dtype=object), lambda points: points - np.asarray(origin)))


def _other_classes(regions: Sequence[Region], class_name: str) -> str:
    """A line on the classes of an annotation that does not have the one asked for."""
    counts = Counter(region.classes[0] if region.classes else "unclassified" for region in regions)
    found = ", ".join(f"{name} {count}" for name, count in counts.most_common(_CLASSES_SHOWN))
    more = f" and {len(counts) - _CLASSES_SHOWN} more classes" if len(counts) > _CLASSES_SHOWN else ""
    return f"the annotation has no area of class {class_name!r}: no tile is positive; it has {found}{more}"


def classes(annotation: Path) -> dict[str, int]:
    """How many areas each class of the annotation has; empty for a picture, or where nothing is classified.

    Raises:
        AnnotationError: the file cannot be read.
    """
    if _suffix(annotation) in PICTURES:
        return {}
    return dict(Counter(region.classes[0] for region in read_regions(annotation) if region.classes))


def read_regions(annotation: Path) -> list[Region]:
    """The areas of a GeoJSON or ASAP XML file; points and lines are left out.

    Raises:
        AnnotationError: the file cannot be read, or its structure is not that of its format.
    """
    data = _read_bytes(annotation)
    reader = _asap_regions if _suffix(annotation) in ASAP else _geojson_regions
    try:
        return _repair(list(reader(data)))
    except _FormatError as error:
        raise AnnotationError(annotation, str(error), "export it again as QuPath GeoJSON or ASAP XML") from error
    except _OwnError as error:
        advice = "unlock in QuPath what you have corrected, delete the others, and export again"
        raise AnnotationError(annotation, str(error), advice) from error
    except RecursionError as error:
        raise AnnotationError(annotation, "is nested too deeply", "export it again") from error


class _FormatError(ValueError):
    """What is wrong with an annotation's content."""


class _OwnError(ValueError):
    """An annotation that no person made."""


def _suffix(annotation: Path) -> str:
    name = annotation.name.casefold()
    known = (*GEOJSON, *ASAP, *PICTURES)
    for suffix in known:
        if name.endswith(suffix):
            return suffix
    raise AnnotationError(annotation, f"suffix {annotation.suffix!r} is no annotation's", f"known: {' '.join(known)}")


def _read_bytes(annotation: Path) -> bytes:
    try:
        check_source(annotation)
        with gzip.open(annotation) if _suffix(annotation).endswith(".gz") else annotation.open("rb") as stream:
            data: bytes = stream.read(_MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        what = getattr(error, "strerror", None) or error
        advice = system_advice(error) if isinstance(error, OSError) else "check the file"
        raise AnnotationError(annotation, f"cannot be read ({what})", advice) from error
    if len(data) > _MAX_BYTES:
        raise AnnotationError(annotation, "is larger than 1 GiB", "simplify its polygons or give a mask picture")
    return data


def _of_class(regions: Sequence[Region], class_name: str) -> list[Region]:
    wanted = class_name.strip().casefold()
    if any(region.classes for region in regions):
        return [region for region in regions if wanted in (name.casefold() for name in region.classes)]
    return [region for region in regions if region.name.casefold() == wanted] or list(regions)


def _check_place(annotation: Path, regions: Sequence[Region], grid: Grid) -> None:
    polygons = [polygon for region in regions for polygon in region.polygons]
    if polygons and not shapely.intersects(shapely.box(0, 0, *grid.size), polygons).any():
        bounds = " ".join(f"{value:.0f}" for value in shapely.total_bounds(polygons))
        raise AnnotationError(
            annotation,
            f"lies wholly outside the slide ({bounds} px on {grid.size[0]} x {grid.size[1]} px)",
            "it may be another slide's, or in um: coordinates must be level-0 pixels",
        )


# --- area ---------------------------------------------------------------------------------------------------------


def _covered(polygons: Sequence[Any], grid: Grid, cells: NDArray[np.integer]) -> NDArray[np.float32]:
    """Part of each tile that lies in the union of valid polygons: float32 (n,)."""
    fraction = np.zeros(len(cells), dtype=np.float32)
    if not polygons or not len(cells):
        return fraction
    width, height = grid.extent
    start = grid.position(cells).astype(np.float64)
    tiles = shapely.box(start[:, 0], start[:, 1], start[:, 0] + width, start[:, 1] + height)
    near = np.array(polygons, dtype=object)
    near = near[shapely.intersects(near, shapely.box(*shapely.total_bounds(tiles)))]
    pieces = _cut(near, 4 * max(width, height))
    pieces = pieces[np.argsort(-shapely.area(pieces))]
    shapely.prepare(pieces)
    tree, whole = shapely.STRtree(tiles), np.zeros(len(tiles), dtype=bool)
    pairs = [np.empty((2, 0), dtype=np.intp)]
    for first in range(0, len(pieces), _PIECES_AT_ONCE):
        piece, tile = tree.query(pieces[first : first + _PIECES_AT_ONCE], predicate="intersects")
        whole[tile[shapely.covers(pieces[piece + first], tiles[tile])]] = True
        pairs.append(np.stack([piece + first, tile])[:, ~whole[tile]])
    piece, tile = np.concatenate(pairs, axis=1)
    piece, tile = piece[~whole[tile]], tile[~whole[tile]]
    fraction[whole] = 1.0
    order = np.argsort(tile, kind="stable")
    met, group = np.unique(tile[order], return_inverse=True)
    parts = shapely.intersection(tiles[tile[order]], pieces[piece[order]])
    together = shapely.geometrycollections(parts, indices=group)
    several = np.bincount(group) > 1
    together[several] = shapely.union_all(together[several, None], axis=1)
    fraction[met] = np.clip(shapely.area(together) / (width * height), 0.0, 1.0)
    return fraction


def _cut(polygons: NDArray[Any], smallest: float) -> NDArray[Any]:
    """The same area in pieces that have few vertices or are no larger than `smallest`."""
    done = []
    while len(polygons):
        bounds = shapely.bounds(polygons)
        sides = (bounds[:, 2:] - bounds[:, :2]).max(axis=1)
        small = (shapely.get_num_coordinates(polygons) <= _PIECE_VERTICES) | (sides <= smallest)
        done.append(polygons[small])
        halves = [half for polygon in polygons[~small] for half in _halves(polygon)]
        polygons = _areas(np.array(halves, dtype=object))[0]
    return np.concatenate(done) if done else polygons


def _halves(polygon: Any) -> Iterator[Any]:
    """A polygon cut across the middle of its longer side."""
    x0, y0, x1, y1 = polygon.bounds
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    wide = x1 - x0 > y1 - y0
    for box in ((x0, y0, x, y1), (x, y0, x1, y1)) if wide else ((x0, y0, x1, y), (x0, y, x1, y1)):
        half = shapely.clip_by_rect(polygon, *box)  # far quicker than an intersection, but not always valid
        yield half if half.is_valid else shapely.intersection(polygon, shapely.box(*box))


def _areas(geometries: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """The polygons of geometries, however nested, and from which geometry each is; lines and points are dropped."""
    parts, source = shapely.get_parts(geometries, return_index=True)
    parts, inner = shapely.get_parts(parts, return_index=True)
    kept = (shapely.get_type_id(parts) == shapely.GeometryType.POLYGON) & (shapely.area(parts) > 0)
    return parts[kept], source[inner][kept]


def _repair(regions: Sequence[Region]) -> list[Region]:
    """The same regions with valid polygons, in one pass over them all; those without area are dropped."""
    polygons = np.array([polygon for region in regions for polygon in region.polygons], dtype=object)
    owner = np.repeat(np.arange(len(regions)), [len(region.polygons) for region in regions])
    invalid = ~shapely.is_valid(polygons)
    polygons[invalid] = shapely.make_valid(polygons[invalid], method="structure", keep_collapsed=False)
    polygons, source = _areas(polygons)
    groups: dict[int, list[Any]] = {}
    for index, polygon in zip(owner[source].tolist(), polygons, strict=True):
        groups.setdefault(index, []).append(polygon)
    return [replace(regions[index], polygons=group) for index, group in groups.items()]


def _polygons(shell: Any, holes: Iterable[Any] = ()) -> list[Any]:
    """The polygon of a ring and its holes, valid or not; a ring of fewer than three points has no area."""
    outer, inner = _ring(shell), [ring for ring in map(_ring, holes) if ring is not None]
    return [] if outer is None else [shapely.Polygon(outer, inner)]


def _ring(points: Any) -> NDArray[np.float64] | None:
    if not isinstance(points, list):
        raise _FormatError("a ring of coordinates is not a list")
    if len(points) < 3:
        return None
    try:
        ring = np.asarray(points)
    except ValueError:
        ring = np.empty(0, dtype=object)
    if ring.dtype.kind not in "iuf" or ring.ndim != 2 or ring.shape[1] < 2 or not np.isfinite(ring).all():
        odd = next((point for point in points if not _is_point(point)), points[0])
        raise _FormatError(f"coordinates that are not numbers: {json.dumps(odd)[:60]}")
    if np.abs(ring[:, :2]).max() > _MAX_COORDINATE:
        raise _FormatError("coordinates that no slide has: more than 1e9 pixels")
    return ring[:, :2].astype(np.float64)


def _is_point(point: Any) -> bool:
    numbers = isinstance(point, list) and len(point) >= 2
    return numbers and all(type(value) in (int, float) and np.isfinite(value) for value in point)


# --- QuPath GeoJSON -----------------------------------------------------------------------------------------------


_DETECTED = ("detection", "tile", "cell")
"""QuPath's objects that a program found: were they taken for a person's, a model would be judged by its own answers."""


def _geojson_regions(data: bytes) -> Iterator[Region]:
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _FormatError(f"is not JSON in UTF-8 ({error.reason} at byte {error.start})") from error
    except ValueError as error:
        raise _FormatError(f"is not JSON ({error})") from error
    if isinstance(content, dict) and content.get("type") == "FeatureCollection":
        content = content.get("features")
        if not isinstance(content, list):
            raise _FormatError("is a FeatureCollection without a list 'features'")
    for item in content if isinstance(content, list) else [content]:
        if not isinstance(item, dict) or not isinstance(item.get("type"), str):
            raise _FormatError("is not GeoJSON: something in it has no 'type'")
        feature = item if item["type"] == "Feature" else {"geometry": item}
        polygons = list(_geometry_polygons(feature.get("geometry")))
        if polygons:
            properties = feature.get("properties")
            properties = properties if isinstance(properties, dict) else {}
            if properties.get("objectType") in _DETECTED:
                continue
            about = properties.get("metadata")
            if properties.get("isLocked") is True and isinstance(about, dict) and about.get("use") == USE:
                raise _OwnError("has regions as wsi-idc exported them: a model would be judged by its own answers")
            name = properties.get("name")
            yield Region(_qupath_class(properties), name.strip() if isinstance(name, str) else "", polygons)


def _qupath_class(properties: dict[str, Any]) -> tuple[str, ...]:
    """QuPath's class: {"name": ...}, {"names": [...]} for a derived one, or in old files the name alone."""
    value = properties.get("classification")
    if isinstance(value, dict):
        names = value.get("names")
        value = value.get("name") or (": ".join(map(str, names)) if isinstance(names, list) else None)
    return (value.strip(),) if isinstance(value, str) and value.strip() else ()


def _geometry_polygons(geometry: Any) -> Iterator[Any]:
    if geometry is None:
        return
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind in _GEOMETRIES_WITHOUT_AREA:
        return
    if kind not in ("Polygon", "MultiPolygon", "GeometryCollection"):
        raise _FormatError(f"is not GeoJSON: a geometry is of type {kind!r}")
    content = geometry.get("geometries" if kind == "GeometryCollection" else "coordinates")
    if not isinstance(content, list):
        raise _FormatError(f"is not GeoJSON: a {kind} without its list of coordinates")
    if kind == "GeometryCollection":
        for part in content:
            yield from _geometry_polygons(part)
        return
    for rings in [content] if kind == "Polygon" else content:
        if not isinstance(rings, list):
            raise _FormatError(f"is not GeoJSON: a {kind} without its list of rings")
        if rings:
            yield from _polygons(rings[0], rings[1:])


# --- ASAP XML -----------------------------------------------------------------------------------------------------


def _asap_regions(data: bytes) -> Iterator[Region]:
    from defusedxml import DefusedXmlException, DTDForbidden
    from defusedxml.ElementTree import ParseError, fromstring

    try:
        # Through a document type a small file could grow without bound, or read others.
        root = fromstring(data, forbid_dtd=True)
    except DTDForbidden as error:
        raise _FormatError("has a DOCTYPE, which no annotation needs") from error
    except (ParseError, DefusedXmlException, LookupError, UnicodeError, ValueError) as error:
        raise _FormatError(f"is not XML ({error})") from error
    if root.tag != "ASAP_Annotations":
        raise _FormatError(f"is not ASAP XML: its root is {root.tag!r}")
    parents = {group.get("Name", ""): group.get("PartOfGroup", "") for group in root.iter("Group")}
    for annotation in root.iter("Annotation"):
        if annotation.get("Type") not in ("Polygon", "Spline", "Rectangle"):
            continue
        points = sorted(map(_asap_point, annotation.iter("Coordinate")))
        polygons = _polygons([[x, y] for _, x, y in points])
        if polygons:
            groups = _asap_groups(annotation.get("PartOfGroup", ""), parents)
            yield Region(groups, annotation.get("Name", "").strip(), polygons)


def _asap_groups(group: str, parents: dict[str, str]) -> tuple[str, ...]:
    """A group and those above it."""
    groups: list[str] = []
    while group.strip() not in ("", "None") and group not in groups:
        groups.append(group)
        group = parents.get(group, "")
    return tuple(name.strip() for name in groups)


def _asap_point(coordinate: "Element") -> tuple[float, float, float]:
    values = [coordinate.get(name, "") for name in ("Order", "X", "Y")]
    try:
        # Some locales write a decimal comma.
        order, x, y = (float(value.replace(",", ".")) for value in values)
    except ValueError as error:
        raise _FormatError(f"coordinates that are not numbers: {' '.join(values)[:60]!r}") from error
    return order, x, y
