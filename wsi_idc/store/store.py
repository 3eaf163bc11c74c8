"""The tile store: one Zarr v3 hierarchy on a backing.

    STORE/                       group; attributes: format
      lease/                     empty array; below it the lease's files
      slides/<slide_id>/         tiles, position, cell, tissue, blur, pen, idc, thumbnail, tissue_mask
      maps/<model>/<slide_id>/   0, probability, alone

`docs/store.md` has the format, what is promised and under which assumptions; `node.py` the rule that results live by.
"""

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from wsi_idc.errors import ObjectsError, StoreBusyError, StoreError, system_reason
from wsi_idc.names import check_slide_id
from wsi_idc.store.backing import LEASE, Backing, Holding, Lease, backing_at, holds
from wsi_idc.store.map import StoredMap
from wsi_idc.store.node import FORMAT, Node, Record, group_document
from wsi_idc.store.slide import StoredSlide

OLDER = ("wsi-idc-store/1",)
"""Formats that `extract` brings up to date, by cutting their slides again."""
_LEASE_DOCUMENT = {
    "zarr_format": 3,
    "node_type": "array",
    "shape": [0],
    "data_type": "uint8",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1]}},
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    "fill_value": 0,
    "codecs": [{"name": "bytes"}],
    "dimension_names": ["lease"],
    "attributes": {"about": "below this array lies who writes the store: see docs/store.md"},
}


@dataclass(frozen=True)
class Ticket:
    """What a run gives its tasks, wherever they run, to write with: the store's address, and the lease it holds."""

    address: str
    nonce: str


