"""What the page says of one slide: plain facts and names of pictures, so that one slide's arrays are held at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import StoreDamageError
from wsi_idc.flags import Flag, flags
from wsi_idc.report.pictures import (
    PICTURE_PX,
    THUMB_PX,
    TILE_PX,
    Pictures,
    jpeg,
    map_png,
    smaller,
    thumb_with_map,
)
from wsi_idc.results import Absent, Measures, Region, Result
from wsi_idc.store import Store, StoredSlide
from wsi_idc.store.slide import tiles_per_shard

State = Literal["done", "empty", "stale", "failed", "not scored"]
STRONGEST_REGIONS = 5
BINS = 20
"""Of a map's histogram."""
OPACITY = 0.55
"""Of the map over the slide, at first."""


@dataclass(frozen=True)
class Picture:
    """A slide's picture and its map over it; lengths in mm.

    Attributes:
        name: the slide's picture.
        size: the slide's width and height.
        map_name: its map's; empty where there is none.
        map_size: what the map covers, from the same top left corner; it may reach over the slide's edge.
    """

    name: str
    size: tuple[float, float]
    map_name: str = ""
    map_size: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Tile:
    """One of the strongest tiles.

    Attributes:
        name: its picture.
        probability: P(positive).
        at: its centre from the slide's top left corner, in mm (x, y).
    """

    name: str
    probability: float
    at: tuple[float, float]


@dataclass(frozen=True)
class Entry:
    """One slide.

    Attributes:
        slide_id: the slide.
        state: where it is filed.
        why: the reason, where it is not done.
        words: the state more closely; "no map" and "not extracted" are filed alike.
        known: the manifest's words by name: patient, split, label, path.
        flags: what a person should look at.
        warnings: what extraction warned of.
        thumb, overlay: the table's pictures, without and with the map; empty where there are none.
        picture: the detail's.
        measures: the slide in numbers.
        threshold: from which a tile is positive; of the same slides.
        histogram: tiles in each of `BINS` equal bins of probability.
        tiles: the strongest.
        no_tiles: why there are none.
        regions: the strongest, with bounds in mm (x, y, width, height).
        about: further facts, by name.
        made: what the slide's tiles and its map were made from and with, by name; the page counts them.
        labelled: whether any of its tiles has a label.
    """

    slide_id: str
    state: State
    why: str = ""
    words: str = ""
    known: Mapping[str, str] = field(default_factory=dict)
    flags: Sequence[Flag] = ()
    warnings: Sequence[str] = ()
    thumb: str = ""
    overlay: str = ""
    picture: Picture | None = None
    measures: Measures | None = None
    threshold: float | None = None
    histogram: Sequence[int] = ()
    tiles: Sequence[Tile] = ()
    no_tiles: str = ""
    regions: Sequence[tuple[Region, tuple[float, float, float, float]]] = ()
    about: Sequence[tuple[str, str]] = ()
    made: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    labelled: bool = False

    @property
    def suspicious(self) -> bool:
        """Whether a flag speaks against the slide or its map."""
        return any(flag.suspicious for flag in self.flags)

    @property
    def kinds(self) -> list[str]:
        """The filters that show it."""
        return [self.state, *(["suspicious"] if self.suspicious else [])]


def entry(store: Store, found: Result | Absent, pictures: Pictures) -> Entry:
    """What the page says of a slide; what the store holds damaged of it is said instead.

    Raises:
        UsageError: pictures cannot be written.
        StoreBusyError: another run writes pictures of the same page.
    """
    if isinstance(found, Result):
        try:
            return _of_result(found, pictures)
        except StoreDamageError as error:
            found = Absent(found.slide_id, "damaged", f"{error.subject}: {error.problem}", found.slide)
    return _of_absent(store, found, pictures)


def _of_result(result: Result, pictures: Pictures) -> Entry:
    slide = result.slide
    plain, thumb = _of_slide(slide, pictures)
    probability = result.probability
    attributes = result.map.attributes
    made = {
        **plain.made,
        "map": {name: value for name, value in (result.map.record.made_from or {}).items() if name != "tiles"},
        "map versions": (result.map.record.complete or {}).get("versions") or {},
    }
    facts = replace(
        plain,
        flags=flags(slide, result.map),
        measures=result.measures,
        threshold=result.threshold,
        made=made,
        about=[*plain.about, ("map made", str(attributes.get("committed") or "?"))],
    )
    if not len(probability):
        return replace(facts, state="empty", words="empty", why=_why_empty(slide))
    grid, pitch = slide.grid, slide.spec.stride_px * slide.spec.mpp / 1000
    picture = facts.picture
    if picture is not None and thumb is not None:
        covers = (grid.shape[1] * pitch, grid.shape[0] * pitch)
        picture = replace(picture, map_name=pictures.add(map_png(result), "png"), map_size=covers)
        facts = replace(facts, picture=picture, overlay=pictures.add(thumb_with_map(thumb, result, OPACITY), "jpeg"))
    tiles = _strongest(result, pictures)
    return replace(
        facts,
        histogram=np.histogram(probability, BINS, (0, 1))[0].tolist(),
        tiles=tiles,
        no_tiles=""
        if tiles
        else "The store holds no pixels of this slide, and its map was made by a version that kept none.",
        regions=[(region, _mm(region.bounds, slide)) for region in result.regions[:STRONGEST_REGIONS]],
    )


