"""One group of the store, of a slide or of a map, and the rule that it lives by.

A result exists when the group's attributes hold the record `complete`, which is put in place last, by one atomic write
of the group's `zarr.json`, after every array is whole and flushed. Anything else is invisible to readers and is cleared
by the next run. A failure is kept in the record `failed`; it hides an older result, and the next success removes it.
"""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec
from zarr.errors import ContainsArrayError

from wsi_idc.digests import checksum
from wsi_idc.errors import OvertakenError, StoreDamageError
from wsi_idc.store.backing import Backing

FORMAT = "wsi-idc-store/2"
"""Of the store, and of each record in it: a store that is brought up to date holds older ones until they are redone."""


def compressors() -> tuple[ZstdCodec]:
    """How arrays are packed. Level 3, zarr's choice, takes twice the time, and 1 % less room for real tiles."""
    return (ZstdCodec(level=1),)


def group_document(attributes: Mapping[str, Any]) -> bytes:
    """The `zarr.json` of a Zarr v3 group with these attributes."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
    return json.dumps(document, indent=2, allow_nan=False).encode()


@dataclass(frozen=True)
class Record:
    """What one group of the store says of itself.

    Attributes:
        attributes: the group's attributes; empty where there is no group, or one that cannot be read.
        damage: why the group's metadata cannot be read; empty where they can.
    """

    attributes: Mapping[str, Any] = field(default_factory=dict)
    damage: str = ""

    @property
    def complete(self) -> dict[str, Any] | None:
        """The record of a whole result of this format, also of one that a later failure hides."""
        complete = self.attributes.get("complete")
        return complete if isinstance(complete, dict) and complete.get("format") == FORMAT else None

    @property
    def made_from(self) -> dict[str, Any] | None:
        """What the whole result was made from, by name; None where there is none."""
        made_from = (self.complete or {}).get("made_from")
        return made_from if isinstance(made_from, dict) else None

    @property
    def attempt(self) -> str:
        """Which attempt to make the result this is; "" where that is not known."""
        return str(self.attributes.get("attempt", ""))

    @property
    def failed(self) -> str | None:
        """Why the last attempt failed, or None."""
        reason = self.attributes.get("failed")
        return None if reason is None else str(reason)

    @property
    def usable(self) -> bool:
        """Whether readers may see the result."""
        return self.complete is not None and self.failed is None

    @property
    def trouble(self) -> str:
        """Why a result that was here cannot be used, as a plan or a status says it; empty where nothing hinders."""
        if self.damage:
            return f"its metadata are damaged ({self.damage})"
        if self.failed is not None:
            return "failed last time"
        if "complete" in self.attributes and self.complete is None:
            return "made by an older version of the store's format"
        return ""


class Node:
    """One group of the store: read as it is asked for, written by the rule above.

    Args:
        backing: what the store lies on.
        path: the group's key.
        again: the command that makes it anew, for messages.
        may_write: raises where the run whose task this is no longer holds the store; None: to be read only.
    """

    def __init__(self, backing: Backing, path: str, again: str, may_write: Callable[[], None] | None = None) -> None:
        self.backing, self.path, self.again = backing, path, again
        self._may_write = may_write

    @property
    def name(self) -> str:
        """The last part of the path: a slide's id."""
        return self.path.rpartition("/")[2]

    @cached_property
    def _zarr(self) -> Any:
        return self.backing.zarr(read_only=self._may_write is None)

    @property
    def _key(self) -> str:
        return f"{self.path}/zarr.json"

    def _check(self) -> None:
        if self._may_write is None:
            raise RuntimeError(f"{self.path} was opened to be read")
        self._may_write()

    def record(self) -> Record:
        """What the group says of itself, read afresh."""
        content = self.backing.read(self._key)
        if content is None:
            return Record()
        try:
            document = json.loads(content)
            if document["zarr_format"] != 3 or document["node_type"] != "group":
                return Record(damage="not a Zarr v3 group")
            attributes = document.get("attributes", {})
            return Record(attributes) if isinstance(attributes, dict) else Record(damage="attributes are no object")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return Record(damage=f"zarr.json: {type(error).__name__}: {error}")

    def begin(self) -> str:
        """Clear what an earlier run left: first out of sight, then for good.

        Returns:
            a name for this attempt: `commit` wants it, and refuses when the group was begun again since.

        Raises:
            StoreBusyError: another run has taken the store over.
        """
        self.remove()
        attempt = uuid.uuid4().hex
        self.backing.write(self._key, group_document({"attempt": attempt}))
        return attempt

    def remove(self) -> None:
        """Remove the group and all below it: first out of sight, then for good.

        Raises:
            StoreBusyError: another run has taken the store over.
        """
        self._check()
        self.backing.delete(self._key)
        self.backing.delete(self.path)

    def check(self, attempt: str) -> None:
        """Ask, before much is written, whether it still is this attempt's to write: a task of a run that was killed
        goes on where it runs, and another run may have begun the group since.

        Raises:
            StoreBusyError: another run has taken the store over.
            OvertakenError: another task has begun the group again.
        """
        self._check()
        if self.record().attempt != attempt:
            raise OvertakenError(self.name, "another task began it again")

    def create(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: Any,
        *,
        axes: Sequence[str],
        chunks: tuple[int, ...],
        shards: tuple[int, ...] | None = None,
    ) -> zarr.Array[Any]:
        """Make an empty array, missing values being NaN or 0, its axes named.

        One that is there already stays: the same task, begun again because its worker was lost, writes the same.
        """
        fill = float("nan") if np.issubdtype(np.dtype(dtype), np.floating) else 0
        place = f"{self.path}/{name}"
        try:
            return zarr.create_array(
                self._zarr,
                name=place,
                shape=shape,
                dtype=dtype,
                chunks=chunks,
                shards=shards,
                compressors=compressors(),
                fill_value=fill,
                dimension_names=axes,
                zarr_format=3,
            )
        except ContainsArrayError:
            return zarr.open_array(self._zarr, path=place, mode="r+", zarr_format=3)

    def put(self, name: str, values: NDArray[Any], axes: Sequence[str]) -> str:
        """Make an array that is written at once, as one chunk; gives its checksum."""
        chunks = tuple(max(1, side) for side in values.shape)
        array = self.create(name, values.shape, values.dtype, axes=axes, chunks=chunks)
        if values.size:
            empty = np.isnan(values).all() if np.issubdtype(values.dtype, np.floating) else not values.any()
            # zarr leaves out a chunk of nothing but the missing value, and takes three times the packing to find it.
            array.with_config({"write_empty_chunks": not empty})[...] = values
        return checksum(values)

    def array(self, name: str, *, writable: bool = False) -> zarr.Array[Any]:
        """An array of the group, whose values nobody has checked.

        Raises:
            StoreDamageError: it is not there, or its metadata cannot be read.
        """
        with self.reading(name):
            return zarr.open_array(
                self._zarr, path=f"{self.path}/{name}", mode="r+" if writable else "r", zarr_format=3
            )

    def read(self, name: str, expected: str) -> NDArray[Any]:
        """A whole array, checked.

        Args:
            name: the array.
            expected: its checksum, as the record has it.

        Raises:
            StoreDamageError: it is not what was written.
        """
        array = self.array(name)
        with self.reading(name):
            values = np.asarray(array[...])
        if checksum(values) != expected:
            raise self.damaged(name, "it is not what was written")
        return values

    def reading(self, name: str) -> "_Reading":
        """Around reads of an array: what a damaged array makes zarr raise becomes a `StoreDamageError`."""
        return _Reading(self, name)

    def damaged(self, name: str, problem: str) -> StoreDamageError:
        """The error that says so."""
        return StoreDamageError(
            f"{self.path}/{name}", f"the store is damaged there: {problem}", f"run {self.again} again"
        )

    def commit(self, attributes: Mapping[str, Any], attempt: str) -> None:
        """Make the result visible: `attributes`, with `complete` in it, in one atomic write after all else is flushed.

        The record is marked with the format, the group with the time.

        Args:
            attributes: the group's.
            attempt: what `begin` gave.

        Raises:
            StoreBusyError: another run has taken the store over.
            OvertakenError: another task has begun the group again: its arrays may be half written by now.
        """
        complete = {"format": FORMAT, **attributes["complete"]}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        document = group_document({**attributes, "attempt": attempt, "committed": now, "complete": complete})
        self.backing.flush(self.path)
        self._check()
        begun = group_document({"attempt": attempt})
        # The same task may have committed before, and its worker died before it could say so.
        if not self.backing.replace(self._key, begun, document) and self.record().attempt != attempt:
            raise OvertakenError(self.name, "another task began it again")

    def update(self, attributes: Mapping[str, Any]) -> None:
        """Replace some attributes of a result that stays as it is."""
        self._check()
        kept = self.record().attributes
        self.backing.write(self._key, group_document({**kept, **attributes}))

    def fail(self, reason: str) -> None:
        """Keep why the last attempt failed; an older result is kept beside it, out of readers' sight.

        What a broken attempt left is removed: on a full disk the next slides need the room.
        """
        self._check()
        kept = {name: value for name, value in self.record().attributes.items() if name != "attempt"}
        if "complete" not in kept:
            self.backing.delete(self.path)
        self.backing.write(self._key, group_document({**kept, "failed": reason}))


class _Reading:
    """See `Node.reading`."""

    def __init__(self, node: Node, name: str) -> None:
        self._node, self._name = node, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # Memory that ran out, or a disk that cannot be read, says nothing of what is written there.
        system = isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError)
        if isinstance(error, Exception) and not system and not isinstance(error, MemoryError | StoreDamageError):
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise self._node.damaged(self._name, line) from error
