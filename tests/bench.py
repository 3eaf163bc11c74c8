"""Time the main job against tiatoolbox's own PatchPredictor: same slide, same network, same cores.

usage: bench.py [--size WIDTH HEIGHT] [--tile-size 50] [--mpp 4.0] [--rounds 3]

Makes a slide with H&E texture at 0.5 um/px and a ResNet-50 with random weights (only the time matters). Each round runs
both in turn, each in a process of its own, on the cores that are there. Whole-process seconds include every import, and
for wsi-idc both commands. Ratios are of the medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
print("PEER", zarr.open(next(iter(result.values())))["coordinates"].shape[0], seconds)
"""


def write_slide(path: Path, width: int, height: int) -> None:
    """A tiled pyramidal JPEG BigTIFF at 0.5 um/px, levels 1, 4 and 16: round tissue on glass, a quarter of it fat."""
    from importlib.resources import files

    import numpy as np
    import tifffile
    from PIL import Image

    source = Image.open(str(files("tiatoolbox") / "data" / "target_image.png")).convert("RGB").crop((0, 0, 960, 960))
    with tifffile.TiffWriter(path, bigtiff=True) as out:
        for down in (1, 4, 16):
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
                    strip[across > 0.16] = (243, 242, 245)
                    for left in range(0, columns, 256):
                        yield strip[:, left : left + 256]

            resolution = 1e4 / (0.5 * down)
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


def timed(command: list[str]) -> tuple[float, str]:
    """Wall seconds of a process, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def main() -> None:
    """Run the rounds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(24_000, 20_000), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--tile-size", type=int, default=50)
    parser.add_argument("--mpp", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    own = [sys.executable, "-m", "wsi_idc.cli"]
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_slide(folder / "slide.tif", *options.size)
        write_bundle(folder / "bundle", options.tile_size, options.mpp)
        (folder / "m.csv").write_text("path\nslide.tif\n")
        store = str(folder / "tiles.zarr")
        for number in range(options.rounds):
            peer = [sys.executable, "-c", PEER, str(folder / "slide.tif"), str(options.tile_size), str(options.mpp)]
            whole, output = timed([*peer, str(folder / f"peer-{number}")])
            tiles, seconds = next(line.split()[1:] for line in output.splitlines() if line.startswith("PEER"))
            rates.setdefault("tiatoolbox, imports left out", []).append(int(tiles) / float(seconds))
            rates.setdefault("tiatoolbox, whole process", []).append(int(tiles) / whole)
            cut = ["--tile-size", str(options.tile_size), "--mpp", str(options.mpp), "--force", "--json"]
            extract, output = timed([*own, "extract", str(folder / "m.csv"), "--store", store, *cut])
            cutting = json.loads(output.splitlines()[-1])["seconds"]
            for precision in ("float32", "int8"):
                arguments = ["--store", store, "--model", str(folder / "bundle"), "--precision", precision, "--json"]
                infer, output = timed([*own, "infer", *arguments, "--force"])
                count, scoring = (json.loads(output.splitlines()[-1])[name] for name in ("tiles", "seconds"))
                rates.setdefault(f"wsi-idc {precision}, imports left out", []).append(count / (cutting + scoring))
                rates.setdefault(f"wsi-idc {precision}, whole processes", []).append(count / (extract + infer))
            rates.setdefault("wsi-idc extract alone, whole process", []).append(count / extract)
    peer_rate = statistics.median(rates["tiatoolbox, imports left out"])
    print(f"{options.tile_size} px at {options.mpp:g} um/px, tiles/s: median (lowest to highest), ratio to the first")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:38} {median:8.1f} ({min(values):.1f} to {max(values):.1f})  {median / peer_rate:6.1f}")


if __name__ == "__main__":
    main()
