"""The page of a run, from the store: what was done, each slide with its map, and what it all was made from.

Slides are read a few at a time; what stays of each are words, numbers and its pictures as files. Nothing is written to
the store.
"""

import platform
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wsi_idc import __version__
from wsi_idc.errors import UsageError
from wsi_idc.files import starts_otherwise, write_whole
from wsi_idc.model.bundle import SHIPPED, LoadedBundle, read_bundle
from wsi_idc.report.entry import Entry, entry
from wsi_idc.report.judged import Judged, judge
from wsi_idc.report.kept import made_from, mark, standing
from wsi_idc.report.page import counts, html_page
from wsi_idc.report.pictures import PAGE_BYTES, Pictures, folders_of, writing
from wsi_idc.results import Absent, Choice, Result, choose_model, limited, look
from wsi_idc.store import Store, open_store
from wsi_idc.work.jobs import Listener, Outcome

BEGINNING = b"<!doctype html>"
"""Of a page: no other file is replaced by one."""
MAX_CARD = 200_000
"""Characters of a model's card that are shown."""
_AT_ONCE = 4
"""Slides that are drawn at once; each holds its small picture and some tiles."""


@dataclass(frozen=True)
class Written:
    """What `write` wrote.

    Attributes:
        page: the page.
        slides: those that it shows.
        folder: of its pictures, where they are not in the page.
        counts: slides, and how many of them are done, failed, stale, suspicious, empty and not scored; a suspicious
            one is one of the others too.
        kept: whether it was there, made from the same, and left as it is.
    """

    page: Path
    slides: Sequence[str]
    folder: Path | None
    counts: Mapping[str, int]
    kept: bool = False


def write(
    address: str | Path,
    model: str | None,
    out: Path,
    *,
    threshold: float | None = None,
    only: Sequence[str] = (),
    listed: Collection[str] | None = None,
    keep: bool = False,
    listener: Callable[[Sequence[str]], Listener] | None = None,
) -> Written:
    """Write the page of all slides in a store, or of those of `only`.

    A store without any map has a page too: it says why nothing was scored.

    Args:
        address: the store's.
        model: whose maps, as `choose_model` takes it.
        out: the page; pictures go to `<its name>_files` where the page would be over 25 MB.
        threshold: P(positive) from which a tile is positive; None: the model's.
        only: slide ids to which it is limited; all where empty.
        listed: slide ids of the manifest: the page names slides that left it. None: no manifest was given.
        keep: leave a page as it is that was made from the same.
        listener: is given the slides, and told when each was looked at.

    Raises:
        UsageError: the store has no slide or not those of `only`, there is no such model, or `out` cannot be written.
        StoreError: there is no such store.
        StoreBusyError: another run writes the pictures of the same page.
    """
    store = open_store(address)
    choice, bundle = _choose(store, model)
    stored = store.all_slide_ids()
    if not stored:
        raise UsageError(store.address, "has no slides", "run wsi-idc extract first")
    names = limited(stored, only)
    _try_writing(out)
    card = _card_text(bundle)
    shown = None if listed is None else [name in listed for name in names]
    made = made_from(store, choice, bundle, card, names, only=sorted(set(only)), threshold=threshold, listed=shown)
    if keep and (stands := standing(out, folders_of(out), made)):
        return Written(out, names, *stands, kept=True)
    told = listener(names) if listener else None
    entries: list[Entry] = []
    about: Mapping[str, Any] = {}
    positive = "IDC"
    with Pictures(out) as pictures, ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="draw") as executor:

        def draw(name: str) -> tuple[Result | Absent, Entry]:
            found = look(store, choice, name, threshold)
            return found, entry(store, found, pictures)

        for name, (found, one) in zip(names, executor.map(draw, names), strict=True):
            if isinstance(found, Result):
                about, positive = found.map.attributes["model"], found.positive
            entries.append(one)
            if told:
                told.ended(name, Outcome("done"))
        judged = judge(store, bundle, entries, pictures, threshold) if not only else _left_out(entries)

        def page() -> bytes:
            return html_page(
                entries,
                title=choice.model,
                positive=positive,
                judged=judged,
                card=_card(choice, bundle, about),
                card_text=card,
                facts=_facts(store, bundle, about, threshold, only),
                notes=_notes(store, entries, listed),
                pictures=pictures,
                mark=mark(made, counts(entries), pictures.folder, len(pictures)),
            ).encode()

        content = page()
        if pictures.folder is None and len(content) > PAGE_BYTES:
            pictures.spill()
            content = page()
        with writing(out):
            write_whole(out, content)
        return Written(out, names, pictures.folder, counts(entries))


