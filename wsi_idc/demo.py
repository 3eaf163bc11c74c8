"""Three small slides made on the spot, and the main job run over them.

The texture is the H&E picture that tiatoolbox ships. The model is the one that ships here; no real slide looks like
these, so what it says of them shows how a map comes about, and nothing of how good it is.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc import USE
from wsi_idc.console import Console
from wsi_idc.errors import UsageError, WsiIdcError
from wsi_idc.manifest import Row
from wsi_idc.scan import write_manifest
from wsi_idc.settings import ExtractSettings, InferSettings
from wsi_idc.units import Level0Px, Mpp

MPP = Mpp(2.0)
"""um/px of the demo's slides."""
SIZE = (Level0Px(3200), Level0Px(2400))
"""Level-0 (width, height) in pixels: 6.4 x 4.8 mm."""
GLASS = (243, 242, 245)
_LOSSLESS = {"compression": "adobe_deflate", "predictor": True}


def run_demo(folder: Path, console: Console) -> None:
    """Make the slides, extract, infer, print the tables, draw a picture of each map.

    Raises:
        UsageError: the folder cannot be used.
        WsiIdcError: the demo did not go as it must.
    """
    from wsi_idc.export.pictures import draw_result
    from wsi_idc.extract import extract
    from wsi_idc.infer import infer
    from wsi_idc.model.bundle import SHIPPED, read_bundle
    from wsi_idc.results import Choice, look, require
    from wsi_idc.store import open_store

    try:
        folder.mkdir(parents=True, exist_ok=True)
        console.line(f"making three slides in {folder}")
        rows = make_slides(folder)
        write_manifest(folder / "manifest.csv", rows)
    except OSError as error:
        raise UsageError(folder, f"cannot be written ({error.strerror or error})", "name another folder") from error
    store = folder / "tiles.zarr"
    console.line("demo-broken is damaged on purpose: it must fail, and leave the others alone")
    with console.progress("extract") as listener:
        extracted = extract(rows, store, ExtractSettings(), listener=listener)
    console.summary("extract", extracted)
    bundle = read_bundle(SHIPPED)
    name = bundle.fields.name
    console.line(f"scoring with {name}. The slides are painted: their maps say nothing of how good the model is.")
    with console.progress("infer") as listener:
        inferred = infer(store, bundle, InferSettings(), listener=listener)
    console.summary("infer", inferred)
    whole = open_store(store)
    for slide_id in whole.slide_ids():
        picture = folder / f"{slide_id}.png"
        draw_result(require(look(whole, Choice(name), slide_id), name), picture)
        console.line(f"drew {picture}")
    failed = {name for name in whole.all_slide_ids() if whole.slide_node(name).record().failed}
    if failed != {"demo-broken"} or inferred.failures:
        raise WsiIdcError("demo", f"another outcome than expected, failed: {sorted(failed | set(inferred.failures))}")
    console.line(f"as expected: two slides done, demo-broken failed. {USE}")


def make_slides(folder: Path) -> list[Row]:
    """Write the three slides: one with an annotation, one with pen and dust, one broken. Returns their manifest."""
    rows = []
    for number, name in enumerate(("demo-annotated", "demo-pen", "demo-broken")):
        rng = np.random.default_rng(number)
        tumour, picture = _paint(rng, pen=name == "demo-pen")
        path = folder.absolute() / f"{name}.tif"
        _write_pyramid(path, picture)
        annotation = None
        if name == "demo-annotated":
            annotation = path.with_suffix(".geojson")
            annotation.write_text(json.dumps(_outline(tumour)), encoding="utf-8")
        elif name == "demo-broken":
            _damage(path)
        rows.append(Row(name, path, f"patient-{number + 1}", annotation=annotation))
    return rows


def make_slide(path: Path, mpp: Mpp) -> None:
    """Write one larger slide of the same kind, as scanners write theirs: JPEG, levels 1, 4 and 16.

    Args:
        path: the TIFF; any file there is replaced.
        mpp: of its finest level, in um/px; the pixels are the same whatever it says.
    """
    _, picture = _paint(np.random.default_rng(0), pen=False)
    options = {"compression": "jpeg", "compressionargs": {"level": 80}}
    _write_pyramid(path, np.tile(picture, (2, 2, 1)), mpp, (1, 4, 16), options)


