"""Whether a page that is there was made from the same as one would be made from now: then it is left as it is.

The page itself says what it was made from, in its head, so that there is no file of state beside it. What it is held
against are records, by one read each: what stands in arrays was written before their record.
"""

import hashlib
import html
import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wsi_idc import __version__
from wsi_idc.digests import digest
from wsi_idc.model.bundle import LoadedBundle
from wsi_idc.results import Choice
from wsi_idc.store import Store, at_once

_VERSION = 1
"""Another one where the same would give another page."""
_HEAD = 4096
"""Bytes of a page that have its mark."""
_MARK = re.compile(r'<meta name="wsi-idc-page" content="([^"]*)">')


def made_from(
    store: Store, choice: Choice, bundle: LoadedBundle | None, card: str, names: Sequence[str], **settings: Any
) -> str:
    """Sixteen hex digits that differ where the page would, but for the time when it was written.

    Args:
        store: the store.
        choice: whose maps.
        bundle: the model, where it is at hand.
        card: its card.
        names: the slides that it shows.
        settings: what else it depends on.
    """

    def records(name: str) -> str:
        nodes = (store.slide_node(name), store.map_node(choice.model, name))
        parts = [store.backing.read(f"{node.path}/zarr.json") for node in nodes]
        return hashlib.blake2b(b"\0".join(part or b"" for part in parts), digest_size=8).hexdigest()

    return digest(
        {
            "versions": [_VERSION, __version__, platform.python_version()],
            "store": [store.address, store.models()],
            "model": [choice.model, list(choice.needs), bundle and bundle.fields.model_dump(mode="json"), card],
            "slides": dict(zip(names, at_once(records, names), strict=True)),
            "settings": settings,
        }
    )


def mark(made: str, counts: dict[str, int], folder: Path | None, pictures: int) -> str:
    """What a page says of itself.

    Args:
        made: what it was made from.
        counts: of its slides.
        folder: of its pictures, where they are not in it.
        pictures: how many it has.
    """
    return json.dumps({"made": made, "counts": counts, "folder": folder and folder.name, "pictures": pictures})


def standing(page: Path, folders: Path, made: str) -> tuple[Path | None, dict[str, int]] | None:
    """Where the pictures are of a page that was made from the same, and the counts of its slides; None: it was not.

    Args:
        page: the page.
        folders: beside it, in which a folder of pictures would be.
        made: what it would be made from now.
    """
    try:
        with page.open("rb") as stream:
            found = _MARK.search(stream.read(_HEAD).decode(errors="replace"))
        said = json.loads(html.unescape(found[1])) if found else {}
        if said["made"] != made:
            return None
        folder = folders / said["folder"] if said["folder"] else None
        if folder is not None and len(list(folder.iterdir())) != said["pictures"]:
            return None
        return folder, {str(name): int(count) for name, count in said["counts"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
