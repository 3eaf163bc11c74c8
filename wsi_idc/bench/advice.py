"""From figures to sentences: what binds, how to run here, and how long it will take. Nothing is measured here.

Work is counted in seconds of a core, measured in one thread. A run shares its cores between slides that are cut, two at
a time in one process and one in each worker process, and slides that are scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from wsi_idc.bench.figures import Figure, What, amount
from wsi_idc.console import duration
from wsi_idc.extract import OVERLAP

_BUSY = 0.5
"""Load for each core from which on the machine was a busy one."""
_BETTER = 0.95
"""Of the time by default: another way must need less than that to be worth its memory."""
_ALONE = 0.75
"""Of the rate of as many single threads: below it, threads do not have a core each."""


@dataclass(frozen=True)
class Measured:
    """What was measured, and where.

    Attributes:
        figures: all of it.
        form: engine and precision in which a run takes the model; "" where none was measured.
        tiles: of the slide.
        cores: that may be used.
        load: processes that wanted a core when it began.
        free: bytes of memory that were free then.
        gpus: how many were used.
        pixels: whether a run keeps tiles in the store, by the settings.
    """

    figures: Sequence[Figure]
    form: str
    tiles: int
    cores: int
    load: float = 0.0
    free: int = 2**62
    gpus: int = 0
    pixels: bool = False

    def median(self, what: What, **about: Any) -> float | None:
        """Of the first figure of a thing of which that is true; None where there is none."""
        return next(
            (
                figure.median
                for figure in self.figures
                if figure.what == what and all(getattr(figure, name) == value for name, value in about.items())
            ),
            None,
        )

    def of_tile(self) -> dict[str, float]:
        """Seconds of a core that a tile costs, by what for."""
        rates = {
            "the model": self.median("score", form=self.form, threads=1) if not self.gpus else None,
            "decoding": self.median("decode", threads=1),
            "focus and ink": self.median("judge"),
            "writing": self.median("write") if self.pixels else None,
            "reading back": self.median("read") if self.pixels else None,
        }
        return {name: 1 / rate for name, rate in rates.items() if rate}

    def of_slide(self) -> dict[str, float]:
        """Seconds of a core that a slide costs besides its tiles, by what for."""
        opening, tissue = (self.median(what) or 0.0 for what in ("open", "tissue"))
        records = max(0.0, (self.median("cut") or 0.0) - opening - tissue)
        parts = {"opening": opening, "tissue": tissue, "records": records, "map": self.median("map") or 0.0}
        return {name: seconds for name, seconds in parts.items() if seconds}

    def ways(self) -> list["Way"]:
        """Every way of running that was measured, the default first; where there is no model, what is cut of tiles."""
        found = [
            Way(figure.workers, figure.threads, figure.median, min(figure.values), figure.memory or 0)
            for figure in self.figures
            if figure.what == "together"
        ]
        decode = self.median("decode", threads=self.cores)
        if not found and decode:
            judge = self.median("judge") or 0.0
            rate = 1 / (1 / decode + (1 / (judge * self.cores) if judge else 0.0))
            found = [Way(0, self.cores, rate, rate)]
        return sorted(found, key=lambda way: (way.workers, -way.threads))

    def takes(self, way: "Way", work: "Work") -> float:
        """Seconds that a run takes, from its begin to the end of the last map.

        Cores are shared by all; but of slides being cut there are no more at once than a way has places for, and no
        slide is scored before it is cut.
        """
        at_once = min(self.cores, max(1, way.workers) * way.threads)
        cutting = sum(self.of_slide().values()) if work.cutting is None else work.cutting
        stored = sum(self.of_tile().get(name, 0.0) for name in ("writing", "reading back"))
        scoring = work.more + work.tiles * (at_once / way.rate + stored)
        together = (work.slides * cutting + scoring) / at_once
        cut_at_once = min(at_once, way.workers or OVERLAP)
        one_slide = cutting + scoring / at_once / work.slides if work.slides else 0.0
        start = (self.median("start") or 0.0) + (self.median("workers") or 0.0 if way.workers else 0.0)
        return start + max(together, work.slides * cutting / cut_at_once, one_slide)


@dataclass(frozen=True)
class Way:
    """A way of running.

    Attributes:
        workers: processes; 0: in one, by threads.
        threads: of each.
        rate: tiles read and scored a second, the median.
        lowest: of its rates.
        memory: the most bytes that all of its processes took; 0 where that is not known.
    """

    workers: int
    threads: int
    rate: float
    lowest: float
    memory: int = 0

    def options(self, *, cores: int, gpus: int) -> str:
        """How it is asked for; "" where nothing needs to be said."""
        if self.workers:
            return f"--{'gpus' if gpus else 'workers'} {self.workers}"
        return "" if self.threads == cores else f"--threads {self.threads}"


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        slides: how many.
        tiles: of all of them.
        cutting: seconds of a core that one costs besides its tiles; None: as the one that was measured.
        more: seconds of a core that tiles of other kinds of slides cost more than those of that one, all together.
    """

    slides: int
    tiles: float
    cutting: float | None = None
    more: float = 0.0


