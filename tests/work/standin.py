"""A job that takes the time of a real slide, or none, and touches neither slide nor model."""

import time
from dataclasses import dataclass

from wsi_idc.work.jobs import Block, Outcome, Prepared


@dataclass(frozen=True)
class StandIn:
    """Sleeps in place of work.

    Attributes:
        job_id: of the slide.
        seconds: of preparing, of each block and of finishing.
        blocks: of tiles.
    """

    job_id: str
    seconds: tuple[float, float, float] = (0.0, 0.0, 0.0)
    blocks: int = 1

    @property
    def names(self):
        return (self.job_id,)

    def prepare(self, work):
        time.sleep(self.seconds[0])
        return Prepared([Block(n, n + 1) for n in range(self.blocks)], self.blocks)

    def run(self, block, info, work):
        time.sleep(self.seconds[1])
        return b""

    def finish(self, prepared, results, work):
        time.sleep(self.seconds[2])
        return Outcome("done", tiles=prepared.tiles)

    def hindrances(self):
        return []

    def fail(self, reason):
        pass
