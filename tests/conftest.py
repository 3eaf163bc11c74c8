"""Slides, bundles and stores made on the spot, with pixels that are known."""

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import settings

# No test asserts on time, hypothesis's own included.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data; tests that need it skip without it."""
    place = Path(os.environ.get("WSI_IDC_DATA") or REPOSITORY.parent / "shared" / "data")
    if not place.is_dir():
        pytest.skip("the real data is not here: set WSI_IDC_DATA, or put it at ../shared/data")
    return place


@pytest.fixture(scope="session")
def idc_slide(shared_data: Path, tmp_path_factory):
    """Gives a complete patient's folder: `idc-<patient>.tif` with `.geojson`, and the patches as `<patient>`."""
    made: dict[str, Path] = {}

    def make_once(patient: str) -> Path:
        if patient not in made:
            folder = made[patient] = tmp_path_factory.mktemp(f"idc-{patient}")
            archive = shared_data / "idc" / "patches.zip"
            for script in (
                [shared_data / "slides" / "make_idc_slide.py", patient, archive, folder],
                [shared_data / "idc" / "unpack.py", folder, patient],
            ):
                subprocess.run([sys.executable, *script], check=True, capture_output=True)
        return made[patient]

    return make_once


@pytest.fixture(scope="session")
def published_model(shared_data: Path) -> Path:
    """The published 2016 model's bundle."""
    place = shared_data.parent / "models" / "janowczyk-2016"
    if not place.is_dir():
        pytest.skip("the published model is not beside the real data")
    return place


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, headless, driven by playwright.

    Not for longer than a module: as long as it lives this thread has a running event loop, where Dask's cannot run.
    """
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("no Chromium is here: install Debian's package chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


class Objects:
    """An S3 server of this test run, as a process of its own, and what it was asked.

    Attributes:
        environment: what a command needs to find it.
    """

    def __init__(self, port: int, log: Path) -> None:
        self.endpoint, self._log = f"http://127.0.0.1:{port}", log
        self.environment = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def bucket(self) -> str:
        """A new bucket's name."""
        name = f"bucket-{uuid.uuid4().hex}"
        urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")).close()
        return name

    def requests(self) -> list[tuple[str, str]]:
        """Method and path of every request so far."""
        return re.findall(r'"(?:\x1b\[[\d;]*m)*([A-Z]+) (\S+) HTTP/1\.[01]', self._log.read_text())


