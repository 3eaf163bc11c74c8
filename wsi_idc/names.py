"""Names that become folders: of slides, and of models."""

import unicodedata

MAX_ID_BYTES = 128
_NOT_IN_NAMES = frozenset('<>:"|?*/\\')


def check_slide_id(text: str) -> str | None:
    """What forbids a slide id to name a folder on any file system or in Zarr; None if nothing does."""
    if not text:
        return "is empty"
    if text in (".", "..", "zarr.json") or text.casefold() == "zarr.json":
        return f"{text!r} is a reserved name"
    if len(text.encode("utf-8", "surrogatepass")) > MAX_ID_BYTES:
        return f"is longer than {MAX_ID_BYTES} bytes"
    if text.startswith((".", "__")) or text != text.strip() or text.endswith("."):
        return "starts with a dot, a space or '__', or ends with a dot or a space"
    if bad := sorted({character for character in text if character in _NOT_IN_NAMES}):
        return f"contains {' '.join(bad)}, which cannot be in a folder's name"
    if any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in text):
        return "contains a control character or an invisible one"
    return None


def same_name(text: str) -> str:
    """A key that is equal for ids which some file system would take for the same name."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
