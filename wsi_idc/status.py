"""What the store knows of each slide, of all of them together, and of the run that writes it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from wsi_idc.console import duration
from wsi_idc.errors import StoreDamageError
from wsi_idc.flags import flags, of_record
from wsi_idc.results import needs_of
from wsi_idc.store import Holding, MapState, Store, StoredMap, StoredSlide, at_once, open_store

MapKind = Literal["none", "failed", "stale", "current"]


@dataclass(frozen=True)
class SlideState:
    """One slide of `wsi-idc status`.

    Attributes:
        slide_id: the slide.
        extracted: yes, failed, or no.
        tiles: number of tiles; None where not extracted.
        maps: model -> the state of its map, of the models that ever tried.
        trouble: why it is not extracted.
        warnings: what was told of it when it was cut, and should be seen before its map is believed.
        flags: what a person should look at, on it and on its current maps.
        listed: whether it is in the manifest; None where none was given.
    """

    slide_id: str
    extracted: Literal["yes", "failed", "no"]
    tiles: int | None = None
    maps: dict[str, MapState] = field(default_factory=dict)
    trouble: str = ""
    warnings: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    listed: bool | None = None

    @property
    def scored(self) -> list[str]:
        """The models whose map is there and made from these tiles."""
        return [model for model, state in self.maps.items() if state.kind == "current"]

    @property
    def failed(self) -> bool:
        """Whether its tiles or a map failed."""
        return self.extracted == "failed" or any(state.kind == "failed" for state in self.maps.values())

    @property
    def why(self) -> str:
        """All that is to be said of it besides the figures, as a user reads it."""
        unlisted = ["no longer in the manifest"] if self.listed is False else []
        maps = [f"{model}: {state}" for model, state in self.maps.items() if state.kind in ("failed", "stale")]
        warnings = [f"warning: {warning}" for warning in self.warnings]
        flagged = [f"flag: {flag}" for flag in self.flags]
        return "; ".join([*unlisted, *filter(None, [self.trouble]), *maps, *warnings, *flagged])

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        maps = {model: asdict(state) for model, state in self.maps.items()}
        return {**asdict(self), "maps": maps, "scored": ", ".join(self.scored), "reason": self.why}


@dataclass(frozen=True)
class StoreState:
    """What `wsi-idc status` shows.

    Attributes:
        slides: each slide: those of the manifest in its order, then what the store has besides.
        models: every model with maps in the store.
        holding: the run that writes it, or did when it was killed; None where none does.
    """

    slides: Sequence[SlideState]
    models: Sequence[str]
    holding: Holding | None

    @property
    def counted(self) -> list[SlideState]:
        """The slides that the totals are of: not those that left the manifest."""
        return [state for state in self.slides if state.listed is not False]

    @property
    def failed(self) -> bool:
        """Whether tiles or a map of any of them failed."""
        return any(state.failed for state in self.counted)

    def totals(self) -> dict[str, Any]:
        """Numbers of slides, tiles and maps, by what became of them."""
        slides = self.counted
        extracted = Counter(state.extracted for state in slides)
        maps: dict[str, Counter[MapKind]] = {
            model: Counter(state.maps[model].kind if model in state.maps else "none" for state in slides)
            for model in self.models
        }
        kinds: tuple[MapKind, ...] = ("current", "stale", "failed", "none")
        return {
            "slides": len(slides),
            "extracted": extracted["yes"],
            "failed": extracted["failed"],
            "not_extracted": extracted["no"],
            "tiles": sum(state.tiles or 0 for state in slides),
            "with_warnings": sum(bool(state.warnings) for state in slides),
            "flagged": sum(bool(state.flags) for state in slides),
            "unlisted": len(self.slides) - len(slides),
            "maps": {model: {kind: counts[kind] for kind in kinds} for model, counts in maps.items()},
        }

    def lines(self) -> list[str]:
        """The totals, and the run in progress, as a user reads them."""
        totals = self.totals()
        count = totals["slides"]
        first = (
            f"{count:,} slide{'s' if count != 1 else ''}: "
            f"{totals['extracted']:,} extracted ({totals['tiles']:,} tiles), {totals['failed']:,} failed, "
            f"{totals['not_extracted']:,} not yet; {totals['with_warnings']:,} with warnings, "
            f"{totals['flagged']:,} flagged"
        )
        found = [first]
        for model, kinds in totals["maps"].items():
            found.append(f"maps by {model}: {', '.join(f'{number:,} {kind}' for kind, number in kinds.items())}")
        if totals["unlisted"]:
            found.append(f"{totals['unlisted']:,} more no longer in the manifest: wsi-idc prune removes them")
        if self.holding is not None:
            found.append(run_line(self.holding))
        return found


def run_line(holding: Holding, now: datetime | None = None) -> str:
    """The run that writes a store, or was killed: who, since when, how far."""
    if holding.alive is False:
        return f"a run was killed ({holding}): {holding.how}; the next run takes its place"
    does = holding.does
    words = f"{does['command']} is running" if "command" in does else "a run holds the store"
    if holding.alive is None:
        words = f"{words}, or was killed"
    line = f"{words} ({holding})"
    total, done, failed = (does.get(name) for name in ("slides", "done", "failed"))
    if not (isinstance(total, int) and isinstance(done, int) and isinstance(failed, int)):
        return line
    line = f"{line}: {done + failed:,} of {total:,} slides, {failed:,} failed"
    return f"{line}{_left(holding.since, (done + failed) / total if total else 0, now or datetime.now(UTC))}"


def _left(since: str, share: float, now: datetime) -> str:
    try:
        seconds = (now - datetime.fromisoformat(since)).total_seconds() * (1 / share - 1)
    except (ValueError, TypeError, ZeroDivisionError):
        return ""
    return f", about {duration(seconds)} left" if seconds > 0 else ""


def holding_fields(holding: Holding) -> dict[str, Any]:
    """A run that holds the store, for JSON."""
    return {**asdict(holding), "does": dict(holding.does), "line": run_line(holding)}


def store_state(address: str | Path, listed: Sequence[str] | None = None) -> StoreState:
    """The state of every slide of the store, and of those of a manifest that it does not know.

    Args:
        address: the store's.
        listed: the slide ids of the manifest, in its order; None: the store's slides alone.

    Raises:
        StoreError: there is no such store.
    """
    store = open_store(address)
    models, stored = store.models(), store.all_slide_ids()
    known = set(listed or ())
    names = stored if listed is None else [*listed, *(name for name in stored if name not in known)]
    needs = {model: needs_of(model) for model in models}
    states = at_once(lambda name: _state(store, name, needs, None if listed is None else name in known), names)
    return StoreState(states, models, store.holding)


def _state(
    store: Store, name: str, needs: Mapping[str, Sequence[Mapping[str, Any]]], listed: bool | None
) -> SlideState:
    try:
        record, slide = store.look(name)
    except StoreDamageError as error:
        return SlideState(name, "failed", trouble=error.problem, listed=listed)
    if slide is None:
        extracted: Literal["failed", "no"] = "failed" if record.trouble else "no"
        return SlideState(name, extracted, trouble=record.failed or record.trouble, listed=listed)
    stored = {model: store.map(model, name) for model in needs}
    states = {model: found.state(slide, needs[model]) for model, found in stored.items()}
    maps = {model: state for model, state in states.items() if state.kind != "none"}
    told = record.attributes.get("warnings")
    warnings = tuple(map(str, told)) if isinstance(told, list) else ()
    return SlideState(
        name, "yes", slide.count, maps, warnings=warnings, flags=_flags(slide, stored, states), listed=listed
    )


def _flags(slide: StoredSlide, maps: Mapping[str, StoredMap], states: Mapping[str, MapState]) -> tuple[str, ...]:
    """The suspicious flags of a slide and of its current maps, each once."""
    found = [flag for flag in flags(slide) if flag.suspicious]
    current = [model for model, state in states.items() if state.kind == "current"]
    return tuple(dict.fromkeys(map(str, [*found, *(flag for model in current for flag in of_record(maps[model]))])))
