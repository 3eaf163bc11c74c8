"""Time a night against the bare graph, tiatoolbox's PatchPredictor and itself: the goals of docs/performance.md.

usage: bench.py [--rounds 3] [--slides 20] [--only PART ...] [--large]

Parts: night, fine, cold, neighbour, extract, small, scaling. All runs are processes of their own. Rivals of a
ratio run in turn within each round, so that a noisy machine slows both; figures are medians, with the lowest and the
highest. Rates count whole processes, imports and all, unless a line says otherwise; the peer's leave its imports out.

The slides are made here: 60,000 x 48,000 px at 0.25 um/px with H&E texture; a night has the same one
under several names. 50 px at 4 um/px is scored by the model that ships, 224 px at 0.5 um/px by a ResNet-50 with random
weights. `--large` adds a slide of 100,000 x 80,000 px.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# As on a machine of its own: where modules may not be kept compiled, each process compiles some 460 of them anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
OWN = [sys.executable, "-m", "wsi_idc.cli"]
SHIPPED = "shipped"
FINE = ("224", "0.5")

PEER = """
import sys, time, warnings
import zarr
from tiatoolbox.models.architecture.vanilla import CNNModel
from tiatoolbox.models.engine.io_config import IOPatchPredictorConfig
from tiatoolbox.models.engine.patch_predictor import PatchPredictor

warnings.filterwarnings("ignore")
slide, size, mpp, out = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
engine = PatchPredictor(CNNModel("resnet50", num_classes=2), batch_size=64, num_workers=0, verbose=False)
where = [{"units": "mpp", "resolution": mpp}]
config = IOPatchPredictorConfig(input_resolutions=where, patch_input_shape=[size, size], stride_shape=[size, size])
start = time.perf_counter()
result = engine.run([slide], patch_mode=False, ioconfig=config, auto_get_mask=True, output_type="zarr", save_dir=out,
                    return_probabilities=True, overwrite=True)
seconds = time.perf_counter() - start
print(zarr.open(next(iter(result.values())))["coordinates"].shape[0] / seconds)
"""

GRAPH = """
import sys, threading, time
import numpy as np
from wsi_idc.cores import cores
from wsi_idc.model.bundle import SHIPPED, read_bundle
from wsi_idc.model.runtime import batch_of

bundle = read_bundle(SHIPPED if sys.argv[1] == "shipped" else sys.argv[1])
form, size, seconds = bundle.form("auto"), bundle.fields.tile.size_px, float(sys.argv[2])
batch = batch_of(size)
path, ports = str(bundle.folder / form.file), bundle.fields.graph
tiles = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


