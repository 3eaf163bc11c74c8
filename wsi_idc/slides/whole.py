"""Whether a slide file is whole, by its own tables: decoders give what is left of a cut file without a word.

Nothing is decoded. A TIFF (SVS, NDPI, SCN, BIF, OME-TIFF ...) names where each page, tag and stored tile lies; a DICOM
file ends with a mark, or states its length; a PNG ends with a chunk of its own. JPEG, JPEG 2000, WebP and BMP need no
check here: Pillow refuses them where they are cut.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import DamageError, SlideError
from wsi_idc.sources import first_bytes

MAX_PAGES = 4096
"""Pages of a TIFF, sub-pages included: a file of more is no slide, and would take long to open."""
MAX_TAGS = 1024
"""Tags of a TIFF's page."""
COPY_AGAIN = "copy or scan it again"

_TIFF_MARKS = {
    b"II*\0": ("<", False),
    b"MM\0*": (">", False),
    b"II+\0": ("<", True),
    b"MM\0+": (">", True),
}
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}
_SUB_PAGES, _SOFTWARE, _TILE_OFFSETS = 330, 305, 324
_STORED = {273: 279, _TILE_OFFSETS: 325}
"""Tags: where each strip or tile begins, and the tag of how many bytes it has."""
_PRIVATE = 32768
"""Tags from here on belong to vendors, who may put in them what they like."""
_AT_ONCE = 2**16
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def is_tiff(head: bytes) -> bool:
    """Whether a file's first bytes are a TIFF's."""
    return head[:4] in _TIFF_MARKS


def is_dicom(head: bytes) -> bool:
    """Whether a file's first 132 bytes are a DICOM file's."""
    return head[128:132] == b"DICM"


def check_whole(path: Path) -> list[str]:
    """Look whether all that a file names lies within it.

    Returns:
        What is missing from it and does not keep it from being read, a line each.

    Raises:
        DamageError: it is cut short.
        SlideError: it has more pages than a slide can have.
        OSError: it cannot be read.
    """
    head = first_bytes(path, 132)
    size = path.stat().st_size
    with path.open("rb") as stream:
        if is_tiff(head):
            return _TiffCheck(path, stream, size, *_TIFF_MARKS[head[:4]]).run()
        if is_dicom(head):
            return _check_dicom(path, stream, size)
        if head[:4] == b"\x89PNG":
            stream.seek(max(size - _AT_ONCE, 0))
            return [] if _PNG_END in stream.read() else ["the picture is cut short: its last bytes are missing"]
    return []


# --- TIFF ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tag:
    kind: int
    count: int
    place: int

    @property
    def length(self) -> int:
        return self.count * _TYPE_BYTES.get(self.kind, 0)


