"""What a measurement gives, and the two ways of measuring: a piece of work again and again, or a flow of tiles.

Both take about as long as they are told to, and once or one round at least. The clock is a parameter.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Clock = Callable[[], float]
"""Gives seconds, from whenever."""
What = Literal[
    "start",
    "open",
    "thumbnail",
    "tissue",
    "cut",
    "decode",
    "judge",
    "load",
    "score",
    "map",
    "write",
    "read",
    "workers",
    "together",
]
WORDS: dict[What, str] = {
    "start": "run without a tile, whole process",
    "open": "open the slide",
    "thumbnail": "thumbnail",
    "tissue": "thumbnail, tissue mask, tiles",
    "cut": "extract without pixels, whole",
    "decode": "decode tiles",
    "judge": "focus and ink of tiles",
    "load": "load the model",
    "score": "score tiles",
    "map": "neighbours, map and records",
    "write": "write tiles to a store",
    "read": "read tiles from a store",
    "workers": "start worker processes",
    "together": "decode and score tiles",
}
"""What each is, as a user reads it."""
ROUNDS = 5
"""Parts into which the time of a flow is cut, so that its rate has a spread."""


@dataclass(frozen=True)
class Figure:
    """What was measured of one thing.

    Attributes:
        what: of which.
        unit: of the values.
        values: each repetition's, in their order.
        form: engine and precision of the model; "" where none took part.
        threads: of each process; 0: as many as the code takes by itself.
        workers: processes side by side; 0: it is a matter of one process.
        memory: bytes that all of its processes held at the end; None where that was not looked at.
    """

    what: What
    unit: Literal["s", "tiles/s"]
    values: tuple[float, ...]
    form: str = ""
    threads: int = 0
    workers: int = 0
    memory: int | None = None

    @property
    def median(self) -> float:
        """The median of its repetitions."""
        return statistics.median(self.values)

    @property
    def by(self) -> str:
        """What did it: engine and precision, threads, workers."""
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}" if self.threads else ""
        workers = f"{self.workers} worker{'s' if self.workers != 1 else ''}" if self.workers else ""
        return ", ".join(part for part in (self.form, " of ".join(filter(None, (workers, threads)))) if part)

    def cells(self) -> list[str]:
        """A row of the table: what, by what, median, lowest, highest."""
        told = [amount(value, self.unit) for value in (self.median, min(self.values), max(self.values))]
        return [WORDS[self.what], self.by, *(told if len(self.values) > 1 else [told[0], "", ""])]

    def fields(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "what": self.what,
            "form": self.form,
            "threads": self.threads,
            "workers": self.workers,
            "unit": self.unit,
            "median": self.median,
            "lowest": min(self.values),
            "highest": max(self.values),
            "repetitions": len(self.values),
            "memory": self.memory,
        }


HEADER = ["measured", "by", "median", "lowest", "highest"]
"""Of `Figure.cells`."""


def amount(value: float, unit: str) -> str:
    """A value with its unit, to about three digits."""
    if unit == "tiles/s":
        return f"{value:,.0f} tiles/s" if value >= 10 else f"{value:.2g} tiles/s"
    return (
        f"{value:.{0 if value >= 99.5 else 1 if value >= 9.95 else 2}f} s" if value >= 1 else f"{value * 1000:.3g} ms"
    )


def times(work: Callable[[], object], seconds: float, clock: Clock) -> tuple[float, ...]:
    """How long a piece of work takes, each time that it is done.

    Args:
        work: is done until the time is over; the first time what it needs may have to come from a disk.
        seconds: no further time is begun after so many.
        clock: what times are taken from.
    """
    begun, found = clock(), list[float]()
    while not found or clock() - begun < seconds:
        start = clock()
        work()
        found.append(clock() - start)
    return tuple(found)


def rates(
    flow: Iterator[int], seconds: float, clock: Clock, *, at_once: int = 1, rounds: int = ROUNDS
) -> tuple[float, ...]:
    """Tiles a second of a flow, in each part of the time.

    Args:
        flow: tiles of one batch after the other, without end.
        seconds: no further part is begun after so many.
        clock: what times are taken from.
        at_once: batches that come together, since so many threads work at one each: parts are whole multiples of it,
            and the first so many are not counted, as nothing was under way before them.
        rounds: parts of the time.
    """
    for _ in range(at_once):
        next(flow)
    begun, found = clock(), list[float]()
    while not found or clock() - begun < seconds:
        start, tiles = clock(), 0
        while not tiles or clock() - start < seconds / rounds:
            tiles += sum(next(flow) for _ in range(at_once))
        found.append(tiles / (clock() - start))
    return tuple(found)