def _of_absent(store: Store, absent: Absent, pictures: Pictures) -> Entry:
    state: State = "not scored"
    if absent.kind in ("failed", "damaged"):
        state = "failed"
    elif absent.kind == "stale":
        state = "stale"
    elif absent.slide is None and absent.why:
        state = "failed"
    words = "failed" if state == "failed" and absent.kind == "not extracted" else absent.kind
    if absent.slide is None:
        record = store.slide_node(absent.slide_id).record()
        return Entry(absent.slide_id, state, absent.why, words, _known(record.attributes))
    try:
        plain, _ = _of_slide(absent.slide, pictures)
    except StoreDamageError as error:
        return Entry(absent.slide_id, "failed", f"{error.subject}: {error.problem}", "damaged")
    if not absent.slide.count and absent.kind == "no map":
        return replace(plain, state="empty", words="empty", why=_why_empty(absent.slide))
    return replace(plain, state=state, words=words, why=absent.why)


def _of_slide(slide: StoredSlide, pictures: Pictures) -> tuple[Entry, NDArray[np.uint8] | None]:
    """What its tiles say, whatever became of its map; and its small picture, uint8 (h, w, 3), where it has one."""
    attributes = slide.attributes
    thumbnail = slide.thumbnail
    width, height = (side * mpp / 1000 for side, mpp in zip(slide.grid.size, slide.mpp, strict=True))
    thumb, picture, small = "", None, None
    if thumbnail.size:
        large = smaller(thumbnail, PICTURE_PX)
        small = smaller(large, THUMB_PX)
        thumb = pictures.add(jpeg(small), "jpeg")
        picture = Picture(pictures.add(jpeg(large), "jpeg"), (width, height))
    made_from = {name: value for name, value in slide.made_from.items() if name not in _OF_ONE_SLIDE}
    x, y = slide.mpp
    entry = Entry(
        slide.slide_id,
        "done",
        words="done",
        known=_known(attributes),
        flags=flags(slide),
        warnings=[str(line) for line in attributes.get("warnings") or []],
        thumb=thumb,
        picture=picture,
        about=[
            ("size", f"{slide.grid.size[0]:,} x {slide.grid.size[1]:,} px, {width:.1f} x {height:.1f} mm"),
            ("um/px", f"{x:.4g}" if x == y else f"{x:.4g} x {y:.4g}"),
            ("format", f"{attributes.get('format', '?')}, read by {attributes.get('reader', '?')}"),
            ("tiles cut", str(attributes.get("committed") or "?")),
        ],
        made={"tiles": made_from, "tile versions": attributes["complete"].get("versions") or {}},
        labelled=bool(slide.count and np.isfinite(slide.idc).any()),
    )
    return entry, small


_OF_ONE_SLIDE = ("source", "annotation", "mask", "slide um/px")
"""What tiles are made from that differs from slide to slide, as it should."""


def _known(attributes: Mapping[str, Any]) -> dict[str, str]:
    names = {"patient": "patient_id", "split": "split", "label": "label", "path": "path"}
    return {word: str(attributes[name]) for word, name in names.items() if attributes.get(name)}


def _why_empty(slide: StoredSlide) -> str:
    return next((flag.reason for flag in flags(slide) if flag.kind == "no tissue"), "no tissue found")


def _mm(bounds: tuple[int, int, int, int], slide: StoredSlide) -> tuple[float, float, float, float]:
    """Level-0 x, y, width, height as mm."""
    per = [mpp / 1000 for mpp in slide.mpp]
    x, y, width, height = bounds
    return x * per[0], y * per[1], width * per[0], height * per[1]


def _strongest(result: Result, pictures: Pictures) -> list[Tile]:
    """The most probable tiles with their pictures, from no more of the store's shards than hold them."""
    slide, probability, chosen = result.slide, result.probability, np.array(result.strongest)
    pixels = result.strongest_pixels
    if pixels is None:
        if not slide.has_pixels:
            return []
        found = tile_pixels(slide, chosen)
        pixels = np.stack([found[place] for place in chosen.tolist()])
    return [
        Tile(
            pictures.add(jpeg(smaller(picture, TILE_PX), 90, subsampling=0), "jpeg"),
            float(probability[tile]),
            ((x0 + x1) / 2 * slide.mpp[0] / 1000, (y0 + y1) / 2 * slide.mpp[1] / 1000),
        )
        for picture, tile, (x0, y0, x1, y1) in zip(pixels, chosen, result.squares(chosen).tolist(), strict=True)
    ]


def tile_pixels(slide: StoredSlide, tiles: NDArray[np.integer]) -> dict[int, NDArray[np.uint8]]:
    """Some tiles' pixels, uint8 (size, size, 3) each, checked; shards without any of them are not read.

    Args:
        slide: whose pixels the store holds.
        tiles: int (k,), their places in the slide's order.

    Raises:
        StoreDamageError: a shard is not what was written.
    """
    shard = tiles_per_shard(slide.spec.size_px)
    found: dict[int, NDArray[np.uint8]] = {}
    for number in np.unique(tiles // shard).tolist():
        start = number * shard
        inside = sorted(tiles[tiles // shard == number].tolist())
        for some in slide.read_tiles(start, min(start + shard, slide.count)):
            found |= {place: some[place - start].copy() for place in inside if start <= place < start + len(some)}
            start += len(some)
    return found