def onnxruntime(threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: lambda: session.run([ports.output], {ports.input: tiles})


def openvino(threads):
    from wsi_idc.model.runtime import _openvino

    core = _openvino().Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": cores(), "NUM_STREAMS": cores() // threads}
    model = core.read_model(path)
    model.reshape(tiles.shape)
    model = core.compile_model(model, "CPU", options)

    def one():
        request = model.create_infer_request()
        return lambda: request.infer({0: tiles})

    return one


def rate(threads, count):
    make = {"onnxruntime": onnxruntime, "openvino": openvino}[form.engine](threads)
    done, calls = [0] * count, [make() for _ in range(count)]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    start = time.perf_counter()

    def work(number):
        while time.perf_counter() < end:
            calls[number]()
            done[number] += batch

    workers = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(done) / (time.perf_counter() - start)


together, apart = rate(cores(), 1), rate(1, cores())
print(together, apart)
"""

DECODING = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import simplejpeg, tifffile
from wsi_idc.cores import cores
from wsi_idc.grid import Grid
from wsi_idc.reader import choose_source, read_tiles
from wsi_idc.settings import CutSettings, TileSpec
from wsi_idc.slides import open_slide
from wsi_idc.work.cut import find_tissue

path, size, mpp, most = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
slide = open_slide(path)
grid = Grid(TileSpec(size_px=size, mpp=mpp, stride_px=size), slide.size, slide.mpp)
_, _, cells, _ = find_tissue(slide, CutSettings(tile=grid.spec), None, grid)
cells = cells[: most or None]
source = choose_source(slide, grid)
down, (across, high) = slide.levels[source.level].downsample, slide.levels[source.level].block
first = grid.position(cells) / down
last = first + np.array(grid.extent) / down
need = set()
for (x0, y0), (x1, y1) in zip(first.tolist(), last.tolist()):
    need |= {(row, column) for row in range(int(y0 // high), int(-(-y1 // high)))
             for column in range(int(x0 // across), int(-(-x1 // across)))}
with tifffile.TiffFile(path) as tif:
    page = tif.pages[source.level]
    offsets, counts, tables = page.dataoffsets, page.databytecounts, page.jpegtables
per_row = -(-slide.levels[source.level].size[0] // across)
places = sorted(row * per_row + column for row, column in need if row * per_row + column < len(offsets))
file = path.open("rb", buffering=0)
import os


def decode(place):
    stored = os.pread(file.fileno(), counts[place], offsets[place])
    simplejpeg.decode_jpeg((tables[:-2] if tables else b"\\xff\\xd8") + stored[2:])


def bare():
    with ThreadPoolExecutor(cores()) as pool:
        for _ in pool.map(decode, places):
            pass


def ours():
    for _ in read_tiles(lambda: open_slide(path), grid, cells, batch=64, threads=cores()):
        pass


for work in (bare, ours):
    start, cpu = time.perf_counter(), time.process_time()
    work()
    print(len(cells) / (time.perf_counter() - start), (time.process_time() - cpu) / len(cells) * 1000)
"""


def write_slide(path: Path, width: int, height: int, mpp: float = 0.25) -> None:
    """A tiled pyramidal JPEG BigTIFF, levels 1, 4, 16 and 64: round tissue on glass, 58 % of the picture: 2,675 tiles
    of 60,000 x 48,000 px at 4 um/px."""
    from importlib.resources import files

    import numpy as np
    import tifffile
    from PIL import Image

    source = Image.open(str(files("tiatoolbox") / "data" / "target_image.png")).convert("RGB").crop((0, 0, 960, 960))
    with tifffile.TiffWriter(path, bigtiff=True) as out:
        for down in (1, 4, 16, 64):
            texture = np.asarray(source.reduce(down) if down > 1 else source)
            side = texture.shape[0]
            columns, rows = width // down, height // down
            x = np.arange(columns)

            def tiles(rows=rows, columns=columns, texture=texture, side=side, x=x):
                for top in range(0, rows, 256):
                    y = np.arange(top, top + 256)
                    wide = np.arange(-(-columns // 256) * 256)
                    strip = texture[np.ix_(y % side, wide % side)].copy()
                    across = (wide[None, :] / columns - 0.5) ** 2 + (y[:, None] / rows - 0.5) ** 2
                    strip[across > 0.578 / np.pi] = (243, 242, 245)
                    for left in range(0, columns, 256):
                        yield strip[:, left : left + 256]

            resolution = 1e4 / (mpp * down)
            out.write(
                tiles(), shape=(rows, columns, 3), dtype=np.uint8, tile=(256, 256), photometric="rgb",
                compression="jpeg", compressionargs={"level": 80}, subfiletype=int(down > 1), metadata=None,
                resolution=(resolution, resolution), resolutionunit="CENTIMETER",
            )  # fmt: skip


def write_bundle(folder: Path, size: int, mpp: float) -> None:
    """A ResNet-50 with random weights, float32 and int8."""
    import logging

    import numpy as np
    import torch

    from wsi_idc.model.network import build_network, export_onnx, quantize

    logging.disable(logging.INFO)
    torch.manual_seed(0)
    folder.mkdir()
    network = build_network({"kind": "resnet50", "tile_px": size, "input_px": size}).eval()
    export_onnx(network, folder / "model.onnx")
    tiles = np.random.default_rng(0).integers(0, 256, (64, size, size, 3), dtype=np.uint8)
    quantize(folder / "model.onnx", folder / "model.int8.onnx", tiles)
    graph = {"file": "model.onnx", "int8": "model.int8.onnx", "input": "tiles", "output": "probability"}
    fields = {"format": "wsi-idc-model/1", "name": "random", "tile": {"size_px": size, "mpp": mpp}, "graph": graph}
    (folder / "bundle.json").write_text(json.dumps(fields))


class Done:
    """A process that has ended: its wall and CPU seconds, those of its children, and what it printed."""

    def __init__(self, command: list[str], **options) -> None:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.seconds = time.perf_counter() - start
        self.cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.out, self.err = done.stdout, done.stderr

    @property
    def last(self) -> dict:
        """The last JSON line."""
        return json.loads(self.out.splitlines()[-1])

    @property
    def numbers(self) -> list[float]:
        """What it printed, number by number."""
        return [float(word) for word in self.out.split()]


class Table:
    """Figures as they come, a list a name; printed as medians."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = {}
        self._goals: dict[str, str] = {}

    def add(self, name: str, value: float, goal: str = "") -> float:
        """Keep a figure; `goal` says what it should be."""
        self._found.setdefault(name, []).append(value)
        self._goals[name] = goal
        return value

    def show(self, title: str) -> None:
        """Print what came since the last table."""
        print(f"\n{title}")
        for name, values in self._found.items():
            median, spread = statistics.median(values), f"({min(values):,.3g} to {max(values):,.3g})"
            number = f"{median:,.2f}" if median < 100 else f"{median:,.0f}"
            print(f"  {name:62} {number:>9} {spread:24} {self._goals[name]}", flush=True)
        self._found.clear()


class Bench:
    """The folder of slides and stores, made as they are asked for."""

    def __init__(self, folder: Path, rounds: int, slides: int) -> None:
        self.folder, self.rounds, self.slides, self.table = folder, rounds, slides, Table()

    def slide(self, width: int = 60_000, height: int = 48_000) -> Path:
        """The slide of that size."""
        path = self.folder / f"{width}x{height}.tif"
        if not path.exists():
            write_slide(path, width, height)
        return path

    def manifest(self, count: int, slide: Path | None = None) -> Path:
        """A manifest of a slide under so many names, in a folder of its own."""
        slide = slide or self.slide()
        folder = self.folder / f"{slide.stem}-{count}"
        if not folder.exists():
            folder.mkdir()
            for number in range(count):
                os.link(slide, folder / f"s{number:04}.tif")
            lines = "".join(f"s{number:04}.tif\n" for number in range(count))
            (folder / "manifest.csv").write_text("path\n" + lines)
        return folder / "manifest.csv"

    def bundle(self) -> Path:
        """A model of 224 px at 0.5 um/px."""
        folder = self.folder / "bundle"
        if not folder.exists():
            write_bundle(folder, int(FINE[0]), float(FINE[1]))
        return folder

    def night(self, manifest: Path, *arguments: str, fresh: bool = True, pin: str = "") -> Done:
        """`run` on a manifest."""
        store = manifest.parent / "tiles.zarr"
        if fresh:
            subprocess.run(
                ["rm", "-rf", *(str(manifest.parent / name) for name in ("tiles.zarr", "export"))], check=True
            )
        before = ["taskset", "-c", pin] if pin else []
        command = [*before, *OWN, "run", str(manifest), "--store", str(store), "--json", *arguments]
        return Done(command, cwd=manifest.parent)

    def graph(self, model: str = SHIPPED, seconds: float = 8.0) -> float:
        """Tiles/s of the bare graph, by whichever of the engine's ways is faster."""
        together, apart = Done([sys.executable, "-c", GRAPH, model, str(seconds)]).numbers
        self.table.add("the bare graph, threads together, tiles/s", together)
        self.table.add("the bare graph, a thread a batch, tiles/s", apart)
        return max(together, apart)

    def peer(self, slide: Path, size: str, mpp: str) -> float:
        """tiatoolbox's PatchPredictor, imports left out."""
        with tempfile.TemporaryDirectory() as out:
            done = Done([sys.executable, "-c", PEER, str(slide), size, mpp, f"{out}/peer"])
        return self.table.add("tiatoolbox's PatchPredictor, imports left out, tiles/s", float(done.out.split()[-1]))


@contextmanager
def neighbour(core: int = 0) -> Iterator[None]:
    """One core kept busy by another process."""
    script = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    busy = subprocess.Popen([sys.executable, "-c", script])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


def night(bench: Bench) -> None:
    """Goal 1, at 4 um/px."""
    manifest = bench.manifest(bench.slides)
    for _ in range(bench.rounds):
        graph, peer = bench.graph(), bench.peer(bench.slide(), "50", "4.0")
        done = bench.night(manifest)
        tiles, seconds = done.last["stages"]["infer"]["tiles"], done.seconds
        rate = bench.table.add(f"run over {bench.slides} slides, whole process, tiles/s", tiles / seconds)
        bench.table.add("  of the bare graph's", rate / graph, "at least 0.85")
        bench.table.add("  times the peer's", rate / peer, "at least 7")
        bench.table.add("  CPU seconds a slide", done.cpu / bench.slides)
        for name, stage in done.last["stages"].items():
            bench.table.add(f"  {name}, seconds", stage["seconds"])
        kept = bench.night(manifest, "--pixels")
        bench.table.add("run --pixels, tiles/s", tiles / kept.seconds)
    bench.table.show("A night at 50 px and 4 um/px")


def fine(bench: Bench) -> None:
    """Goal 1, at 224 px and 0.5 um/px."""
    manifest, bundle = bench.manifest(1, bench.slide(40_000, 32_000)), str(bench.bundle())
    arguments = ["--model", bundle]
    os.environ |= {"WSI_IDC_EXTRACT_TILE_SIZE": FINE[0], "WSI_IDC_EXTRACT_MPP": FINE[1]}
    for _ in range(bench.rounds):
        graph, peer = bench.graph(bundle, 15.0), bench.peer(bench.slide(12_000, 10_000), *FINE)
        done = bench.night(manifest, *arguments)
        tiles = done.last["stages"]["infer"]["tiles"]
        rate = bench.table.add("run over 1 slide, whole process, tiles/s", tiles / done.seconds)
        bench.table.add("  of the bare graph's", rate / graph, "at least 0.85")
        bench.table.add("  times the peer's", rate / peer, "at least 8")
        inner = bench.table.add("run, imports left out, tiles/s", tiles / done.last["stages"]["infer"]["seconds"])
        bench.table.add("  of the bare graph's", inner / graph)
    for name in ("TILE_SIZE", "MPP"):
        del os.environ[f"WSI_IDC_EXTRACT_{name}"]
    bench.table.show("A night at 224 px and 0.5 um/px, one slide of 40,000 x 32,000 px at 0.25 um/px")


def cold(bench: Bench) -> None:
    """Goal 2."""
    manifest = bench.manifest(1)
    for _ in range(bench.rounds):
        bench.table.add("run over 1 slide, from the shell to its map, s", bench.night(manifest).seconds, "under 4")
        store = str(manifest.parent / "tiles.zarr")
        traced = [sys.executable, "-X", "importtime", *OWN[1:], "run", str(manifest), "--store", store]
        subprocess.run(["rm", "-rf", store], check=True)
        lines = [line.split("|")[0] for line in Done(traced, cwd=manifest.parent).err.splitlines()]
        own = [line.removeprefix("import time:").strip() for line in lines if line.startswith("import time:")]
        imports = sum(int(word) for word in own if word.isdigit()) / 1e6
        bench.table.add("  of which imports, as -X importtime adds them up, s", imports, "under 1.5")
    bench.table.show("One slide, cold")


def busy(bench: Bench) -> None:
    """Goal 3."""
    manifest = bench.manifest(6)
    for _ in range(bench.rounds):
        quiet, quiet_graph = bench.night(manifest), Done([sys.executable, "-c", GRAPH, SHIPPED, "6"]).numbers
        with neighbour():
            loud, loud_graph = bench.night(manifest), Done([sys.executable, "-c", GRAPH, SHIPPED, "6"]).numbers
        kept = [done.last["stages"]["infer"]["seconds"] for done in (quiet, loud)]
        bench.table.add("run over 6 slides, of half its quiet rate", 2 * kept[0] / kept[1], "at least 0.80")
        for name, before, after in zip(("threads together", "a thread a batch"), quiet_graph, loud_graph, strict=True):
            bench.table.add(f"the bare graph, {name}, of half its quiet rate", 2 * after / before)
    bench.table.show("One of the cores busy with something else")


def extract(bench: Bench) -> None:
    """Goal 4."""
    many, one = bench.manifest(bench.slides), bench.manifest(1)
    for _ in range(bench.rounds):
        for name, arguments in (("", []), (" --no-pixels", ["--no-pixels"])):
            used = []
            for manifest in (many, one):
                store = str(manifest.parent / "cut.zarr")
                command = [*OWN, "extract", str(manifest), "--store", store, "--force", "-q", *arguments]
                used.append(Done(command).cpu)
            each = (used[0] - used[1]) / (bench.slides - 1)
            bench.table.add(f"extract{name}, CPU seconds a slide at 4 um/px", each, "" if name else "at most 0.5")
        for size, mpp, slide, most in (("50", "4.0", bench.slide(), 0), (*FINE, bench.slide(40_000, 32_000), 1000)):
            done = Done([sys.executable, "-c", DECODING, str(slide), size, mpp, str(most)])
            bare, bare_ms, ours, ours_ms = done.numbers
            what = f"{size} px at {mpp} um/px"
            bench.table.add(f"{what}: stored tiles decoded and no more, tiles/s", bare)
            bench.table.add(f"{what}: tiles read, tiles/s", ours)
            bench.table.add("  of the bare loop's" + " " * (size == "50"), ours / bare, "at least 0.8" * (size != "50"))
            bench.table.add(f"{what}: CPU ms a tile, bare", bare_ms)
            bench.table.add(f"{what}: CPU ms a tile, read", ours_ms)
    bench.table.show("Extracting")


def scaling(bench: Bench, *, large: bool) -> None:
    """Goal 5."""
    small, big = bench.manifest(1, bench.slide(18_974, 15_179)), bench.manifest(1)
    many = bench.manifest(8)
    for _ in range(bench.rounds):
        found = [bench.night(manifest).last["stages"]["infer"] for manifest in (small, big)]
        times = found[1]["tiles"] / found[0]["tiles"]
        bench.table.add("times the tiles", times)
        bench.table.add(
            "times the seconds, imports left out", found[1]["seconds"] / found[0]["seconds"], "at most 10.5"
        )
        rates = []
        for count, pin in ((1, "0"), (2, "0,1")):
            done = bench.night(many, "--workers", str(count), "--threads", "1", pin=pin)
            rates.append(done.last["stages"]["infer"]["tiles"] / done.last["stages"]["infer"]["seconds"])
        bench.table.add("1 worker of 1 thread on a core, tiles/s", rates[0])
        bench.table.add("2 workers on two cores, times that", rates[1] / rates[0], "at least 1.9")
    if large:
        manifest = bench.manifest(1, bench.slide(100_000, 80_000))
        script = (
            "import resource, subprocess, sys\n"
            "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6)"
        )
        for name, arguments in (("run", []), ("run --pixels", ["--pixels"])):
            store = str(manifest.parent / f"{len(arguments)}.zarr")
            command = [*OWN, "run", str(manifest), "--store", store, *arguments]
            peak = float(Done([sys.executable, "-c", script, *command], cwd=manifest.parent).out)
            bench.table.add(f"{name} of 100,000 x 80,000 px, GB at most", peak, "at most 1.5")
    bench.table.show("Scaling")


def small(bench: Bench) -> None:
    """Goal 6."""
    manifest = bench.manifest(1000, bench.slide(4_000, 3_000))
    bench.night(manifest)
    store = str(manifest.parent / "tiles.zarr")
    for _ in range(bench.rounds):
        bench.table.add("--help, s", Done([*OWN, "--help"]).seconds, "under 0.3")
        bench.table.add("status of 1,000 slides, s", Done([*OWN, "status", "--store", store]).seconds, "under 2")
        again = bench.night(manifest, fresh=False)
        bench.table.add("a second run over 1,000 unchanged slides, s", again.seconds, "under 10")
    bench.table.show("Small things")


def main() -> None:
    """Run the parts and print their figures."""
    parts: dict[str, Callable[[Bench], None]] = {
        "night": night, "fine": fine, "cold": cold, "neighbour": busy, "extract": extract, "small": small,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slides", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=[*parts, "scaling"], default=[])
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep slides there, and use those that are there")
    parser.add_argument("--isa", help="hold OpenVINO to an instruction set, as in ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI")
    options = parser.parse_args()
    if options.isa:
        os.environ["ONEDNN_MAX_CPU_ISA"] = options.isa
    chosen = options.only or [*parts, "scaling"]
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        folder.mkdir(exist_ok=True, parents=True)
        bench = Bench(folder, options.rounds, options.slides)
        for name in chosen:
            if name == "scaling":
                scaling(bench, large=options.large)
            else:
                parts[name](bench)


if __name__ == "__main__":
    main()