class Store:
    """A tile store; `open_store`, `hold_store` and `admit` give one.

    Attributes:
        backing: what it lies on.
        notes: lines that a user should see, of what was done to open it.
    """

    def __init__(self, backing: Backing, ticket: Ticket | None = None, lease: Lease | None = None) -> None:
        self.backing, self._ticket, self._lease = backing, ticket, lease
        self.notes: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """What a user types for it."""
        return self.backing.address

    @property
    def held(self) -> bool:
        """Whether the run that writes still holds the lease."""
        return self._ticket is not None and holds(self.backing, self._ticket.nonce)

    @property
    def ticket(self) -> Ticket:
        """What tasks write into a store with that is held."""
        if self._ticket is None:
            raise RuntimeError(f"{self.address} was opened to be read")
        return self._ticket

    @property
    def holding(self) -> Holding | None:
        """Which run writes the store, or did when it was killed; None where none does."""
        return self.backing.lease().look()

    def tell(self, does: Mapping[str, Any]) -> None:
        """Let others see what the run that holds the store does: see `Lease.tell`."""
        if self._lease is not None:
            self._lease.tell(does)

    def try_writing(self) -> None:
        """Write something and remove it.

        Raises:
            OSError: that cannot be done here.
        """
        key = f"{LEASE}/{uuid.uuid4().hex}"
        self.backing.write(key, b"")
        self.backing.delete(key)

    def _check(self) -> None:
        if not self.held:
            advice = "nothing more is written: wait for that run, then run the same command"
            raise StoreBusyError(self.address, "another run has taken the store over", advice)

    def _node(self, path: str, again: str) -> Node:
        return Node(self.backing, path, again, None if self._ticket is None else self._check)

    def slide_node(self, slide_id: str) -> Node:
        """The group of a slide."""
        return self._node(f"slides/{slide_id}", "wsi-idc extract")

    def map_node(self, model: str, slide_id: str) -> Node:
        """The group of a slide's map."""
        return self._node(f"maps/{model}/{slide_id}", "wsi-idc infer")

    def all_slide_ids(self) -> list[str]:
        """Every slide that was ever tried."""
        return self._groups("slides")

    def _groups(self, prefix: str) -> list[str]:
        """Groups below a prefix; a folder whose name no slide or model can have is somebody else's."""
        return [name for name in self.backing.folders(prefix) if check_slide_id(name) is None]

    def slide_ids(self) -> list[str]:
        """Every slide whose tiles are complete."""
        names = self.all_slide_ids()
        usable = at_once(lambda name: self.slide_node(name).record().usable, names)
        return [name for name, whole in zip(names, usable, strict=True) if whole]

    def models(self) -> list[str]:
        """Every model with a map in the store."""
        return self._groups("maps")

    def mapped_slide_ids(self, model: str) -> list[str]:
        """Every slide with a map by a model, or an attempt at one; its tiles may be gone."""
        return self._groups(f"maps/{model}")

    def look(self, slide_id: str) -> tuple[Record, StoredSlide | None]:
        """A slide's record, and its tiles where they are complete: by one read.

        Raises:
            StoreDamageError: the record is that of complete tiles, and damaged.
        """
        node = self.slide_node(slide_id)
        record = node.record()
        return record, StoredSlide(node, record) if record.usable else None

    def slide(self, slide_id: str) -> StoredSlide:
        """A slide's tiles.

        Raises:
            StoreError: they are not complete.
            StoreDamageError: their record is damaged.
        """
        record, slide = self.look(slide_id)
        if slide is None:
            why = record.trouble if record.failed is None else f"failed: {record.failed}"
            raise StoreError(slide_id, f"not extracted{f' ({why})' if why else ''}", "run wsi-idc extract")
        return slide

    def map(self, model: str, slide_id: str) -> StoredMap:
        """A slide's map by a model, as it is now; there may be none."""
        node = self.map_node(model, slide_id)
        return StoredMap(node, node.record())

    def model_attributes(self, model: str) -> Mapping[str, Any]:
        """What is known of the model whose maps these are; empty where it has none."""
        return self._node(f"maps/{model}", "wsi-idc infer").record().attributes

    def put_model(self, model: str, attributes: Mapping[str, Any]) -> None:
        """Make the group of a model's maps, or replace its attributes."""
        if self.model_attributes(model) != attributes:
            self.backing.write(f"maps/{model}/zarr.json", group_document(attributes))

    def _make(self) -> None:
        """Put the groups in place that every store has."""
        for key, content in _DOCUMENTS.items():
            self.backing.write(key, content)
        for model in self.models():
            if self.backing.read(f"maps/{model}/zarr.json") is None:
                self.backing.write(f"maps/{model}/zarr.json", group_document({}))

    def faulty_documents(self) -> dict[str, str]:
        """Of the documents that every store has, and those of its models: key -> what is wrong with it."""
        found = {}
        for key in (*_DOCUMENTS, *(f"maps/{model}/zarr.json" for model in self.models())):
            content = self.backing.read(key)
            if fault := "it is not there" if content is None else _fault(content, _DOCUMENTS.get(key)):
                found[key] = fault
        return found

    def mend(self, key: str) -> None:
        """Put one of those documents in its place anew.

        A model's has the digests that its maps name, so that they stay those of the same model.

        Raises:
            StoreBusyError: another run has taken the store over.
        """
        self._check()
        content = _DOCUMENTS.get(key)
        if content is None:
            model = key.split("/")[1]
            records = at_once(lambda name: self.map_node(model, name).record(), self.mapped_slide_ids(model))
            about = [record.attributes.get("model") for record in records if record.complete is not None]
            files = sorted({str(each["digest"]) for each in about if isinstance(each, dict) and "digest" in each})
            content = group_document({"model": model, "files": files} if files else {})
        self.backing.write(key, content)


_DOCUMENTS = {
    "zarr.json": group_document({"format": FORMAT}),
    f"{LEASE}/zarr.json": json.dumps(_LEASE_DOCUMENT, indent=2).encode(),
    "slides/zarr.json": group_document({}),
    "maps/zarr.json": group_document({}),
}
"""What every store has, by key."""


def _fault(content: bytes, wanted: bytes | None) -> str:
    """What is wrong with a document; "" where it says what it must. Other attributes may stand beside ours."""
    try:
        found, expected = json.loads(content), json.loads(wanted or group_document({}))
        if not isinstance(found["attributes"], dict):
            return "its attributes are no object"
        wrong = [name for name, value in expected.items() if name != "attributes" and found.get(name) != value]
        wrong += [name for name, value in expected["attributes"].items() if found["attributes"].get(name) != value]
        return f"{' and '.join(wrong)} is not what was written" if wrong else ""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"it cannot be read ({type(error).__name__})"


_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


def at_once(ask: Callable[[_Item], _Answer], items: Sequence[_Item]) -> list[_Answer]:
    """Answers to a question about each of many things, asked several at a time: a store may lie far away."""
    with ThreadPoolExecutor(_QUESTIONS) as executor:
        return list(executor.map(ask, items))


