"""The pages of a TIFF by its own tables: where each tag and each stored tile lies. Nothing is decoded.

So little is needed of a TIFF here that tifffile, which costs 0.15 s to import, is left out where a slide is opened.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import DamageError, SlideError

MAX_PAGES = 4096
"""Pages of a TIFF, sub-pages included: a file of more is no slide, and would take long to open."""
MAX_TAGS = 1024
"""Tags of a TIFF's page."""
COPY_AGAIN = "copy or scan it again"
TILE_OFFSETS, TILE_COUNTS = 324, 325
"""Tags: where each stored tile begins, and how many bytes it has; 0 where it is absent."""

_MARKS = {
    b"II*\0": ("<", False),
    b"MM\0*": (">", False),
    b"II+\0": ("<", True),
    b"MM\0+": (">", True),
}
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}
_SUB_PAGES = 330
_PRIVATE = 32768
"""Tags from here on belong to vendors, who may put in them what they like."""
_AT_ONCE = 2**16


def is_tiff(head: bytes) -> bool:
    """Whether a file's first bytes are a TIFF's."""
    return head[:4] in _MARKS


@dataclass(frozen=True)
class Tag:
    """One tag of a page.

    Attributes:
        kind: the TIFF type of its values.
        count: how many there are.
        place: where they begin in the file.
    """

    kind: int
    count: int
    place: int

    @property
    def length(self) -> int:
        """In bytes; 0 of an unknown type."""
        return self.count * _TYPE_BYTES.get(self.kind, 0)


Page: TypeAlias = dict[int, Tag]
"""The tags of a page, by their codes."""


class Tiff:
    """A TIFF or BigTIFF that is open.

    Args:
        path: the file, for messages.
        stream: it, open; a TIFF by its first bytes (`is_tiff`).
        size: its size in bytes.

    Attributes:
        size: as given.
        big: whether it is a BigTIFF.
    """

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self._path, self._stream, self.size = path, stream, size
        stream.seek(0)
        self._order, self.big = _MARKS[stream.read(4)]

    def cut(self, what: str) -> DamageError:
        """The error that the file is cut short; `what` lies beyond its end."""
        return DamageError(self._path, f"the file is cut short at byte {self.size:,}: {what}", COPY_AGAIN)

    def pages(self) -> Iterator[Page]:
        """The tags of every page, sub-pages after their page.

        Raises:
            DamageError: a table lies beyond the file's end, or cannot be one.
            SlideError: there are more than `MAX_PAGES`.
        """
        width = 8 if self.big else 4
        waiting, seen = [self._number(8 if self.big else 4, width)], set[int]()
        while waiting:
            place = waiting.pop()
            if place == 0 or place in seen:
                continue
            seen.add(place)
            if len(seen) > MAX_PAGES:
                raise SlideError(self._path, f"has more than {MAX_PAGES} pages", "no slide has as many levels")
            page, following = self._page(place)
            waiting.append(following)
            sub_pages = page.get(_SUB_PAGES)
            if sub_pages is not None and sub_pages.count <= MAX_PAGES:
                waiting.extend(int(at) for part in self.values(sub_pages) for at in part[::-1])
            yield page

    def values(self, tag: Tag) -> Iterator[NDArray[np.uint64]]:
        """A tag's whole numbers, some at a time; none of a tag of another type."""
        form = _INTEGERS.get(tag.kind)
        if form is None:
            return
        for first in range(0, tag.count, _AT_ONCE):
            some = min(_AT_ONCE, tag.count - first)
            self._stream.seek(tag.place + first * _TYPE_BYTES[tag.kind])
            data = self._stream.read(some * _TYPE_BYTES[tag.kind])
            yield np.frombuffer(data, f"{self._order}{form}").astype(np.uint64)

    def content(self, tag: Tag, most: int) -> bytes:
        """A tag's bytes, `most` of them at most."""
        self._stream.seek(tag.place)
        return self._stream.read(min(tag.length, most))

    def _number(self, place: int, width: int) -> int:
        if place + width > self.size:
            raise self.cut("its table of pages lies beyond")
        self._stream.seek(place)
        return int.from_bytes(self._stream.read(width), "little" if self._order == "<" else "big")

    def _page(self, place: int) -> tuple[Page, int]:
        """The tags of the page at a place, and where the next page is."""
        counter, entry, inline = (8, 20, 8) if self.big else (2, 12, 4)
        count = self._number(place, counter)
        start = place + counter
        if count > MAX_TAGS:
            raise DamageError(self._path, f"has a page of {count:,} tags", COPY_AGAIN)
        following = self._number(start + count * entry, inline)
        self._stream.seek(start)
        table = self._stream.read(count * entry)
        page = {}
        fields = struct.iter_unpack(f"{self._order}{'HHQQ' if self.big else 'HHII'}", table)
        for index, (code, kind, number, place) in enumerate(fields):
            tag = Tag(kind, number, place)
            if tag.length <= inline:
                tag = Tag(kind, number, start + index * entry + entry - inline)
            elif code < _PRIVATE and place + tag.length > self.size:
                raise self.cut(f"tag {code} of a page lies beyond")
            page[code] = tag
        return page, following
