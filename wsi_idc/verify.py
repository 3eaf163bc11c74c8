"""Whether the store is what was written: every array read, against its record, its metadata and what it was made from.

Nothing is believed but the records, which have checksums of all the rest and none of themselves: they are held against
each other. Reading needs no lease, so a slide that is done again meanwhile is looked at again. Repairing does, and then
looks once more at what it is about to remove.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import ObjectsError, StoreBusyError, StoreDamageError, UsageError, system_reason
from wsi_idc.model.bundle import of_class
from wsi_idc.names import check_slide_id
from wsi_idc.results import STRONGEST_TILES, limited
from wsi_idc.store import Node, Record, Store, StoredMap, StoredSlide, hold_store, open_to_check
from wsi_idc.store.slide import identity, pixels_from
from wsi_idc.work.jobs import Listener, Outcome

Kind = Literal["damage", "unreadable", "leftover", "begun", "note"]
_PER_TILE = {"tissue": np.float32, "idc": np.float32, "blur": np.float32, "pen": np.float32}
_THREADS = 4
"""Slides that are read at once; each holds a chunk of tiles, about 1 MiB, and its small arrays."""
_TRIES = 3
"""At a slide that is done again while it is read."""


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    Attributes:
        kind: damage: not what was written, or not what belongs there. unreadable: the system does not give it, which
            says nothing of what is there. leftover: files that no record names, which nobody reads. begun: a result
            that was never finished. note: what else should be known.
        key: where in the store.
        problem: what is wrong.
        slide: whose it is; empty for what is no slide's.
        model: whose map it is of; empty for what is no map's.
    """

    kind: Kind
    key: str
    problem: str
    slide: str = ""
    model: str = ""

    @property
    def bad(self) -> bool:
        """Whether the store is not sound there."""
        return self.kind in ("damage", "unreadable")

    def __str__(self) -> str:
        return f"{self.key}: {self.problem}"


@dataclass(frozen=True)
class Verified:
    """What was read, what was found, and what was done about it.

    Attributes:
        slides, maps: number of complete ones that were read.
        findings: in the order of their keys.
        repairs: a line for each thing that was removed or put back.
        seconds: of wall time.
    """

    slides: int
    maps: int
    findings: Sequence[Finding]
    repairs: Sequence[str] = ()
    seconds: float = 0.0

    def count(self, *kinds: Kind) -> int:
        """Number of findings of these kinds."""
        return sum(finding.kind in kinds for finding in self.findings)


@dataclass
class _Read:
    """What became of one slide and its maps."""

    slides: int = 0
    maps: int = 0
    tiles: int = 0
    findings: list[Finding] = field(default_factory=list)


def verify(
    address: str | Path,
    *,
    only: Sequence[str] = (),
    model: str = "",
    repair: bool = False,
    listener: Callable[[Sequence[str]], Listener],
) -> Verified:
    """Read every complete slide and map, and tell what is not as it was written.

    Args:
        address: the store's.
        only: slide ids to which it is limited; all where empty.
        model: of which maps are read; all where empty.
        repair: remove what is damaged or left over, so that the next run does it again: a damaged slide is hidden and
            marked as failed with the reason, a damaged map removed, a damaged document of the store written anew. What
            the system does not give is left alone.
        listener: is given the slides that will be read, and gives back what is told of their progress.

    Raises:
        UsageError: one of `only`, or `model`, is not in the store.
        StoreError: there is no such store.
        StoreBusyError: it is to be repaired, and another run holds it.
        ObjectsError: the object store does not answer.
    """
    start = time.monotonic()
    store = open_to_check(address)
    models = _models(store, model)
    names = _names(store, models, only)
    found = _store_findings(store)
    slides = maps = 0
    told = listener(names)
    with ThreadPoolExecutor(_THREADS) as executor:
        futures = {executor.submit(_settled, store, name, models, told): name for name in names}
        try:
            for future in as_completed(futures):
                name, read = futures[future], future.result()
                slides, maps = slides + read.slides, maps + read.maps
                found += read.findings
                bad = "; ".join(str(finding) for finding in read.findings if finding.bad)
                told.ended(name, Outcome("failed", reason=bad) if bad else Outcome("done", tiles=read.tiles))
        finally:
            executor.shutdown(cancel_futures=True)
    found.sort(key=lambda finding: finding.key)
    repairs = _repaired(address, models, found) if repair else []
    return Verified(slides, maps, found, repairs, time.monotonic() - start)


