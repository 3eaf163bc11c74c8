"""The page of one slide: its pictures, the map over them, and what moves both; made of Bokeh's parts.

Coordinates are um from the slide's top left: x to the right, y downwards as negative numbers, as Bokeh's grow
upwards.
"""

from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc import USE
from wsi_idc.colours import stops
from wsi_idc.results import Region, Result
from wsi_idc.view.pixels import TILE, Pixels

MOST_REGIONS = 200
"""Regions that are listed and outlined: the strongest."""
_WHOLE = "Whole slide"

_TEMPLATE = """{% from macros import embed %}<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
html, body { height: 100%; margin: 0; }
main { display: flex; height: 100%; font-family: sans-serif; }
#beside { flex: 0 0 20rem; padding: .5rem; overflow: auto; box-sizing: border-box; }
#slide { flex: 1 1 0; min-width: 0; display: flex; }
@media (max-width: 700px) {
  main { flex-direction: column; height: auto; }
  #slide { flex: 0 0 80vh; order: -1; }
}
</style>
{{ bokeh_js | safe }}
</head>
<body>
<main>
<div id="beside">{{ embed(roots.beside) | safe }}</div>
<div id="slide">{{ embed(roots.plot) | safe }}</div>
</main>
{{ plot_script | safe }}
</body>
</html>
"""
_POINTER = """
const x = cb_obj.x, y = -cb_obj.y;
const column = Math.floor(x / pitch_x), row = Math.floor(y / pitch_y);
let text = "";
if (column >= 0 && column < columns && row >= 0 && row < rows) {
    const p = known.data.image[0][(rows - 1 - row) * columns + column];
    text = (isNaN(p) ? "no tissue" : what + " " + p.toFixed(3)) + ", row " + row + ", column " + column;
}
pointer.text = text;
"""
_MASK = """
const all = known.data.image[0], least = only.active ? threshold.value : 0;
const shown = new all.constructor(all, all.shape);
shown.forEach((p, at) => { if (!(p >= least)) shown[at] = NaN; });
map.data = {...map.data, image: [shown]};
let count = 0, tiles = 0;
for (const p of all) { if (!isNaN(p)) { tiles += 1; if (p >= threshold.value) count += 1; } }
called.text = count.toLocaleString("en") + " of " + tiles.toLocaleString("en") + " tiles at or above "
    + threshold.value.toFixed(3);
"""
_ASK = """
fetch("regions?threshold=" + threshold.value).then((answer) => answer.json()).then((found) => {
    regions.selected.indices = [];
    regions.data = found.regions;
    outlines.data = found.outlines;
});
"""
_JUMP = """
const [chosen] = cb_obj.indices;
if (chosen === undefined) return;
const d = regions.data, side = Math.max(d.width[chosen], d.height[chosen], 10 * pitch_x) * 1.5;
const x = d.left[chosen] + d.width[chosen] / 2, y = -(d.top[chosen] + d.height[chosen] / 2);
const across = side * Math.max(1, figure.inner_width / Math.max(1, figure.inner_height));
const down = across * figure.inner_height / Math.max(1, figure.inner_width);
figure.x_range.setv({start: x - across / 2, end: x + across / 2});
figure.y_range.setv({start: y - down / 2, end: y + down / 2});
"""
_RESET = "regions.selected.indices = []; figure.reset.emit();"


def found_regions(result: Result) -> dict[str, Any]:
    """The strongest regions and their outlines, as the page's sources take them; lengths in um."""
    regions = result.regions[:MOST_REGIONS]
    mpp = np.asarray(result.slide.mpp)
    bounds = np.array([region.bounds for region in regions], np.float64).reshape(-1, 4) * np.tile(mpp, 2)
    outlines = [_outline(result, region, mpp) for region in regions]
    return {
        "regions": {
            "number": list(range(1, len(regions) + 1)),
            "mean": [round(region.mean, 3) for region in regions],
            "mm2": [round(region.area_mm2, 3) for region in regions],
            **{name: bounds[:, at].tolist() for at, name in enumerate(("left", "top", "width", "height"))},
        },
        "outlines": {"xs": [xs for xs, _ in outlines], "ys": [ys for _, ys in outlines]},
    }


def _outline(result: Result, region: Region, mpp: NDArray[np.float64]) -> tuple[list[Any], list[Any]]:
    """Polygons with holes as Bokeh has them: xs and ys of [[outer, hole, ...], ...]."""
    import shapely

    xs, ys = [], []
    for polygon in shapely.get_parts(result.outline(region.tiles)).tolist():
        rings = [shapely.get_coordinates(ring) * mpp for ring in (polygon.exterior, *polygon.interiors)]
        xs.append([ring[:, 0].tolist() for ring in rings])
        ys.append([(-ring[:, 1]).tolist() for ring in rings])
    return xs, ys


