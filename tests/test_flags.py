"""What a person should look at is flagged, and what is as it should be is not."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsi_idc import flags as module
from wsi_idc.extract import extract
from wsi_idc.flags import USUAL, Flag, flags, stain_distance, usual
from wsi_idc.grid import Grid
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.settings import CutSettings, ExtractSettings, InferSettings
from wsi_idc.slides import open_slide
from wsi_idc.store import open_store
from wsi_idc.tissue import stain, tissue_mask
from wsi_idc.work.cut import find_tissue

GLASS = 244
BLUE_INK = (30, 90, 170)


@pytest.fixture
def store_of(tmp_path, recorder):
    """Extracts pictures (name -> uint8 (h, w, 3) at 4.0 um/px, or a file) into a store; scores them with a bundle."""

    def run(pictures, make, bundle=None, mpp=None, **settings):
        lines = []
        for name, pixels in pictures.items():
            path = pixels if isinstance(pixels, Path) else make.write_tiff(tmp_path / f"{name}.tif", pixels)
            lines.append(f"{path},{name},{mpp or ''}")
        manifest = tmp_path / "manifest.csv"
        manifest.write_text("\n".join(["path,slide_id,mpp", *lines]))
        address = tmp_path / "tiles.zarr"
        summary = extract(read_manifest(manifest), address, ExtractSettings(**settings), listener=recorder)
        assert not summary.failures
        if bundle is not None:
            infer(address, read_bundle(bundle), InferSettings(), listener=recorder)
        return open_store(address)

    return run


def on_glass(tissue, margin=100):
    height, width = (side + 2 * margin for side in tissue.shape[:2])
    pixels = np.full((height, width, 3), GLASS, np.uint8)
    pixels[margin:-margin, margin:-margin] = tissue
    return pixels


def stained(make, width=300, height=300, sharp=True, seed=0):
    """Tissue in the colours that the training patients' slides have in the median: uint8 (height, width, 3)."""
    colour = 256 * 10.0 ** -np.array(usual().stain.median) - 1
    grain = make.texture(width, height, seed).astype(int) - (170, 90, 150)
    return np.clip(colour + (grain if sharp else grain / 20), 0, 255).astype(np.uint8)


def kinds(found):
    return [flag.kind for flag in found]


def reason(found, kind):
    (flag,) = [flag for flag in found if flag.kind == kind]
    return flag.reason


# --- the slide ----------------------------------------------------------------------------------------------------


def test_a_slide_as_it_should_be_has_no_flag(store_of, make, tmp_path):
    bundle = make.write_bundle(tmp_path / "bundle", threshold=0.3)
    store = store_of({"a": on_glass(stained(make))}, make, bundle)
    assert flags(store.slide("a"), store.map("mean", "a")) == []


def test_of_a_slide_without_tissue_the_step_that_left_none_is_named(store_of, make):
    rng = np.random.default_rng(0)
    glass = np.clip(GLASS + rng.integers(-2, 3, (400, 400, 1)), 0, 255).repeat(3, 2).astype(np.uint8)
    inked = glass.copy()
    inked[100:300, 100:300] = BLUE_INK
    inked[180:200, 120:260] = (170, 90, 150)  # colours of tissue, under the ink's blur
    speck = glass.copy()
    speck[200:218, 200:218] = (170, 90, 150)
    pictures = {
        "glass": glass,
        "plain": np.full((400, 400, 3), GLASS, np.uint8),
        "dark": glass - 220,
        "inked": inked,
        "speck": speck,
    }
    store = store_of(pictures, make)
    found = {name: reason(flags(store.slide(name)), "no tissue") for name in pictures}
    assert found["glass"] == "nothing on it has the colours of tissue"
    assert found["plain"] == "the whole slide has one colour"
    assert "background is dark" in found["dark"]
    assert "most was taken off as ink" in found["inked"]
    assert "most was taken off as small, grey or hardly stained pieces" in found["speck"]