def _models(store: Store, model: str) -> list[str]:
    models = store.models()
    if model and model not in models:
        raise UsageError("--model", f"the store has no maps by {model!r}", f"it has {', '.join(models) or 'none'}")
    return [model] if model else models


def _names(store: Store, models: Sequence[str], only: Sequence[str]) -> list[str]:
    """The slides that are looked at, with those that only have a map."""
    mapped = itertools.chain.from_iterable(store.mapped_slide_ids(model) for model in models)
    return limited(sorted({*store.all_slide_ids(), *mapped}), only)


def _store_findings(store: Store) -> list[Finding]:
    """Of what is no slide's: documents that every store has, and what lies where nothing of ours does."""
    found = [Finding("damage", key, problem) for key, problem in store.faulty_documents().items()]
    backing, holding = store.backing, store.holding
    idle = holding is None or holding.alive is False
    for prefix, known in (("", ("slides", "maps", "lease")), ("slides", None), ("maps", None)):
        within = f"{prefix}/" if prefix else ""
        for name in backing.objects(prefix):
            if name != "zarr.json":
                found += _stray(f"{within}{name}", idle=idle)
        for name in backing.folders(prefix):
            wrong = check_slide_id(name) if known is None else None if name in known else "it is not the store's"
            if wrong:
                found.append(Finding("note", f"{within}{name}", f"nothing of the store: {wrong}; it is left alone"))
    for model in store.models():
        for name in backing.objects(f"maps/{model}"):
            if name != "zarr.json":
                found += _stray(f"maps/{model}/{name}", idle=idle)
    if idle:
        kept = ("zarr.json", "lock", "holder.json")
        strays = [name for name in backing.objects("lease") if name not in kept]
        found += [Finding("leftover", f"lease/{name}", "left by a run that was killed") for name in strays]
    return found


def _stray(key: str, *, idle: bool) -> list[Finding]:
    """An object beside the groups: ours where it is half a file, which a run may be writing, and else somebody's."""
    if not key.endswith((".part", ".partial")):
        return [Finding("note", key, "nothing of the store; it is left alone")]
    return [Finding("leftover", key, "half a file, left by a run that was killed")] if idle else []


def _settled(store: Store, name: str, models: Sequence[str], told: Listener) -> _Read:
    """What is found in a slide and its maps, where none of them was written meanwhile."""
    nodes = [store.slide_node(name), *(store.map_node(model, name) for model in models)]
    for _ in range(_TRIES):
        before = [node.record() for node in nodes]
        read = _read(store, name, models, lambda tiles: told.advanced(name, tiles))
        if not any(finding.bad or finding.kind == "leftover" for finding in read.findings):
            return read
        if [node.record() for node in nodes] == before:
            return read
    note = Finding("note", f"slides/{name}", "a run is writing it: look again when that has ended", name)
    return _Read(findings=[note])


def _read(store: Store, name: str, models: Sequence[str], advanced: Callable[[int], None]) -> _Read:
    """What is found in a slide and its maps."""
    read = _Read()
    node = store.slide_node(name)
    slide: StoredSlide | None = None
    with _told(read, node, name):
        record = node.record()
        read.findings += _about(store, node, record, name)
        if record.usable:
            slide = StoredSlide(node, record)
            read.slides += 1
            for part in _slide_parts(slide, advanced):
                with _told(read, node, name):
                    part()
            read.tiles = slide.count
    # What is wrong with the tiles is no damage of their maps.
    sound = not any(finding.bad for finding in read.findings)
    for model in models:
        node = store.map_node(model, name)
        with _told(read, node, name, model):
            record = node.record()
            read.findings += _about(store, node, record, name, model)
            if record.usable:
                read.maps += 1
                _check_map(StoredMap(node, record), slide if sound else None, read.findings, model)
    return read