def _smooth(rng: np.random.Generator, sigma: float) -> NDArray[np.float64]:
    """Smooth noise over the slide at one value per 16 px, falling off to the edges; shape (h / 16, w / 16)."""
    from scipy import ndimage

    shape = (SIZE[1] // 16, SIZE[0] // 16)
    noise = np.asarray(ndimage.gaussian_filter(rng.normal(size=shape), sigma), np.float64)
    y, x = (np.linspace(-1, 1, side) for side in shape)
    falloff: NDArray[np.float64] = 2.6 * np.maximum(np.abs(y[:, None]), np.abs(x[None, :])) ** 3
    smooth: NDArray[np.float64] = noise / noise.std() - falloff
    return smooth


def _enlarge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return mask.repeat(16, axis=0).repeat(16, axis=1)


def _paint(rng: np.random.Generator, *, pen: bool) -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
    """A slide's picture: glass, stroma, fat, tumour, and a pen mark. Returns the tumour at one value per 16 px."""
    from PIL import Image, ImageDraw

    source = Image.open(str(files("tiatoolbox") / "data" / "target_image.png")).convert("RGB").crop((0, 0, 960, 960))
    small = np.asarray(source.reduce(4))
    half = np.concatenate([small, small[:, ::-1]], axis=1)
    tile = np.concatenate([half, half[::-1]])
    repeats = (-(-SIZE[1] // tile.shape[0]), -(-SIZE[0] // tile.shape[1]), 1)
    texture = np.tile(tile, repeats)[: SIZE[1], : SIZE[0]]

    tissue = _smooth(rng, 14) > -0.9
    kind = _smooth(rng, 10)
    tumour = tissue & (kind > 0.35)
    fat = tissue & (kind < -1.2)
    picture = np.empty((SIZE[1], SIZE[0], 3), np.uint8)
    picture[:] = np.clip(np.asarray(GLASS) + rng.normal(0, 1.5, (SIZE[1], SIZE[0], 1)), 0, 255).astype(np.uint8)
    stroma = np.clip(0.2 * texture + 0.8 * np.array((228, 170, 198)), 0, 255).astype(np.uint8)
    for mask, pixels in ((tissue & ~fat, stroma), (tumour, texture)):
        inside = _enlarge(mask)
        picture[inside] = pixels[inside]
    _paint_fat(picture, _enlarge(fat))
    if pen:
        image = Image.fromarray(picture)
        draw = ImageDraw.Draw(image)
        draw.line([(120, 2200), (700, 2050), (1250, 2260), (1800, 2120)], fill=(28, 52, 160), width=44, joint="curve")
        for x, y in rng.integers(50, 2300, (40, 2)).tolist():
            draw.ellipse((x, y, x + 5, y + 5), fill=(120, 118, 116))
        picture = np.array(image)
    return tumour, picture


def _paint_fat(picture: NDArray[np.uint8], where: NDArray[np.bool_]) -> None:
    """Fat cells: thin pink walls of a honeycomb with cells of about 80 um, nearly white inside."""
    y, x = np.ogrid[: where.shape[0], : where.shape[1]]
    shift = (y // 36 % 2) * 20
    wall = ((x + shift) % 40 < 3) | (y % 36 < 3)
    picture[where & ~wall] = (238, 232, 238)
    picture[where & wall] = (214, 158, 188)


def _write_pyramid(
    path: Path,
    picture: NDArray[np.uint8],
    mpp: Mpp = MPP,
    downs: Sequence[int] = (1, 4),
    compression: Mapping[str, Any] = _LOSSLESS,
) -> None:
    """A tiled pyramidal BigTIFF with its um/px and levels."""
    import tifffile
    from PIL import Image

    with tifffile.TiffWriter(path, bigtiff=True) as out:
        for down in downs:
            level = np.asarray(Image.fromarray(picture).reduce(down))
            resolution = 1e4 / (mpp * down)
            out.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                subfiletype=int(down > 1),
                resolution=(resolution, resolution),
                resolutionunit="CENTIMETER",
                metadata=None,
                **compression,
            )


def _outline(tumour: NDArray[np.bool_]) -> dict[str, object]:
    """The tumour as QuPath exports it: GeoJSON of polygons in level-0 pixels, classified IDC."""
    from shapely import box, to_geojson, unary_union

    boxes = [box(x * 16, y * 16, x * 16 + 16, y * 16 + 16) for y, x in np.argwhere(tumour).tolist()]
    properties = {"objectType": "annotation", "classification": {"name": "IDC", "color": [200, 0, 0]}}
    geometry = json.loads(to_geojson(unary_union(boxes)))
    return {
        "type": "FeatureCollection",
        "features": [{"type": "Feature", "geometry": geometry, "properties": properties}],
    }


def _damage(path: Path) -> None:
    """Overwrite stored tiles in the middle of level 0, as a bad disk would."""
    import tifffile

    with tifffile.TiffFile(path) as tif:
        offsets = tif.pages[0].dataoffsets
        middle = offsets[len(offsets) // 2]
    with path.open("r+b") as stream:
        stream.seek(middle)
        stream.write(b"\xff" * 4096)