def test_tissue_that_is_nowhere_enough_for_a_tile_is_another_reason(store_of, make):
    store = store_of({"a": on_glass(stained(make, 60, 60), 120)}, make, min_tissue=1.0)
    assert "no tile has as much of it as --min-tissue asks" in reason(flags(store.slide("a")), "no tissue")


def test_an_empty_mask_of_the_manifest_is_the_manifests(tmp_path, make, recorder):
    make.tissue_slide(tmp_path / "a.tif")
    Image.new("L", (500, 400)).save(tmp_path / "m.png")
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("path,mask\na.tif,m.png\n")
    extract(read_manifest(manifest), tmp_path / "tiles.zarr", ExtractSettings(), listener=recorder)
    found = flags(open_store(tmp_path / "tiles.zarr").slide("a"))
    assert reason(found, "no tissue") == "the manifest's mask marks none"


def test_the_steps_of_a_mask_add_up_to_what_is_tissue(shared_data):
    with Image.open(shared_data / "tissue" / "pen_red.png") as picture:
        thumbnail = np.asarray(picture.convert("RGB"))
    steps: dict[str, float] = {}
    mask = tissue_mask(thumbnail, 12.0, steps=steps)
    assert sum(steps.values()) == pytest.approx(mask.mean(), abs=1e-4)
    assert steps["ink"] < -0.01


def test_a_slide_that_is_nearly_all_tissue_is_flagged_unless_that_was_asked_for(store_of, make):
    assert "nearly all tissue" in kinds(flags(store_of({"a": stained(make)}, make).slide("a")))
    assert kinds(flags(store_of({"a": stained(make)}, make, tissue="none").slide("a"))) == []


def test_um_px_of_the_manifest_that_differs_from_the_files_is_flagged(store_of, make):
    pictures = {"a": on_glass(stained(make))}
    assert kinds(flags(store_of(pictures, make, mpp=4.1).slide("a"))) == []
    found = flags(store_of(pictures, make, mpp=5.0).slide("a"))
    assert reason(found, "um/px") == "the manifest says 5 um/px and the file 4, 1.25 times apart"


def test_what_is_missing_from_a_file_is_flagged_and_another_warning_is_not(store_of, make, tmp_path):
    import tifffile

    path = make.write_tiff(tmp_path / "a.tif", on_glass(stained(make)))
    with tifffile.TiffFile(path) as tif:
        tags = [tif.pages[0].tags[name] for name in ("TileOffsets", "TileByteCounts")]
    content = bytearray(path.read_bytes())
    for tag in tags:
        width = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
        content[tag.valueoffset : tag.valueoffset + width] = bytes(width)
    path.write_bytes(content)
    store = store_of({"a": path}, make, mpp=5.0)
    assert len(store.slide("a").attributes["warnings"]) == 3  # and that its tiles are upsampled
    assert kinds(flags(store.slide("a"))) == ["um/px", "damage"]
    assert "1 of the 16 stored tiles" in reason(flags(store.slide("a")), "damage")


def test_a_slide_of_an_earlier_version_has_fewer_flags_and_is_read_all_the_same(store_of, make):
    store = store_of({"a": stained(make), "b": np.full((200, 200, 3), GLASS, np.uint8)}, make)
    for name in "ab":
        path = Path(store.address) / "slides" / name / "zarr.json"
        document = json.loads(path.read_text())
        for key in ("tissue_steps", "stain", "mpp_file", "icc", "damage"):
            del document["attributes"][key]
        path.write_text(json.dumps(document))
    assert flags(store.slide("a")) == []
    assert "kept no reason" in reason(flags(store.slide("b")), "no tissue")


# --- stain --------------------------------------------------------------------------------------------------------


def thumbnail_of(path, **settings):
    with open_slide(path) as slide:
        grid = Grid(CutSettings().tile, slide.size, slide.mpp)
        thumbnail, mask, *_ = find_tissue(slide, CutSettings(**settings), None, grid)
    return thumbnail, mask


def is_unlike(thumbnail, mask):
    return stain_distance(stain(thumbnail, mask)) > usual().stain.limit


