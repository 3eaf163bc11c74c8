"""Whether a slide file is whole, by its own tables: decoders give what is left of a cut file without a word.

Nothing is decoded. A TIFF (SVS, NDPI, SCN, BIF, OME-TIFF ...) names where each page, tag and stored tile lies; a DICOM
file ends with a mark, or states its length; a PNG ends with a chunk of its own. JPEG, JPEG 2000, WebP and BMP need no
check here: Pillow refuses them where they are cut.
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np

from wsi_idc.errors import DamageError
from wsi_idc.slides.tiff import COPY_AGAIN, TILE_COUNTS, TILE_OFFSETS, Page, Tiff, is_tiff
from wsi_idc.sources import first_bytes

_SOFTWARE = 305
_STORED = {273: 279, TILE_OFFSETS: TILE_COUNTS}
"""Tags: where each strip or tile begins, and the tag of how many bytes it has."""
_AT_ONCE = 2**16
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


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
            return _check_tiff(path, stream, size)
        if is_dicom(head):
            return _check_dicom(path, stream, size)
        if head[:4] == b"\x89PNG":
            stream.seek(max(size - _AT_ONCE, 0))
            return [] if _PNG_END in stream.read() else ["the picture is cut short: its last bytes are missing"]
    return []


# --- TIFF ---------------------------------------------------------------------------------------------------------


def _check_tiff(path: Path, stream: BinaryIO, size: int) -> list[str]:
    """One look through a TIFF's pages.

    A classic TIFF of over 4 GiB is left to the readers: only NDPI is one, and its 64-bit places are kept elsewhere.
    """
    tiff = Tiff(path, stream, size)
    if not tiff.big and size >= 2**32:
        return []
    pages = list(tiff.pages())
    tiled = any(TILE_OFFSETS in page for page in pages)
    warnings = []
    for number, page in enumerate(pages):
        absent, stored, missing = _stored(tiff, page)
        holds_pixels = TILE_OFFSETS in page or not tiled
        if missing and holds_pixels:
            raise tiff.cut(f"{missing:,} of the {stored:,} stored tiles of page {number} lie beyond")
        if missing:
            warnings.append(f"the file is cut short: its picture on page {number} lies beyond its end")
        if absent and holds_pixels and not _leaves_tiles_out(tiff, page):
            warnings.append(f"{absent:,} of the {stored:,} stored tiles of page {number} are absent: not scanned?")
    return warnings


def _stored(tiff: Tiff, page: Page) -> tuple[int, int, int]:
    """How many of a page's tiles or strips are absent, how many there are, and how many lie beyond the end."""
    absent = stored = missing = 0
    for offset_tag, count_tag in _STORED.items():
        if offset_tag not in page or count_tag not in page:
            continue
        for offsets, counts in zip(tiff.values(page[offset_tag]), tiff.values(page[count_tag]), strict=False):
            both = min(len(offsets), len(counts))
            offsets, counts = offsets[:both], counts[:both]
            stored += both
            absent += int((counts == 0).sum())
            room = np.uint64(tiff.size) - np.minimum(offsets, np.uint64(tiff.size))
            missing += int((counts > room).sum())
    return absent, stored, missing


def _leaves_tiles_out(tiff: Tiff, page: Page) -> bool:
    """Whether the scanner leaves tiles without tissue out as a rule: Philips does."""
    return _SOFTWARE in page and tiff.content(page[_SOFTWARE], 64).startswith(b"Philips")


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