@dataclass(frozen=True)
class Looked:
    """A slide of a manifest that was looked at.

    Attributes:
        tiles: that it has, or where `exact` is not, at most.
        seconds: that opening it and finding its tissue took.
        size: bytes of its file; None where it is none.
        more: seconds of a core that its tiles cost more than as many of the slide that was measured.
        exact: whether its tissue was looked for.
    """

    tiles: int
    seconds: float
    size: int | None = None
    more: float = 0.0
    exact: bool = True


def work_of(looked: Sequence[Looked], sizes: Sequence[int | None], measured: Measured) -> Work:
    """What all slides are, by those that were looked at: a slide has tiles as its file has bytes, where all are files.

    Args:
        looked: some of them.
        sizes: bytes of every one's file; None where it is none.
        measured: what one of them costs besides opening it and finding its tissue.
    """
    every = [*sizes, *(one.size for one in looked)]
    by_size = all(every)
    factor = sum(filter(None, sizes)) / sum(one.size or 0 for one in looked) if by_size else len(sizes) / len(looked)
    rest = sum(seconds for name, seconds in measured.of_slide().items() if name not in ("opening", "tissue"))
    cutting = sum(one.seconds for one in looked) / len(looked) + rest
    tiles, more = (factor * sum(getattr(one, name) for one in looked) for name in ("tiles", "more"))
    return Work(len(sizes), tiles, cutting, more)


def best_way(measured: Measured, work: Work) -> Way:
    """The way to run: the default, unless another one saves time for certain, and has the memory that it takes."""
    default, *others = measured.ways()
    if measured.gpus:
        return max(measured.ways(), key=lambda way: way.workers)
    others = [way for way in others if way.memory <= measured.free and way.lowest > default.rate]
    best = min([default, *others], key=lambda way: measured.takes(way, work))
    return best if measured.takes(best, work) < _BETTER * measured.takes(default, work) else default


def advice(measured: Measured) -> list[str]:
    """What the figures mean, a sentence each."""
    lines = []
    if measured.load > _BUSY * measured.cores:
        lines.append(
            f"The machine was busy when this began (load {measured.load:.1f} on {_count(measured.cores, 'core')}):"
            " these are figures of that moment, and a quiet machine has better ones."
        )
    lines += [*_costs(measured), _binds(measured), *_gpu(measured), *_threads(measured), *_forms(measured)]
    return [*lines, *_how(measured)]


def _costs(measured: Measured) -> list[str]:
    """What a tile and a slide cost."""
    lines = []
    for thing, parts, end in (("tile", measured.of_tile(), ""), ("slide", measured.of_slide(), " besides its tiles")):
        if parts:
            told = ", ".join(f"{name} {amount(seconds, 's')}" for name, seconds in parts.items())
            lines.append(f"A {thing} costs {amount(sum(parts.values()), 's')} of a core{end}: {told}.")
    return lines


def _binds(measured: Measured) -> str:
    """What most of the work is, on this slide."""
    parts = {name: seconds * measured.tiles for name, seconds in measured.of_tile().items()}
    parts["what a slide costs besides its tiles"] = sum(measured.of_slide().values())
    whole = sum(parts.values())
    (first, most), *others = sorted(parts.items(), key=lambda part: -part[1])
    told = ", ".join(f"{name} {part / whole:.0%}" for name, part in others)
    verb = "binds" if first != "focus and ink" else "bind"
    cores = " the cores" if measured.gpus else ""
    return f"What {verb}{cores} is {first}: {most / whole:.0%} of a slide of {_count(measured.tiles, 'tile')}; {told}."


def _gpu(measured: Measured) -> list[str]:
    """Whether the cores keep a GPU busy."""
    rate = measured.median("score", form=measured.form) if measured.gpus else None
    if rate is None:
        return []
    need = rate * sum(measured.of_tile().values())
    told = f"One GPU scores {amount(rate, 'tiles/s')}, which {need:,.1f} cores keep busy with tiles"
    have = measured.cores / measured.gpus
    return [f"{told}; there are {have:,.1f} for each: the {'GPU' if need <= have else 'cores'} will bind."]