def test_a_real_slide_is_like_the_training_tiles_until_its_colours_are_changed(idc_slide):
    patient = "14306"
    thumbnail, mask = thumbnail_of(idc_slide(patient) / f"idc-{patient}.tif")
    assert not is_unlike(thumbnail, mask)
    assert not is_unlike(*thumbnail_of(idc_slide(patient) / patient))
    grey = thumbnail.mean(2, keepdims=True).repeat(3, 2)
    changed = {
        "blue": thumbnail * np.array((0.75, 1, 1)),
        "yellow": thumbnail * np.array((1, 1, 0.8)),
        "dark": thumbnail * 0.7,
        "grey": grey,
        "inverted": 255 - thumbnail.astype(float),
        "grey and inverted": 255 - grey,
    }
    for what, pixels in changed.items():
        assert is_unlike(pixels.astype(np.uint8), mask), what


def test_a_fluorescence_slide_is_flagged_as_what_it_is(store_of, make, shared_data):
    path = shared_data / "slides" / "fluorescence-387.ndpi"
    assert "fluorescence" in reason(flags(store_of({"a": path}, make).slide("a")), "no tissue")
    assert is_unlike(*thumbnail_of(path, tissue="none"))


def test_too_little_tissue_has_no_stain():
    thumbnail = np.full((60, 60, 3), (170, 90, 150), np.uint8)
    mask = np.zeros((60, 60), bool)
    assert stain(thumbnail, mask) is None
    mask[:20] = True
    assert stain(np.full((60, 60, 3), 250, np.uint8), np.ones((60, 60), bool)) is None
    assert stain(thumbnail, np.ones((60, 60), bool)) == pytest.approx([0.1755, 0.4492, 0.2293], abs=1e-3)


# --- the map ------------------------------------------------------------------------------------------------------


def test_a_map_of_one_value_is_flagged_and_one_that_varies_is_not(store_of, make, tmp_path):
    flat = stained(make, 400, 400)
    varied = (flat * np.linspace(0.2, 1, 400)[None, :, None]).astype(np.uint8)
    bundle = make.write_bundle(tmp_path / "bundle", threshold=0.3)
    store = store_of({"flat": flat, "varied": varied}, make, bundle, tissue="none")
    assert "64 tiles have the same probability" in reason(
        flags(store.slide("flat"), store.map("mean", "flat")), "one value"
    )
    assert "one value" not in kinds(flags(store.slide("varied"), store.map("mean", "varied")))


def test_high_tiles_that_are_blurred_or_inked_are_flagged(store_of, make, tmp_path):
    inked = stained(make)
    inked[:, :150] = make.texture(150, 300) - np.array((170, 90, 150)) + BLUE_INK
    pictures = {"sharp": stained(make), "blurred": stained(make, sharp=False), "inked": inked}
    bundle = make.write_bundle(tmp_path / "bundle", threshold=0.2)
    store = store_of(pictures, make, bundle, tissue="none")
    found = {name: kinds(flags(store.slide(name), store.map("mean", name))) for name in pictures}
    assert not {"high on blur", "high on ink"} & set(found["sharp"])
    assert "high on blur" in found["blurred"] and "high on ink" not in found["blurred"]
    assert "high on ink" in found["inked"] and "high on blur" not in found["inked"]
    none_high = make.write_bundle(tmp_path / "high", threshold=0.99, name="high")
    infer(store.address, read_bundle(none_high), InferSettings(), listener=lambda _: _Deaf())
    assert "high on blur" not in kinds(flags(store.slide("blurred"), store.map("high", "blurred")))


class _Deaf:
    def __getattr__(self, name):
        return lambda *_: None