def _choose(store: Store, model: str | None) -> tuple[Choice, LoadedBundle | None]:
    """Whose maps, and the model itself where it is at hand: given, or the one that ships.

    In a store without maps there is nothing to choose from: those that `infer` would make are then missing.
    """
    names = store.models()
    given = read_bundle(Path(model)) if model and model not in names and Path(model).is_dir() else None
    if not names and (given or model is None):
        bundle = given or read_bundle(SHIPPED)
        return Choice(bundle.fields.name), bundle
    choice = choose_model(store, model)
    return choice, given or _shipped(store, choice.model)


def _shipped(store: Store, model: str) -> LoadedBundle | None:
    """The model that ships, where the maps are by its files and not only by its name."""
    bundle = read_bundle(SHIPPED)
    known = store.model_attributes(model).get("files")
    same = isinstance(known, list) and bool(bundle.digests() & set(map(str, known)))
    return bundle if model == bundle.fields.name and same else None


def _try_writing(out: Path) -> None:
    """Find out before the work whether the page can be put there.

    Raises:
        UsageError: it cannot.
    """
    if out.is_dir():
        raise UsageError(out, "is a folder", "give the page's file with --out")
    with writing(out):
        if why := starts_otherwise(out, BEGINNING):
            raise UsageError(out, why, "name another file with --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass


def _left_out(entries: Sequence[Entry]) -> Judged | None:
    """With `only`: figures are of whole stores."""
    if not any(entry.labelled for entry in entries):
        return None
    return Judged("The page shows chosen slides only (--only); figures are of all of a store's.")


def _notes(store: Store, entries: Sequence[Entry], listed: Collection[str] | None) -> list[str]:
    """What must be said at the top."""
    notes = [] if store.models() else ["The store has no maps: nothing was scored yet."]
    left = [] if listed is None else [one.slide_id for one in entries if one.slide_id not in listed]
    if left:
        shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        notes.append(
            f"{len(left):,} of these slides {'is' if len(left) == 1 else 'are'} no longer in the manifest ({shown}); "
            "wsi-idc prune removes them from the store."
        )
    return notes


def _card(choice: Choice, bundle: LoadedBundle | None, about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of the model: by its bundle, or by its maps alone."""
    if bundle is None:
        title = str(about.get("title") or choice.model)
        missing = "not at hand: give the model's folder to --model"
        return [("name", choice.model), ("title", title), ("licence", missing), ("trained on", missing)]
    fields = bundle.fields
    data = fields.training.get("data")
    if isinstance(data, Mapping):
        sides = {"train": "training", "val": "validation", "test": "test"}
        data = "; ".join(
            f"{sides.get(side, side)}: {', '.join(f'{count:,} {name}' for name, count in of.items())}"
            for side, of in data.items()
            if isinstance(of, Mapping) and all(isinstance(count, int) for count in of.values())
        )
    return [
        ("name", fields.name),
        ("title", fields.title or fields.name),
        ("licence", fields.licence or "not stated"),
        ("trained on", str(data or "not stated")),
        ("tells apart", ", ".join(fields.classes)),
        ("tiles", f"{fields.tile.size_px} px at {fields.tile.mpp:g} um/px"),
    ]


def _card_text(bundle: LoadedBundle | None) -> str:
    """The model's card; empty where it has none that can be read."""
    if bundle is None:
        return ""
    try:
        with (bundle.folder / "CARD.md").open(encoding="utf-8", errors="replace") as stream:
            return stream.read(MAX_CARD)
    except OSError:
        return ""


def _facts(
    store: Store,
    bundle: LoadedBundle | None,
    about: Mapping[str, Any],
    threshold: float | None,
    only: Sequence[str],
) -> list[tuple[str, str]]:
    """What the page was made from, by name."""
    own = about.get("threshold", bundle.fields.operating_point if bundle else None)
    of_model = "none" if own is None else f"{float(own):.4g}"
    words = f"{of_model}, the model's"
    if threshold is not None:
        words = f"{threshold:g}, given by --threshold (the model's: {of_model})"
    address = store.address if "://" in store.address else str(Path(store.address).absolute())
    return [
        ("store", address),
        (
            "written",
            f"{datetime.now(UTC).isoformat(timespec='seconds')} by wsi-idc {__version__} on Python "
            f"{platform.python_version()}",
        ),
        ("threshold", words),
        *([("limited to", ", ".join(sorted(set(only))))] if only else []),
    ]