def _threads(measured: Measured) -> list[str]:
    """Whether threads have a core each."""
    # Not by scoring alone: these were measured in turns, so that what else the machine did fell on both.
    one, all_of = (measured.median("together", threads=count, workers=0) for count in (1, measured.cores))
    if measured.gpus or measured.cores == 1 or not one or not all_of or all_of >= _ALONE * measured.cores * one:
        return []
    return [
        f"{measured.cores} threads score {all_of / one:.1f} times as many tiles as one:"
        " other processes take their time, or cores are halves of one (hyperthreads)."
    ]


def _forms(measured: Measured) -> list[str]:
    """How the precisions compare, and which to ask for where the default is the slower one."""
    rates: dict[str, float] = {}
    for figure in measured.figures:
        if figure.what == "score" and "cuda" not in figure.form:
            precision = figure.form.split()[-1]
            rates[precision] = max(rates.get(precision, 0.0), figure.median)
    if not {"int8", "float32"} <= rates.keys():
        return []
    times = rates["int8"] / rates["float32"]
    slower = "" if times >= 1 else "; --precision float32 is the faster one here"
    return [f"int8 scores {times:.1f} times as many tiles as float32{slower}."]


def _how(measured: Measured) -> list[str]:
    """How to run."""
    ways = measured.ways()
    if len(ways) < 2:
        return []
    # A night: what a run costs once is little of it.
    best = best_way(measured, Work(1000, 1000 * measured.tiles))
    gpus, cores = measured.gpus, measured.cores
    others = [way for way in ways if way != best and (way.workers or way.threads == cores)]
    against = "; ".join(f"{_way(way, cores=cores, gpus=gpus)} gives {_gives(way)}" for way in others)
    options = best.options(cores=cores, gpus=gpus)
    how = f"Run with {options}" if options else "Run by default, without --workers and --threads"
    return [f"{how}: {_gives(best)}; {against}." if against else f"{how}: {_gives(best)}."]


def _way(way: Way, *, cores: int, gpus: int) -> str:
    return way.options(cores=cores, gpus=gpus) or f"one process by {_count(way.threads, 'thread')}"


def _gives(way: Way) -> str:
    memory = f" in {way.memory / 1e9:.1f} GB" if way.memory else ""
    return f"{amount(way.rate, 'tiles/s')}{memory}"


@dataclass(frozen=True)
class Estimate:
    """How long something will take.

    Attributes:
        kind: what: the slide that was measured, or what is left of a manifest.
        seconds: how long.
        work: what is to be done.
        text: the same, as a sentence.
    """

    kind: Literal["slide", "manifest"]
    seconds: float
    work: Work
    text: str

    def fields(self) -> dict[str, Any]:
        """The same for JSON."""
        slides, tiles = self.work.slides, round(self.work.tiles)
        return {"of": self.kind, "slides": slides, "tiles": tiles, "seconds": round(self.seconds, 1), "text": self.text}


def estimate_slide(measured: Measured) -> Estimate:
    """How long a run over the slide that was measured takes."""
    work = Work(1, measured.tiles)
    seconds = measured.takes(measured.ways()[0], work)
    start = measured.median("start") or 0.0
    text = f"A run over this slide alone takes about {amount(seconds, 's')}, {amount(start, 's')} of it once a run."
    return Estimate("slide", seconds, work, text)


def estimate_manifest(
    measured: Measured, looked: Sequence[Looked], sizes: Sequence[int | None], *, done: int
) -> Estimate:
    """How long a run over what is left of a manifest takes, in the way that is best for it.

    Args:
        measured: what was measured on one of the slides.
        looked: the slides that were looked at.
        sizes: bytes of the file of each that is left; None where it is none.
        done: slides that are up to date.
    """
    work = work_of(looked, sizes, measured)
    way = best_way(measured, work)
    seconds = measured.takes(way, work)
    least, most = (choose(one.tiles for one in looked) for choose in (min, max))
    options = way.options(cores=measured.cores, gpus=measured.gpus)
    up_to_date = f"; {_count(done, 'slide')} {'are' if done != 1 else 'is'} up to date and not counted" if done else ""
    limit = "" if all(one.exact for one in looked) else "at most "
    text = (
        f"{_count(len(sizes), 'slide')} to do, {limit}about {_rounded(work.tiles)} tiles: {limit}about"
        f" {duration(seconds)}{f' with {options}' if options else ''}, exports and report left out."
        f" An estimate from {len(looked)} of them ({least:,} to {most:,} tiles){up_to_date}."
    )
    return Estimate("manifest", seconds, work, text)


def _rounded(tiles: float) -> str:
    """A number of tiles to two digits: it is an estimate."""
    return f"{float(f'{tiles:.2g}'):,.0f}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"
