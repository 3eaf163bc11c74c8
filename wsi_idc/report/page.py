"""From facts to HTML: the template is given words and numbers, and escapes all of them.

Everything of a manifest, a file or a store is other people's text: jinja2 escapes it, and what would move a cursor or
turn a line around is shown as its escape. The page's policy (CSP) lets nothing run but its own script, known by its
hash, and nothing load but its pictures.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from wsi_idc import USE
from wsi_idc.colours import stops
from wsi_idc.console import printable
from wsi_idc.evaluate.style import base_style
from wsi_idc.report.entry import BINS, OPACITY, Entry
from wsi_idc.report.judged import Judged
from wsi_idc.report.pictures import Pictures

FILTERS = ("done", "failed", "stale", "suspicious", "empty", "not scored")
"""What the table can be limited to; a slide may be of several kinds."""
_BAR = (360, 120)
"""Width and height of a histogram's field, in its own units."""


def counts(entries: Sequence[Entry]) -> dict[str, int]:
    """Slides of each kind."""
    found = Counter(kind for entry in entries for kind in entry.kinds)
    return {"slides": len(entries), **{kind: found[kind] for kind in FILTERS}}


def html_page(
    entries: Sequence[Entry],
    *,
    title: str,
    positive: str,
    judged: Judged | None,
    card: Sequence[tuple[str, str]],
    card_text: str,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
    pictures: Pictures,
    mark: str,
) -> str:
    """The page.

    Args:
        entries: the slides.
        title: whose maps these are.
        positive: the class that probabilities are of.
        judged: what labels say; None where there are none.
        card: what is known of the model, by name.
        card_text: its card, Markdown; may be empty.
        facts: what else the page was made from, by name.
        notes: what must be said at the top.
        pictures: of these slides; where they are decides their addresses.
        mark: what the page says of itself, see `kept`.
    """
    import jinja2

    def finalize(value: Any) -> Any:
        return printable(value) if type(value) is str else value

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=finalize
    )
    place = files("wsi_idc.report")
    own, script = (place.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    style = base_style() + own
    return environment.from_string(place.joinpath("page.html.j2").read_text("utf-8")).render(
        use=USE,
        mark=mark,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        title=title,
        positive=positive,
        entries=[_shown(number, one) for number, one in enumerate(entries)],
        counts=counts(entries),
        troubled=[entry for entry in entries if entry.state not in ("done", "not scored")],
        judged=judged,
        card=card,
        card_html=_markdown(card_text),
        facts=[*facts, *_made(entries)],
        notes=notes,
        opacity=round(100 * OPACITY),
        colours=[(f"{place / 8:g}", colour) for place, colour in enumerate(stops())],
        source=lambda name: Markup(pictures.source(name)),
        mm2=lambda value: "" if value is None else f"{value:,.2f}",
        part=lambda value: "" if value is None else f"{value:.1%}",
        p=lambda value: "" if value is None else f"{value:.3f}",
        number=lambda value: f"{value:,}",
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _shown(number: int, entry: Entry) -> dict[str, Any]:
    """An entry with what is drawn of it: everything has numbers of its own in the template's drawings."""
    picture = entry.picture
    drawing = None
    if picture is not None:
        width, height = picture.size
        scale = 1000 / max(width, height)
        bar, boxes = _scale_bar(width), [[value * scale for value in box] for _, box in entry.regions]
        drawing = {
            "size": _rounded(width * scale, height * scale),
            "map": _rounded(*(side * scale for side in picture.map_size)),
            "bar": (*_rounded(bar * scale), f"{bar:g} mm"),
            "boxes": [_rounded(*box) for box in boxes],
            # Above its frame, or below where that would be outside the slide.
            "numbers": [_rounded(x, y - 8 if y > 34 else y + high + 26) for x, y, _, high in boxes],
        }
    bars = []
    if entry.histogram:
        highest, step = max(entry.histogram), _BAR[0] / BINS
        for place, count in enumerate(entry.histogram):
            height = max(1.5, count / highest * _BAR[1]) if count else 0.0
            x, y, wide, high = _rounded(place * step + 0.5, _BAR[1] - height, step - 1, height)
            bars.append({"x": x, "y": y, "width": wide, "height": high, "count": count, "from": place / BINS})
    return {"id": f"d{number}", "entry": entry, "drawing": drawing, "bars": bars}


def _rounded(*values: float) -> tuple[str, ...]:
    return tuple(f"{value:.5g}" for value in values)


def _scale_bar(width_mm: float) -> float:
    """A round length of about a fifth of the slide's width, in mm."""
    return max((bar for bar in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0) if bar <= width_mm / 4), default=0.02)


_NAMES = {
    "tiles": "tiles made from",
    "tile versions": "tiles made with",
    "map": "maps made from",
    "map versions": "maps made with",
}


def _made(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """What tiles and maps were made from and with; where slides differ, how many have which."""
    found: dict[str, dict[str, Counter[str]]] = {kind: {} for kind in _NAMES}
    for entry in entries:
        for kind, made in entry.made.items():
            for name, value in made.items():
                found[kind].setdefault(name, Counter())[_value(value)] += 1
    return [
        (words, "; ".join(f"{name}: {_counted(values)}" for name, values in found[kind].items()))
        for kind, words in _NAMES.items()
        if found[kind]
    ]


def _counted(values: Counter[str]) -> str:
    if len(values) == 1:
        return next(iter(values))
    shown = [f"{value} ({count:,} slides)" for value, count in values.most_common(_SHOWN)]
    return ", ".join(shown) + (f" and {len(values) - _SHOWN:,} others" if len(values) > _SHOWN else "")


_SHOWN = 4


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown(text: str) -> Markup:
    """A card as HTML: headings, lists and tables; its own HTML is shown as text, pictures and links are left out."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "link", "autolink"])
    tokens = parser.parse(printable(text))
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = "h4"  # The page's own headings stand above a card's.
    # The parser escapes every text; tested.
    return Markup(parser.renderer.render(tokens, parser.options, {}))