def test_without_pixels_tiles_are_judged_by_what_infer_read(store_of, make, tmp_path):
    bundle = make.write_bundle(tmp_path / "bundle", threshold=0.2)
    picture = {"a": on_glass(stained(make, sharp=False) // 2)}
    store = store_of(picture, make, bundle, pixels=False)
    found = kinds(flags(store.slide("a"), store.map("mean", "a")))
    assert {"stain", "high on blur"} <= set(found)
    kept = store_of(picture, make, bundle)
    assert found == kinds(flags(kept.slide("a"), kept.map("mean", "a")))


def test_the_sharpness_of_other_resolutions_is_not_judged(store_of, make, tmp_path):
    from wsi_idc.settings import TileSpec

    bundle = make.write_bundle(tmp_path / "bundle", mpp=5.0, threshold=0.2)
    picture = {"a": stained(make, sharp=False)}
    store = store_of(picture, make, bundle, tissue="none", tile=TileSpec(mpp=5.0))
    assert "high on blur" not in kinds(flags(store.slide("a"), store.map("mean", "a")))


def test_a_map_is_held_against_what_the_same_model_said_of_validation_slides(store_of, make, tmp_path, monkeypatch):
    store = store_of({"a": on_glass(stained(make))}, make, make.write_bundle(tmp_path / "bundle", threshold=0.3))
    slide, map = store.slide("a"), store.map("mean", "a")
    model, probability = map.attributes["model"], map.read("probability")

    def known(**fields):
        maps = usual().maps.model_copy(
            update={"model": "mean", "digests": (model["digest"],), "highest": -9.0, **fields}
        )
        changed = usual().model_copy(update={"maps": maps})
        with monkeypatch.context() as patched:
            patched.setattr(module, "usual", lambda: changed)
            return kinds(module.of_map(slide, model, probability, probability, slide.blur, slide.pen))

    assert known() == ["beyond validation"]
    assert known(highest=9.0) == known(model="other") == known(digests=("other",)) == []


def test_a_stale_map_is_left_alone(store_of, make, tmp_path, recorder):
    bundle = make.write_bundle(tmp_path / "bundle", threshold=0.3)
    store = store_of({"a": stained(make, 400, 400)}, make, bundle, tissue="none")
    assert "one value" in kinds(flags(store.slide("a"), store.map("mean", "a")))
    store = store_of({"a": stained(make, 400, 400, seed=1)}, make, tissue="none")
    assert store.map("mean", "a").state(store.slide("a")).kind == "stale"
    assert flags(store.slide("a"), store.map("mean", "a")) == flags(store.slide("a")) == []


def test_of_several_classes_no_tile_is_high(store_of, make, tmp_path):
    bundle = make.write_bundle(tmp_path / "bundle", outputs=3, classes=["a", "b", "c"])
    store = store_of({"a": stained(make, 400, 400, sharp=False)}, make, bundle, tissue="none")
    assert flags(store.slide("a"), store.map("mean", "a")) == []


# --- what is known ------------------------------------------------------------------------------------------------


def test_a_flag_reads_as_a_line_and_a_profile_is_only_to_be_known_of():
    assert str(Flag("stain", "unlike")) == "stain: unlike"
    assert Flag("stain", "").suspicious and not Flag("ICC profile", "").suspicious


def test_the_training_patients_median_is_in_the_middle_of_what_is_usual():
    assert stain_distance(list(usual().stain.median)) == 0


def test_what_the_documentation_says_of_false_alarms_is_what_was_measured():
    text = " ".join((Path(__file__).parent.parent / "docs" / "flags.md").read_text().split())
    known = usual()
    for measured in (known.stain.false_alarms, known.high.blur_false_alarms, known.high.pen_false_alarms):
        assert f"{measured.flagged} of {measured.of}" in text


@pytest.mark.slow
def test_what_is_usual_is_what_the_data_say(shared_data, tmp_path):
    place = Path(__file__).with_name("calibrate_flags.py")
    spec = importlib.util.spec_from_file_location("calibrate_flags", place)
    calibrate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(calibrate)
    found = calibrate.measure(shared_data / "idc", tmp_path).model_dump()
    committed = json.loads(USUAL.read_text())
    assert found["high"] == committed["high"] and found["maps"]["digests"] == tuple(committed["maps"]["digests"])
    assert np.allclose(found["stain"]["covariance"], committed["stain"]["covariance"], rtol=1e-3)
    assert found["stain"]["limit"] == pytest.approx(committed["stain"]["limit"], rel=1e-3)
    assert found["maps"]["highest"] == pytest.approx(committed["maps"]["highest"], abs=0.05)
