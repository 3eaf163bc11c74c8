"""The browser shows the slide's own pixels with the map in its place, and nobody else is served."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from wsi_idc.extract import extract
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import SHIPPED, read_bundle
from wsi_idc.results import Choice, look
from wsi_idc.settings import ExtractSettings, InferSettings
from wsi_idc.store import open_store
from wsi_idc.view.pixels import TILE, Pixels
from wsi_idc.view.server import Views, make_app, serving


@pytest.fixture
def store(scored):
    return scored


@pytest.fixture
def client(store):
    told = []
    app = make_app(Views(store, Choice("mean"), 0.5), told.append)
    yield app.test_client()
    assert not told


def get(client, path, host="127.0.0.1:80", status=200):
    answer = client.get(path, base_url=f"http://{host}")
    assert answer.status_code == status, answer.text
    return answer


def test_pictures_are_the_slides_own_pixels(client, slides):
    import tifffile

    pixels = tifffile.imread(slides.parent / "a.tif").astype(int)
    content = get(client, "/slides/a/pictures/1/1/0.jpg").data
    picture = np.asarray(Image.open(BytesIO(content)).convert("RGB")).astype(int)
    assert picture.shape == (TILE, TILE, 3)
    width = 500 - TILE
    smooth = np.abs(picture[:, :width].mean((0, 1)) - pixels[:TILE, TILE:].mean((0, 1)))
    assert smooth.max() < 2
    assert (picture[:, width + 16 :] > 250).all()
    glass = np.abs(picture[:80, :width] - 244)
    assert glass.max() < 12


def test_the_coarsest_picture_holds_the_whole_slide(store):
    pixels = Pixels(store.slide("a"))
    assert pixels.zooms == 1 and pixels.size == (500, 400) and pixels.note == ""
    whole = np.asarray(Image.open(BytesIO(pixels.picture(0, 0, 0))).convert("RGB")).astype(int)
    assert np.abs(whole[110, 120] - (170, 90, 150)).max() < 40 and (whole[:, 252:] > 250).all()
    for place in ((0, 5, 5), (7, 0, 0), (1, 2, 0)):
        assert (np.asarray(Image.open(BytesIO(pixels.picture(*place)))) > 250).all()


def test_a_slide_whose_file_is_gone_is_shown_by_its_thumbnail(store, slides):
    (slides.parent / "a.tif").unlink()
    pixels = Pixels(store.slide("a"))
    assert "thumbnail is shown" in pixels.note
    height, width = store.slide("a").thumbnail.shape[:2]
    assert pixels.size == (width, height) and pixels.mpp[0] * width == pytest.approx(2000)
    whole = np.asarray(Image.open(BytesIO(pixels.picture(0, 0, 0))).convert("RGB")).astype(int)
    assert np.abs(whole[height // 2, width // 2] - (170, 90, 150)).max() < 40


def test_a_file_that_was_replaced_is_not_shown_below_the_old_map(store, slides, make):
    make.tissue_slide(slides.parent / "a.tif", seed=9)
    assert "no longer, the one that was extracted" in Pixels(store.slide("a")).note


def test_regions_are_those_of_the_asked_threshold(client, store):
    for threshold in (0.5, 0.54):
        found = json.loads(get(client, f"/slides/a/regions?threshold={threshold}").data)
        regions = look(store, Choice("mean"), "a", threshold).regions
        assert found["regions"]["mean"] == [round(region.mean, 3) for region in regions]
        assert len(found["outlines"]["xs"]) == len(regions)
    for wrong in ("", "?threshold=2", "?threshold=x"):
        get(client, f"/slides/a/regions{wrong}", status=400)


def test_every_slide_is_listed_and_one_without_a_map_says_why(client):
    page = get(client, "/").text
    assert "href='/slides/a/'" in page and "not extracted (" in page and "Research use only" in page
    assert "not extracted" in get(client, "/slides/broken/", status=404).text
    for odd in ("<b>", "%00", "x" * 3000):
        answer = get(client, f"/slides/{odd}/", status=404).text
        assert "no such slide" in answer and "<b>" not in answer and len(answer) < 2000


def test_a_page_of_another_site_gets_nothing(client):
    get(client, "/", host="evil.example", status=403)
    get(client, "/slides/a/regions?threshold=0.5", host="127.0.0.1.evil.example:80", status=403)
    assert "frame-ancestors 'none'" in get(client, "/", host="localhost:1").headers["Content-Security-Policy"]


def test_the_page_says_what_it_may_be_used_for_and_no_name_is_markup(store, slides, make, recorder, bundle):
    name = "a & 'b'"
    make.tissue_slide(slides.parent / "c.tif", seed=5)
    slides.write_text(f'path,slide_id\nc.tif,"{name}"\n')
    extract(read_manifest(slides), store.address, ExtractSettings(), listener=recorder)
    infer(store.address, read_bundle(bundle), InferSettings(), listener=recorder)
    client = make_app(Views(store, Choice("mean"), None), print).test_client()
    assert "/slides/a%20%26%20%27b%27/" in get(client, "/").text
    page = get(client, "/slides/a%20%26%20%27b%27/").text
    assert "<title>a &amp; &#39;b&#39;: P(IDC)</title>" in page and "Research use only" in page


@contextmanager
def shown(store, choice):
    with serving(Views(store, choice, None), 0, print) as (server, url):
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield url
        finally:
            server.shutdown()
            thread.join()


def test_a_real_slide_in_chromium(browser, shared_data, tmp_path, recorder):
    (tmp_path / "m.csv").write_text(f"path\n{shared_data / 'slides' / 'CMU-1-Small-Region.svs'}\n")
    extract(read_manifest(tmp_path / "m.csv"), tmp_path / "t.zarr", ExtractSettings(), listener=recorder)
    infer(tmp_path / "t.zarr", read_bundle(SHIPPED), InferSettings(), listener=recorder)
    store = open_store(tmp_path / "t.zarr")
    name = "CMU-1-Small-Region"
    result = look(store, Choice("idc-resnet50"), name)
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    wrong, asked = [], set()
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.add(request.url))
    with shown(store, Choice("idc-resnet50")) as url:
        page.goto(f"{url}slides/{name}/")
        page.wait_for_function("Bokeh.documents.length && Bokeh.documents[0].is_idle")
        model = "Bokeh.documents[0].get_model_by_name"
        # The pointer, in the middle of a tile, reads what the store has of it.
        row, column = result.cell[5].tolist()
        x, y = (column + 0.5) * 200, -(row + 0.5) * 200
        place = page.evaluate(
            """([x, y]) => {
                const view = Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name("plot"));
                const frame = view.frame, box = view.canvas_view.el.getBoundingClientRect();
                return [box.x + frame.x_scale.compute(x), box.y + frame.y_scale.compute(y)];
            }""",
            [x, y],
        )
        page.mouse.move(*place)
        text = page.evaluate(f"{model}('pointer').text")
        assert text == f"P(IDC) {result.probability[5]:.3f}, row {row}, column {column}"
        page.evaluate(f"{model}('opacity').value = 0.9")
        assert page.evaluate(f"{model}('map').glyph.global_alpha.value ?? {model}('map').glyph.global_alpha") == 0.9
        least = float(np.median(result.probability))
        page.evaluate(f"{model}('only').active = true; {model}('threshold').value = {least}")
        expected = int((result.probability >= least).sum())
        called = page.evaluate(f"{model}('called').text")
        assert called.startswith(f"{expected} of {len(result.probability)} tiles")
        visible = page.evaluate(f"{model}('map').data_source.data.image[0].filter((p) => !isNaN(p)).length")
        assert visible == expected
        page.evaluate(f"{model}('threshold').value_throttled = {least}")
        page.wait_for_function(f"{model}('regions').source.get_length() > 0")
        before = page.evaluate(f"{model}('plot').x_range.start")
        page.evaluate(f"{model}('regions').source.selected.indices = [0]")
        assert page.evaluate(f"{model}('plot').x_range.start") != before
        page.wait_for_load_state("networkidle")
    assert not wrong
    assert any("/pictures/" in request for request in asked)
    assert all(request.startswith((url, "data:", "blob:")) for request in asked)


def test_the_command_serves_this_machine_until_ctrl_c(store):
    command = [sys.executable, "-m", "wsi_idc.cli", "view", "a", "--store", store.address, "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = json.loads(process.stdout.readline())["url"]
        port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/slides/a/", url)[1])
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert b"Research use only" in answer.read()
        if shutil.which("ss"):
            listening = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=True).stdout
            assert [line.split()[3] for line in listening.splitlines() if f":{port}" in line] == [f"127.0.0.1:{port}"]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()


def test_what_hinders_is_one_line(store, wsi_idc):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = wsi_idc("view", "--store", store.address, "--port", taken.getsockname()[1])
    assert result.returncode == 2 and "cannot be had" in result.stderr and len(result.stderr.splitlines()) == 1
    result = wsi_idc("view", "c", "--store", store.address)
    assert result.returncode == 2 and result.stderr.startswith("wsi-idc: c: no such slide in the store")


def test_a_class_that_is_markup_is_text(browser, slides, make, tmp_path, recorder):
    name = "<img src=x onerror=alert(1)>"
    bundle = make.write_bundle(tmp_path / "odd", classes=["non", name])
    extract(read_manifest(slides), tmp_path / "t.zarr", ExtractSettings(), listener=recorder)
    infer(tmp_path / "t.zarr", read_bundle(bundle), InferSettings(), only=["a"], listener=recorder)
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    said = []
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    with shown(open_store(tmp_path / "t.zarr"), Choice("mean")) as url:
        page.goto(f"{url}slides/a/")
        page.wait_for_function("Bokeh.documents.length && Bokeh.documents[0].is_idle")
        for x in range(500, 1100, 60):
            page.mouse.move(x, 400)
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.querySelectorAll('img[src=x]').length") == 0
    assert not said