def page(result: Result, pixels: Pixels) -> str:
    """The page, with all of Bokeh's script in it."""
    from bokeh.embed import file_html
    from bokeh.layouts import column
    from bokeh.models import (
        Button,
        ColorBar,
        ColumnDataSource,
        CustomJS,
        DataTable,
        Div,
        LinearColorMapper,
        MetricLength,
        NumberFormatter,
        Range1d,
        ScaleBar,
        Slider,
        TableColumn,
        Toggle,
        WMTSTileSource,
    )
    from bokeh.plotting import figure
    from bokeh.resources import INLINE
    from jinja2 import Template

    slide = result.slide
    (across, down), (mpp_x, mpp_y) = slide.grid.size, slide.mpp
    width, height = across * mpp_x, down * mpp_y
    image = result.image
    rows, columns = image.shape
    pitch = slide.spec.stride_px * slide.spec.mpp

    # Without a range that keeps its shape, a pixel would not be square.
    margin = 0.02 * max(width, height)
    plot = figure(
        x_range=Range1d(-margin, width + margin),
        y_range=Range1d(-height - margin, margin),
        match_aspect=True,
        tools="pan,wheel_zoom,box_zoom,reset,save",
        active_scroll="wheel_zoom",
        sizing_mode="stretch_both",
        min_height=480,
        toolbar_location="right",
        name="plot",
    )
    plot.axis.visible = False
    plot.grid.visible = False
    plot.background_fill_color = "white"
    if rows and columns and max(pixels.size):
        square = TILE * pixels.mpp[0] * 2**pixels.zooms
        plot.add_tile(
            WMTSTileSource(
                url="pictures/{Z}/{X}/{Y}.jpg",
                tile_size=TILE,
                initial_resolution=pixels.mpp[0] * 2**pixels.zooms,
                x_origin_offset=0,
                y_origin_offset=square,
                min_zoom=0,
                max_zoom=pixels.zooms,
                wrap_around=False,
            ),
            smoothing=True,
        )
    flipped = np.ascontiguousarray(image[::-1])
    known, shown = ColumnDataSource({"image": [flipped]}), ColumnDataSource({"image": [flipped]})
    mapper = LinearColorMapper(palette=stops(256), low=0, high=1, nan_color="rgba(0, 0, 0, 0)")
    drawn = plot.image(
        image="image",
        source=shown,
        x=0,
        y=-rows * pitch,
        dw=columns * pitch,
        dh=rows * pitch,
        color_mapper=mapper,
        global_alpha=0.5,
        name="map",
    )
    found = found_regions(result)
    outlines, regions = ColumnDataSource(found["outlines"]), ColumnDataSource(found["regions"])
    plot.multi_polygons(
        xs="xs", ys="ys", source=outlines, fill_alpha=0, line_color="#d62728", line_width=2, name="outlines"
    )
    plot.add_layout(
        ScaleBar(
            range=plot.x_range,
            unit="\u00b5m",
            dimensional=MetricLength(),
            location="bottom_left",
            background_fill_alpha=0.85,
        )
    )
    bar = ColorBar(color_mapper=mapper, title=f"P({result.positive})", width=12)
    plot.add_layout(bar, "right")

    what = f"P({result.positive})"
    opacity = Slider(start=0, end=1, value=0.5, step=0.05, title="Opacity of the map", name="opacity")
    threshold = Slider(
        start=0.005, end=0.995, step=0.005, value=result.threshold, title="Threshold", format="0.000", name="threshold"
    )
    only = Toggle(label="Show only tiles at or above the threshold", name="only")
    called, pointer = Div(text="", name="called"), Div(text="", name="pointer", styles={"min-height": "1.3em"})
    whole = Button(label=_WHOLE, name="whole")
    table = DataTable(
        source=regions,
        columns=[
            TableColumn(field="number", title="#", width=30),
            TableColumn(field="mean", title=f"mean {escape(what)}", formatter=NumberFormatter(format="0.000")),
            TableColumn(field="mm2", title="mm²", formatter=NumberFormatter(format="0.000")),
        ],
        index_position=None,
        reorderable=False,
        height=260,
        sizing_mode="stretch_width",
        name="regions",
    )
    measures = result.measures
    names = {"known": known, "map": shown, "threshold": threshold, "only": only, "called": called}
    mask, ask = (
        CustomJS(args=names, code=_MASK),
        CustomJS(args={"threshold": threshold, "regions": regions, "outlines": outlines}, code=_ASK),
    )
    opacity.js_link("value", drawn.glyph, "global_alpha")
    threshold.js_on_change("value", mask)
    threshold.js_on_change("value_throttled", ask)
    only.js_on_change("active", mask)
    geometry = {"pitch_x": pitch, "pitch_y": pitch, "rows": rows, "columns": columns}
    told = {**geometry, "known": known, "pointer": pointer, "what": escape(what)}
    plot.js_on_event("mousemove", CustomJS(args=told, code=_POINTER))
    regions.selected.js_on_change(
        "indices", CustomJS(args={"regions": regions, "figure": plot, "pitch_x": pitch}, code=_JUMP)
    )
    whole.js_on_click(CustomJS(args={"regions": regions, "figure": plot}, code=_RESET))
    called.text = f"{measures.positive:,} of {measures.tiles:,} tiles at or above {result.threshold:.3f}"

    notes = [pixels.note, "No tissue was found in this slide." if not slide.count else "", *_warnings(result)]
    head = Div(
        text=f"<h1 style='margin:0;font-size:1.3em'>{escape(result.slide_id)}</h1>"
        f"{escape(what)} by {escape(result.model)}, {escape(str(slide.spec))}. <b>{escape(USE)}</b> "
        "<a href='/'>All slides</a>"
        + "".join(f"<p style='margin:.3em 0'>Note: {escape(note)}</p>" for note in notes if note),
        name="head",
    )
    words = Div(text="<b>Strongest regions</b>, by area times mean; choose one to go there")
    beside = column(
        head, pointer, opacity, threshold, only, called, words, table, whole, sizing_mode="stretch_width", name="beside"
    )
    title = f"{result.slide_id}: {what}"
    return str(file_html([beside, plot], INLINE, title=title, template=Template(_TEMPLATE, autoescape=True)))


def _warnings(result: Result) -> list[str]:
    found = result.slide.attributes.get("warnings")
    return [str(line) for line in found] if isinstance(found, list) else []
