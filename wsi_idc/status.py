"""What the store knows of each slide."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wsi_idc.errors import StoreDamageError
from wsi_idc.store import Store, at_once, open_store


@dataclass(frozen=True)
class SlideState:
    """One line of `wsi-idc status`.

    Attributes:
        slide_id: the slide.
        extracted: yes, failed, or no.
        tiles: number of tiles, as text; empty where not extracted.
        scored: the models whose map is there and made from these tiles.
        reason: why it failed; or which maps failed or are stale, and why.
    """

    slide_id: str
    extracted: str
    tiles: str
    scored: str
    reason: str

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "tiles": int(self.tiles) if self.tiles else None}


def slide_states(address: str | Path, names: Sequence[str] | None = None) -> list[SlideState]:
    """The state of the named slides, or of all in the store.

    Raises:
        StoreError: there is no such store.
    """
    store = open_store(address)
    models = store.models()
    return at_once(lambda name: _state(store, name, models), store.all_slide_ids() if names is None else names)


def _state(store: Store, name: str, models: Sequence[str]) -> SlideState:
    try:
        record, slide = store.look(name)
    except StoreDamageError as error:
        return SlideState(name, "failed", "", "", error.problem)
    if slide is None:
        return SlideState(name, "failed" if record.trouble else "no", "", "", record.failed or record.trouble)
    scored, reasons = [], []
    for model in models:
        state = store.map(model, name).state(slide)
        if state.kind == "current":
            scored.append(model)
        elif state.kind != "none":
            reasons.append(f"{model}: {state}")
    return SlideState(name, "yes", str(slide.count), ", ".join(scored), "; ".join(reasons))