@dataclass
class _TiffCheck:
    """One look through a TIFF's pages.

    A classic TIFF of over 4 GiB is left to the readers: only NDPI is one, and its 64-bit places are kept elsewhere.
    """

    path: Path
    stream: BinaryIO
    size: int
    order: str
    big: bool

    def run(self) -> list[str]:
        if not self.big and self.size >= 2**32:
            return []
        pages = list(self._pages())
        tiled = any(_TILE_OFFSETS in page for page in pages)
        warnings = []
        for number, page in enumerate(pages):
            absent, stored, missing = self._stored(page)
            holds_pixels = _TILE_OFFSETS in page or not tiled
            if missing and holds_pixels:
                raise self._cut(f"{missing:,} of the {stored:,} stored tiles of page {number} lie beyond")
            if missing:
                warnings.append(f"the file is cut short: its picture on page {number} lies beyond its end")
            if absent and holds_pixels and not self._leaves_tiles_out(page):
                warnings.append(f"{absent:,} of the {stored:,} stored tiles of page {number} are absent: not scanned?")
        return warnings

    def _cut(self, what: str) -> DamageError:
        return DamageError(self.path, f"the file is cut short at byte {self.size:,}: {what}", COPY_AGAIN)

    def _number(self, place: int, width: int) -> int:
        if place + width > self.size:
            raise self._cut("its table of pages lies beyond")
        self.stream.seek(place)
        return int.from_bytes(self.stream.read(width), "little" if self.order == "<" else "big")

    def _pages(self) -> Iterator[dict[int, _Tag]]:
        """The tags of every page, sub-pages after their page."""
        width = 8 if self.big else 4
        waiting, seen = [self._number(8 if self.big else 4, width)], set[int]()
        while waiting:
            place = waiting.pop()
            if place == 0 or place in seen:
                continue
            seen.add(place)
            if len(seen) > MAX_PAGES:
                raise SlideError(self.path, f"has more than {MAX_PAGES} pages", "no slide has as many levels")
            page, following = self._page(place)
            waiting.append(following)
            sub_pages = page.get(_SUB_PAGES)
            if sub_pages is not None and sub_pages.count <= MAX_PAGES:
                waiting.extend(int(at) for part in self._values(sub_pages) for at in part[::-1])
            yield page

    def _page(self, place: int) -> tuple[dict[int, _Tag], int]:
        """The tags of the page at a place, and where the next page is."""
        counter, entry, inline = (8, 20, 8) if self.big else (2, 12, 4)
        count = self._number(place, counter)
        start = place + counter
        if count > MAX_TAGS:
            raise DamageError(self.path, f"has a page of {count:,} tags", COPY_AGAIN)
        following = self._number(start + count * entry, inline)
        self.stream.seek(start)
        table = self.stream.read(count * entry)
        page = {}
        fields = struct.iter_unpack(f"{self.order}{'HHQQ' if self.big else 'HHII'}", table)
        for index, (code, kind, number, place) in enumerate(fields):
            tag = _Tag(kind, number, place)
            if tag.length <= inline:
                tag = _Tag(kind, number, start + index * entry + entry - inline)
            elif code < _PRIVATE and place + tag.length > self.size:
                raise self._cut(f"tag {code} of a page lies beyond")
            page[code] = tag
        return page, following

    def _values(self, tag: _Tag) -> Iterator[NDArray[np.uint64]]:
        """A tag's whole numbers, some at a time."""
        form = _INTEGERS.get(tag.kind)
        if form is None:
            return
        for first in range(0, tag.count, _AT_ONCE):
            some = min(_AT_ONCE, tag.count - first)
            self.stream.seek(tag.place + first * _TYPE_BYTES[tag.kind])
            data = self.stream.read(some * _TYPE_BYTES[tag.kind])
            yield np.frombuffer(data, f"{self.order}{form}").astype(np.uint64)

    def _stored(self, page: dict[int, _Tag]) -> tuple[int, int, int]:
        """How many of a page's tiles or strips are absent, how many there are, and how many lie beyond the end."""
        absent = stored = missing = 0
        for offset_tag, count_tag in _STORED.items():
            if offset_tag not in page or count_tag not in page:
                continue
            for offsets, counts in zip(self._values(page[offset_tag]), self._values(page[count_tag]), strict=False):
                both = min(len(offsets), len(counts))
                offsets, counts = offsets[:both], counts[:both]
                stored += both
                absent += int((counts == 0).sum())
                room = np.uint64(self.size) - np.minimum(offsets, np.uint64(self.size))
                missing += int((counts > room).sum())
        return absent, stored, missing

    def _leaves_tiles_out(self, page: dict[int, _Tag]) -> bool:
        """Whether the scanner leaves tiles without tissue out as a rule: Philips does."""
        software = page.get(_SOFTWARE)
        if software is None:
            return False
        self.stream.seek(software.place)
        return self.stream.read(min(software.length, 64)).startswith(b"Philips")


# --- DICOM --------------------------------------------------------------------------------------------------------

_END_OF_ITEMS = b"\xfe\xff\xdd\xe0\0\0\0\0"
_ITEM = b"\xfe\xff\x00\xe0"


def _check_dicom(path: Path, stream: BinaryIO, size: int) -> list[str]:
    """Look whether a DICOM file's pixels are all there: encapsulated ones end with a mark, others have a length."""
    stream.seek(max(size - len(_END_OF_ITEMS), 0))
    if stream.read() == _END_OF_ITEMS:
        return []
    import pydicom
    from pydicom.errors import InvalidDicomError

    stream.seek(0)
    try:
        header = pydicom.dcmread(stream, stop_before_pixels=True)
    except (InvalidDicomError, EOFError, ValueError, AttributeError, KeyError, NotImplementedError):
        return []  # the readers say what they make of it
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is None or syntax.is_deflated or not syntax.is_little_endian:
        return []
    place = stream.tell()
    cut = DamageError(path, f"the file is cut short at byte {size:,}: its pixels go on beyond", COPY_AGAIN)
    head = stream.read(12)
    if head[:4] != b"\xe0\x7f\x10\x00":
        if len(head) < 12:
            raise cut
        return []
    # Tag, then length; with explicit types, tag, type and two bytes of nothing, then length.
    start, length = (place + 8, head[4:8]) if syntax.is_implicit_VR else (place + 12, head[8:12])
    if length != b"\xff\xff\xff\xff":
        if start + int.from_bytes(length, "little") > size:
            raise cut
        return []
    while True:
        stream.seek(start)
        head = stream.read(8)
        if head == _END_OF_ITEMS:
            return []
        if len(head) < 8 or head[:4] != _ITEM:
            raise cut
        start += 8 + int.from_bytes(head[4:], "little")