_QUESTIONS = 16


def _format(backing: Backing) -> str | None:
    """The format of the store that is there; None where nothing is.

    Raises:
        StoreError: something is there that is no store of a format that is known.
    """
    try:
        content = backing.read("zarr.json")
        if content is None:
            if backing.holds_anything():
                raise StoreError(backing.address, "not a tile store", "name the one that wsi-idc extract wrote")
            return None
        attributes = json.loads(content).get("attributes", {})
        found = attributes.get("format")
    except ObjectsError as error:
        raise StoreError(backing.address, str(error.strerror)) from error
    except OSError as error:
        raise StoreError(backing.address, f"cannot be read ({system_reason(error)})", "check the rights") from error
    except (ValueError, AttributeError, RecursionError) as error:
        advice = f"copy zarr.json back, or put attributes with the format {FORMAT!r} there"
        raise StoreError(backing.address, f"its zarr.json is damaged ({error})", advice) from error
    if found not in (FORMAT, *OLDER):
        what = "not a tile store" if found is None else f"a store of format {found!r}, this version reads {FORMAT!r}"
        raise StoreError(backing.address, what, "name another with --store, or use the version that wrote it")
    return str(found)


def find_store(address: str | Path) -> Store | None:
    """The store of this format or an older one, to be read; None where nothing is. Of an older one nothing is usable.

    Raises:
        StoreError: something else is there, or it cannot be read.
    """
    backing = backing_at(address)
    return None if _format(backing) is None else Store(backing)


def open_to_check(address: str | Path) -> Store:
    """A store to be read, also one whose own document is lost or damaged but whose lease says that it was one.

    Raises:
        StoreError: it does not exist, cannot be read, or has another format.
    """
    try:
        return open_store(address)
    except StoreError:
        backing = backing_at(address)
        if not _has_lost_its_document(backing):
            raise
        return Store(backing)


def _has_lost_its_document(backing: Backing) -> bool:
    try:
        return (
            bool(_fault(backing.read("zarr.json") or b"", None))
            and backing.read(f"{LEASE}/zarr.json") == (_DOCUMENTS[f"{LEASE}/zarr.json"])
        )
    except OSError:
        return False


def open_store(address: str | Path) -> Store:
    """A store that exists, to be read.

    Raises:
        StoreError: it does not exist, cannot be read, or has another format.
    """
    backing = backing_at(address)
    found = _format(backing)
    if found is None:
        raise StoreError(backing.address, "no such store", "run wsi-idc extract first, or name one with --store")
    if found in OLDER:
        advice = "run wsi-idc extract with its manifest: that brings it up to date, and cuts its slides again"
        raise StoreError(backing.address, f"a store of format {found!r}, {FORMAT!r} is needed", advice)
    return Store(backing)


@contextmanager
def hold_store(address: str | Path, *, create: bool = False, damaged: bool = False) -> Iterator[Store]:
    """A store, held for writing.

    Args:
        address: where it is.
        create: make it if there is none, and bring one of an older format up to date.
        damaged: hold one whose own document is lost, too: see `open_to_check`.

    Raises:
        StoreError: it does not exist, cannot be written, or has another format; or something else is there.
        StoreBusyError: another run holds it.
    """
    if not create:
        (open_to_check if damaged else open_store)(address)
    backing = backing_at(address)
    if not damaged:
        _format(backing)
    lease = backing.lease()
    lease.acquire()
    try:
        store, notes = Store(backing, Ticket(backing.everywhere, lease.nonce), lease), []
        found = FORMAT if damaged else _format(backing)
        if found in OLDER:
            notes.append(f"{address}: the store had format {found}; it is brought up to date, every slide is cut again")
        if found != FORMAT:
            try:
                store._make()
            except ObjectsError as error:
                raise StoreError(backing.address, str(error.strerror)) from error
            except OSError as error:
                problem = f"cannot be written ({system_reason(error)})"
                raise StoreError(backing.address, problem, "choose another --store") from error
        store.notes = tuple(notes)
        yield store
    finally:
        lease.release()


def admit(ticket: Ticket) -> Store:
    """The store, for a task of the run that holds it."""
    return Store(backing_at(ticket.address), ticket)