class Proxy(ThreadingHTTPServer):
    """Stands before the S3 server, on loopback, and is a server that refuses or ignores what a test says.

    Attributes:
        refuse: is given method, path and body; gives status and code of an error, or None to let the request through.
        ignored: headers that do not reach the server, in small letters.
    """

    daemon_threads = True

    def __init__(self, behind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.behind = behind.removeprefix("http://")
        self.refuse: Callable[[str, str, bytes], tuple[int, str] | None] = lambda *request: None
        self.ignored: tuple[str, ...] = ()


class _Forward(BaseHTTPRequestHandler):
    """One connection of `Proxy`."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        refused = self.server.refuse(self.command, self.path, body)
        if refused:
            status, found = refused[0], {"content-type": "application/xml"}
            content = f"<Error><Code>{refused[1]}</Code><Message>as the test says</Message></Error>".encode()
        else:
            sent = {name: value for name, value in self.headers.items() if name.lower() not in self.server.ignored}
            connection = http.client.HTTPConnection(self.server.behind)
            connection.request(self.command, self.path, body, sent)
            answer = connection.getresponse()
            status, content = answer.status, answer.read()
            found = dict(answer.getheaders())
            connection.close()
        self.send_response(status)
        length = found.get("Content-Length") if self.command == "HEAD" else None
        kept = ("connection", "content-length", "transfer-encoding", "date", "server")
        for name, value in {name: value for name, value in found.items() if name.lower() not in kept}.items():
            self.send_header(name, value)
        self.send_header("content-length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer  # noqa: N815

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def proxy(objects, monkeypatch):
    """Between this process, with the commands that it starts, and the S3 server."""
    with Proxy(objects.endpoint) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def objects_server(tmp_path_factory):
    """moto's S3, on loopback; one a test process."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    log = tmp_path_factory.mktemp("moto") / "log"
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
    try:
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield Objects(port, log)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def objects(objects_server: Objects, monkeypatch) -> Objects:
    """An S3 server, which this process and the commands that it starts will find."""
    for name, value in objects_server.environment.items():
        monkeypatch.setenv(name, value)
    return objects_server


def texture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Tissue-coloured pixels, each different from its neighbours: uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    grain = rng.integers(-25, 26, (height, width, 3))
    return np.clip(np.array((170, 90, 150)) + grain, 0, 255).astype(np.uint8)


def write_tiff(path: Path, pixels: np.ndarray, mpp: float | None = 4.0, downs=(1,), **options) -> Path:
    """A tiled pyramidal BigTIFF, lossless, whose levels are area-averaged by the whole factors `downs`."""
    with tifffile.TiffWriter(path, bigtiff=True) as out:
        for down in downs:
            height, width = (side // down * down for side in pixels.shape[:2])
            level = pixels[:height, :width].reshape(height // down, down, width // down, down, 3).mean((1, 3))
            place = {} if mpp is None else {"resolution": (1e4 / (mpp * down),) * 2, "resolutionunit": "CENTIMETER"}
            settings = {"compression": "adobe_deflate", "tile": (128, 128), **options}
            out.write(
                level.round().astype(np.uint8),
                photometric="rgb",
                subfiletype=int(down > 1),
                metadata=None,
                **place,
                **settings,
            )
    return path


def tissue_slide(path: Path, width: int = 500, height: int = 400, margin: int = 100, seed: int = 0, **options) -> Path:
    """A slide at 4.0 um/px: a rectangle of tissue with `margin` pixels of glass around it."""
    pixels = np.full((height, width, 3), 244, np.uint8)
    inner = texture(width - 2 * margin, height - 2 * margin, seed)
    pixels[margin : height - margin, margin : width - margin] = inner
    return write_tiff(path, pixels, **options)


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """A folder of two good slides and one that breaks on reading, with their manifest; gives the manifest."""
    tissue_slide(tmp_path / "a.tif", seed=1)
    tissue_slide(tmp_path / "b.tif", 600, 500, seed=2)
    damage(tissue_slide(tmp_path / "broken.tif", seed=3))
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("path,patient_id,site\na.tif,p1,north\nb.tif,p2,south\nbroken.tif,p3,north\n")
    return manifest


def damage(path: Path) -> Path:
    """Overwrite a stored tile of level 0."""
    with tifffile.TiffFile(path) as tif:
        offsets = tif.pages[0].dataoffsets
    with path.open("r+b") as stream:
        stream.seek(offsets[len(offsets) // 2])
        stream.write(b"\xff" * 64)
    return path


def write_bundle(folder: Path, size_px: int = 50, mpp: float = 4.0, outputs: int = 1, **fields) -> Path:
    """A bundle whose probability is the mean of a tile's pixels over 255.

    With more than one of `outputs`, the softmax of so many numbers: four times the mean of each channel over 255, and
    zero from the fourth on.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(parents=True, exist_ok=True)
    several = outputs > 1
    nodes = [
        helper.make_node("Cast", ["tiles"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        helper.make_node("Div", ["mean", "most"], ["share" if several else "probability"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([1, 2] if several else [1, 2, 3], np.int64), "axes"),
        numpy_helper.from_array(np.array(255, np.float32), "most"),
    ]
    if several:
        nodes.append(helper.make_node("MatMul", ["share", "weights"], ["logits"]))
        nodes.append(helper.make_node("Softmax", ["logits"], ["probability"], axis=1))
        constants.append(numpy_helper.from_array(4 * np.eye(3, outputs, dtype=np.float32), "weights"))
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["n", size_px, size_px, 3])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["n", outputs] if several else ["n"])],
        constants,
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "model.onnx"
    )
    about = {
        "format": "wsi-idc-model/1",
        "name": "mean",
        "tile": {"size_px": size_px, "mpp": mpp},
        "graph": {"file": "model.onnx", "input": "tiles", "output": "probability"},
        **fields,
    }
    (folder / "bundle.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The mean-of-pixels model."""
    return write_bundle(tmp_path / "bundle")


def pixels_of(slide) -> np.ndarray:
    """All tiles of a stored slide: uint8 (n, size, size, 3)."""
    return np.concatenate(list(slide.read_tiles()))


class Recorder:
    """A listener that remembers; also stands for its factory."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.tiles: dict[str, int] = {}
        self.outcomes: dict[str, object] = {}

    def __call__(self, slides):
        self.started = list(slides)
        return self

    def prepared(self, job_id, tiles):
        self.tiles[job_id] = tiles

    def advanced(self, job_id, tiles):
        pass

    def ended(self, job_id, outcome):
        self.outcomes[job_id] = outcome

    def left_out(self, job_id):
        self.started.remove(job_id)


@pytest.fixture
def recorder() -> Recorder:
    """A listener that remembers."""
    return Recorder()


@pytest.fixture
def scored(slides, bundle, recorder):
    """The store of slides a and b, with maps by `mean` (a tile's probability is the mean of its pixels over 255), and
    of one that failed."""
    from wsi_idc.extract import extract
    from wsi_idc.infer import infer
    from wsi_idc.manifest import read_manifest
    from wsi_idc.model.bundle import read_bundle
    from wsi_idc.settings import ExtractSettings, InferSettings
    from wsi_idc.store import open_store

    path = slides.parent / "tiles.zarr"
    extract(read_manifest(slides), path, ExtractSettings(), listener=recorder)
    infer(path, read_bundle(bundle), InferSettings(), listener=recorder)
    return open_store(path)


@pytest.fixture(scope="session")
def wsi_idc():
    """Runs the command as a process of its own, with none of the user's settings but those that are given."""

    def run(*arguments, cwd=None, **environment):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WSI_IDC_")}
        return subprocess.run(
            [sys.executable, "-m", "wsi_idc.cli", *map(str, arguments)],
            cwd=cwd,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=kept | environment,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def make():
    """The makers above, for tests to call."""

    class Makers:
        texture = staticmethod(texture)
        write_tiff = staticmethod(write_tiff)
        tissue_slide = staticmethod(tissue_slide)
        damage = staticmethod(damage)
        write_bundle = staticmethod(write_bundle)
        pixels_of = staticmethod(pixels_of)
        recorder = Recorder

    return Makers