@contextlib.contextmanager
def _told(read: _Read, node: Node, slide: str, model: str = "") -> Iterator[None]:
    """Around reads: damage, and what the system does not give, become findings."""
    try:
        yield
    except StoreDamageError as error:
        problem = error.problem.removeprefix("the store is damaged there: ")
        read.findings.append(Finding("damage", error.subject, problem, slide, model))
    except ObjectsError:
        raise  # It is about the place as a whole.
    except OSError as error:
        read.findings.append(Finding("unreadable", node.path, f"cannot be read: {system_reason(error)}", slide, model))
    except MemoryError:
        problem = "takes more memory than there is; or the sizes that it says are wrong"
        read.findings.append(Finding("unreadable", node.path, problem, slide, model))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        problem = f"its record makes no sense ({type(error).__name__}: {error})"
        read.findings.append(Finding("damage", f"{node.path}/zarr.json", problem, slide, model))


def _about(store: Store, node: Node, record: Record, slide: str, model: str = "") -> list[Finding]:
    """What a group's record, and the files beside it, say without any array being read."""
    document = f"{node.path}/zarr.json"
    if record.damage:
        return [Finding("damage", document, record.damage, slide, model)]
    keys = [key for key in store.backing.keys(node.path) if key != document]
    if "complete" not in record.attributes:
        if record.failed is None and ("attempt" in record.attributes or keys):
            return [_begun(store, node, slide, model)]
        return _leftovers(node, keys, {}, slide, model)
    if record.complete is None:
        return [Finding("note", node.path, f"{record.trouble}: it is not read", slide, model)]
    known = record.complete.get("checksums")
    if isinstance(known, dict) and record.made_from is not None:
        return _leftovers(node, keys, known, slide, model)
    if record.failed is not None:
        return []  # Nobody sees it, and the next run does it again.
    return [Finding("damage", document, "its record lacks what every result has", slide, model)]


def _begun(store: Store, node: Node, slide: str, model: str) -> Finding:
    holding = None if store.held else store.holding
    if holding is not None and holding.alive is not False:
        return Finding("note", node.path, f"begun, and not finished yet ({holding})", slide, model)
    return Finding("begun", node.path, "begun, and never finished: a run was killed", slide, model)


_ARRAYS = frozenset(
    [
        *("tiles", "position", "cell", "tissue", "idc", "blur", "pen", "thumbnail", "tissue_mask"),
        *("0", "probability", "alone", "strongest"),
    ]
)
"""Names of arrays that a group can have: what lies elsewhere is somebody else's, and is left alone."""


