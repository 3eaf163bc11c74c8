"""A model's map of a slide in the store, and the one answer to whether it is current."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsi_idc.plan import Plan, changes, plan
from wsi_idc.store.node import Node, Record

if TYPE_CHECKING:
    from wsi_idc.store.slide import StoredSlide


@dataclass(frozen=True)
class MapState:
    """Whether a map can be used for what a slide and a model are now.

    Attributes:
        kind: none, failed, stale or current.
        why: the reason, where it is failed or stale.
    """

    kind: Literal["none", "failed", "stale", "current"]
    why: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.why})" if self.why else self.kind


class StoredMap:
    """A slide's map by one model."""

    def __init__(self, node: Node, record: Record) -> None:
        self.node, self.record = node, record

    @property
    def attributes(self) -> Mapping[str, Any]:
        """What is known of the map."""
        return self.record.attributes

    def state(self, slide: "StoredSlide | None", needs: Sequence[Mapping[str, Any]] = ()) -> MapState:
        """Whether the map is that of these tiles by this model.

        Args:
            slide: its tiles; None where they are not complete.
            needs: what the model's forms make maps from (`LoadedBundle.made_from`): a map by any of them is current.
                Empty: any model's, so that only the tiles count.
        """
        record = self.record
        if record.failed is not None:
            return MapState("failed", record.failed)
        if record.trouble:
            return MapState("stale", record.trouble)
        if record.made_from is None:
            return MapState("none")
        if slide is None:
            return MapState("stale", "the slide's tiles are not complete")
        found = [changes({"tiles": slide.identity, **need}, record.made_from) for need in (needs or [{}])]
        fewest = min(found, key=len)
        return MapState("stale", f"{' and '.join(fewest)} changed") if fewest else MapState("current")

    def plan(self, slide: "StoredSlide", need: Mapping[str, Any], *, force: bool) -> Plan:
        """What to do with the map, for one form of a model."""
        record = self.record
        return plan({"tiles": slide.identity, **need}, record.made_from, record.trouble, force=force)

    def read(self, name: str) -> NDArray[np.float32]:
        """An array of the map, checked: `probability`, `alone` or `0` (the image).

        Raises:
            StoreDamageError: it is not what was written.
        """
        checksums = (self.record.complete or {}).get("checksums")
        expected = checksums.get(name) if isinstance(checksums, dict) else None
        if not isinstance(expected, str):
            raise self.node.damaged(name, "its checksum is not in the record")
        return self.node.read(name, expected)

    def has(self, name: str) -> bool:
        """Whether the map holds that array."""
        return name in (self.record.complete or {}).get("checksums", {})
