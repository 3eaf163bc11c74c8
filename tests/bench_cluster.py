"""What a cluster costs and gains, on loopback: `make bench-cluster`. Prints figures; `docs/scaling.md` has them.

1. One and two workers of one thread, a core each: tiles/s of `infer` over the same store, in turn.
2. Scheduling: 2,000 slides that do nothing; milliseconds a slide, and what the client's memory grows by.
3. Slides that take the time of real ones, on so many task slots: the share of the slots' time that is used.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.work.clusters import Cluster
from tests.work.standin import StandIn
from wsi_idc.work import cluster
from wsi_idc.work.jobs import Supply, run_jobs


class Count:
    """A listener that looks at the client's memory as slides end."""

    def __init__(self) -> None:
        self.ended_count, self.memory = 0, []

    def prepared(self, job_id, tiles):
        pass

    def advanced(self, job_id, tiles):
        pass

    def ended(self, job_id, outcome):
        assert outcome.status == "done", outcome
        self.ended_count += 1
        if self.ended_count % 500 == 0:
            self.memory.append(resident_mib())


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def over(one, jobs, slots):
    """Seconds that a cluster takes for jobs, once so many slots are there; and the listener."""
    with cluster.at("", one.file, wait=120, gpus=0, threads=1) as place:
        while sum(place.client.nthreads().values()) < slots:
            time.sleep(0.2)
        place.admit(jobs)
        listener, start = Count(), time.monotonic()
        run_jobs(place, Supply(jobs), listener)
        return time.monotonic() - start, listener


def scheduling(folder):
    one = Cluster(folder / "scheduling")
    one.add(2)
    try:
        before = resident_mib()
        seconds, listener = over(one, [StandIn(f"s{number}") for number in range(2000)], 2)
        print(f"scheduling: {seconds / 2:.1f} ms a slide at 2,000 slides on 2 workers")
        print(f"client: {before:.0f} MiB before; " + ", ".join(f"{mib:.0f}" for mib in listener.memory) + " MiB")
    finally:
        one.close()


def slots(folder, count, seconds):
    """So many slots in two processes, that sleep in place of work: they cost the scheduler what real ones would."""
    one = Cluster(folder / f"slots-{count}")
    one.add(2, "--nthreads", count // 2)
    try:
        slides = max(2 * count, round(40 * count / sum(seconds)))
        ideal = slides * sum(seconds) / count
        taken, _ = over(one, [StandIn(f"s{number}", seconds) for number in range(slides)], count)
        print(
            f"{count} slots, {sum(seconds):g} s a slide: {slides} slides in {taken:.0f} s, {ideal / taken:.0%} of ideal"
        )
    finally:
        one.close()


def workers(folder, slides, rounds):
    """`infer` on one and on two workers of one thread."""
    from tests.conftest import tissue_slide
    from wsi_idc.extract import extract
    from wsi_idc.infer import infer
    from wsi_idc.manifest import read_manifest
    from wsi_idc.model.bundle import SHIPPED, read_bundle
    from wsi_idc.settings import ExtractSettings, InferSettings

    lines = ["path"]
    for number in range(slides):
        tissue_slide(folder / f"s{number}.tif", 2600, 2300, seed=number)
        lines.append(f"s{number}.tif")
    (folder / "m.csv").write_text("\n".join(lines))
    store = folder / "tiles.zarr"
    extract(read_manifest(folder / "m.csv"), store, ExtractSettings(), listener=lambda names: Count())
    clusters = {}
    try:
        for count in (1, 2):
            clusters[count] = Cluster(folder / f"workers-{count}")
            for core in range(count):
                clusters[count].add(1, core=core)
        rates = {1: [], 2: []}
        for number in range(rounds + 1):
            for count, one in clusters.items():
                settings = InferSettings(scheduler_file=one.file, threads=1)
                summary = infer(store, read_bundle(SHIPPED), settings, force=True, listener=lambda names: Count())
                if number:  # The first round loads the model.
                    rates[count].append(summary.tiles / summary.seconds)
    finally:
        for one in clusters.values():
            one.close()
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    print(f"1 worker: {statistics.median(rates[1]):.0f} tiles/s; 2: {statistics.median(rates[2]):.0f}; ", end="")
    print(f"ratio {statistics.median(ratios):.2f} (of each round: {', '.join(f'{ratio:.2f}' for ratio in ratios)})")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workers(Path(folder), arguments.slides, arguments.rounds)
        scheduling(Path(folder))
        # Measured seconds of extracting a slide of 2,675 tiles: tissue and thumbnail, tiles, the record.
        for count in (16, 64, 256):
            slots(Path(folder), count, (1.5, 0.4, 0.1))


if __name__ == "__main__":
    main()