def _leftovers(node: Node, keys: Sequence[str], known: dict[str, Any], slide: str, model: str) -> list[Finding]:
    """Files of a group that are no part of an array that its record names."""
    named = {f"{node.path}/{name}/zarr.json" for name in known}
    for name in known:
        within = f"{node.path}/{name}/"
        mine = [key for key in keys if key.startswith(within)]
        try:
            document = json.loads(node.backing.read(f"{within}zarr.json") or b"")
            sides = document["chunk_grid"]["configuration"]["chunk_shape"]
            counts = [-(-length // side) for length, side in zip(document["shape"], sides, strict=True)]
            named.update(key for key in mine if _is_chunk(key.removeprefix(within), counts))
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            # Found where it is read; which files were its own nobody can say.
            named.update(mine)
    found = []
    for key in sorted(set(keys) - named):
        # In an object store an object can have the name of what others lie below, and would be removed with them.
        below = any(other.startswith(f"{key}/") for other in named)
        array, _, rest = key.removeprefix(f"{node.path}/").partition("/")
        ours = key.endswith(".part") or (bool(rest) and array in _ARRAYS)
        kind: Kind = "leftover" if ours and not below else "note"
        found.append(Finding(kind, key, "no record names it", slide, model))
    return found


def _is_chunk(key: str, counts: Sequence[int]) -> bool:
    """Whether a key below an array is a chunk's, of so many along each axis: "c/0/3"."""
    first, *places = key.split("/")
    if first != "c" or len(places) != len(counts) or not all(map(str.isdecimal, places)):
        return False
    return all(str(int(place)) == place and int(place) < count for place, count in zip(places, counts, strict=True))


def _slide_parts(slide: StoredSlide, advanced: Callable[[int], None]) -> Iterator[Callable[[], None]]:
    """Checks of a slide's arrays, each of which raises a `StoreDamageError` for one array."""
    node, count = slide.node, slide.count

    def per_tile(name: str, dtype: Any) -> None:
        _expect(node, name, getattr(slide, name), (count,), dtype)

    def places() -> None:
        cell = slide.cell
        _expect(node, "cell", cell, (count, 2), np.int32)
        rows, columns = slide.grid.shape
        if len(cell) and (cell.min() < 0 or cell[:, 0].max() >= rows or cell[:, 1].max() >= columns):
            raise node.damaged("cell", f"cells lie outside the grid of {rows} x {columns}")
        if len(np.unique(cell, axis=0)) != count:
            raise node.damaged("cell", "a cell is there twice")
        position = slide.position
        _expect(node, "position", position, (count, 2), np.int32)
        if not np.array_equal(position, slide.grid.position(cell)):
            raise node.damaged("position", "positions are not those of the cells")

    def pictures() -> None:
        thumbnail, mask = slide.thumbnail, slide.tissue_mask
        _expect(node, "thumbnail", thumbnail, (*thumbnail.shape[:2], 3), np.uint8)
        _expect(node, "tissue_mask", mask, thumbnail.shape[:2], np.bool_)

    def record() -> None:
        known = slide.attributes["complete"]
        checksums = known["checksums"]
        pixels = checksums["tiles"] if slide.has_pixels else pixels_from(slide.made_from)
        if slide.identity != identity(slide.spec, slide.mpp, checksums.get("cell", ""), pixels):
            raise node.damaged("zarr.json", "its identity is not that of its cells and checksums")
        if list(known.get("grid", slide.grid.shape)) != list(slide.grid.shape):
            raise node.damaged("zarr.json", f"its grid is {known['grid']}, its size gives {list(slide.grid.shape)}")
        if bool(slide.made_from.get("pixels", slide.has_pixels)) != slide.has_pixels:
            raise node.damaged("zarr.json", "whether it has pixels is said in two ways")

    def tiles() -> None:
        for some in slide.read_tiles():
            advanced(len(some))

    yield record
    yield places
    for name, dtype in _PER_TILE.items():
        yield lambda name=name, dtype=dtype: per_tile(name, dtype)  # type: ignore[misc]
    yield pictures
    if slide.has_pixels:
        yield tiles
    known = slide.attributes["complete"]["checksums"]
    for name in sorted(set(known) - {*_PER_TILE, "cell", "position", "thumbnail", "tissue_mask", "tiles"}):
        yield lambda name=name: node.read(name, known[name])  # type: ignore[misc]


def _expect(node: Node, name: str, values: NDArray[Any], shape: tuple[int, ...], dtype: Any) -> None:
    if values.shape != shape or values.dtype != dtype:
        found = f"{values.dtype} {values.shape}"
        raise node.damaged(name, f"it is {found}, {np.dtype(dtype)} {shape} is recorded")


def _check_map(stored: StoredMap, slide: StoredSlide | None, findings: list[Finding], model: str) -> None:
    """Read a map, and hold it against its tiles, where it is of those that are there.

    Raises:
        StoreDamageError: it is damaged.
    """
    node, complete = stored.node, stored.record.complete or {}
    probability, image = stored.read("probability"), stored.read("0")
    count = complete.get("tiles")
    if len(probability) != count:
        raise node.damaged("probability", f"it has {len(probability)} tiles, {count} are recorded")
    if not ((probability >= 0) & (probability <= 1)).all():
        raise node.damaged("probability", "it has values that are no probabilities")
    if stored.has("alone"):
        _expect(node, "alone", stored.read("alone"), probability.shape, np.float32)
    for name in ("blur", "pen"):
        if stored.has(name):
            _expect(node, name, stored.read(name), (count,), _PER_TILE[name])
    if stored.has("strongest"):
        pixels = stored.read("strongest")
        _expect(node, "strongest", pixels, (min(STRONGEST_TILES, count), *pixels.shape[1:]), np.uint8)
    for name in sorted(set(complete["checksums"]) - {"0", "probability", "alone", "blur", "pen", "strongest"}):
        stored.read(name)
    state = stored.state(slide)
    if slide is None or state.kind != "current":
        why = state if slide is not None else "there are no sound tiles"
        findings.append(Finding("note", node.path, f"not held against its tiles: {why}", node.name, model))
        return
    _expect(node, "probability", probability, (slide.count, *probability.shape[1:]), np.float32)
    _expect(node, "0", image, (*probability.shape[1:], *slide.grid.shape), np.float32)
    if not np.array_equal(slide.grid.image(slide.cell, probability), image, equal_nan=True):
        raise node.damaged("0", "it is not its probabilities at the tiles' cells")
    made_from = stored.record.made_from or {}
    positive, classes, threshold = (made_from.get(name) for name in ("positive class", "classes", "threshold"))
    if isinstance(classes, list) and positive in classes and threshold is not None:
        found = int((of_class(probability, classes.index(positive)) >= threshold).sum())
        if found != complete.get("positive"):
            problem = f"{complete.get('positive')} tiles from the threshold on are recorded, there are {found}"
            raise node.damaged("zarr.json", problem)


def _repaired(address: str | Path, models: Sequence[str], found: Sequence[Finding]) -> list[str]:
    """Remove what is damaged or left over; gives what was done.

    Raises:
        StoreBusyError: another run holds the store.
    """
    wrong = [finding for finding in found if finding.kind in ("damage", "leftover", "begun")]
    if not wrong:
        return []
    done = []
    with hold_store(address, damaged=True) as store:
        for key in store.faulty_documents():
            store.mend(key)
            done.append(f"{key}: written anew")
        loose = [finding.key for finding in wrong if finding.kind == "leftover" and not finding.slide]
        done += [_drop(store, key) for key in loose]
        for name in sorted({finding.slide for finding in wrong if finding.slide}):
            # What is removed was looked at with the lease held.
            read = _read(store, name, models, lambda tiles: None)
            done += _mended(store, name, read.findings)
    return done


def _mended(store: Store, name: str, findings: Sequence[Finding]) -> list[str]:
    done = []
    for model in ("", *store.models()):
        mine = [finding for finding in findings if finding.model == model]
        node = store.map_node(model, name) if model else store.slide_node(name)
        damage = [finding for finding in mine if finding.kind == "damage"]
        if damage and not model:
            node.fail("; ".join(f"damaged in the store: {finding}" for finding in damage))
            done.append(f"{node.path}: hidden as failed, the next extract cuts it again")
        elif damage:
            node.remove()
            done.append(f"{node.path}: removed, the next infer makes it again")
        elif any(finding.kind == "begun" for finding in mine):
            node.remove()
            done.append(f"{node.path}: removed, it was never finished")
        if not any(finding.kind == "begun" for finding in mine) and not (damage and model):
            done += [_drop(store, finding.key) for finding in mine if finding.kind == "leftover"]
    return done


def _drop(store: Store, key: str) -> str:
    if not store.held:
        raise StoreBusyError(store.address, "another run has taken the store over", "nothing more is removed")
    store.backing.delete(key)
    return f"{key}: removed"
