"""The demo shows the main job, its failure included."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

from wsi_idc.console import Console
from wsi_idc.demo import run_demo
from wsi_idc.model.bundle import SHIPPED
from wsi_idc.store import open_store


def test_the_demo_makes_slides_scores_them_and_draws_their_maps(tmp_path, capsys):
    run_demo(tmp_path, Console())
    output = capsys.readouterr()
    assert "failed demo-broken: cannot read the region at x " in output.err
    assert "their maps say nothing of how good the model is" in output.out
    assert "Research use only" in output.out
    store = open_store(tmp_path / "tiles.zarr")
    assert store.slide_ids() == ["demo-annotated", "demo-pen"]
    for name in store.slide_ids():
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.size[0] > 1000
            assert np.asarray(picture.convert("RGB")).std() > 20
    slide = store.slide("demo-annotated")
    probability = store.map(SHIPPED.name, "demo-annotated").read("probability")
    assert roc_auc_score(slide.idc > 0.5, probability) > 0.9
    assert len(list(tmp_path.glob("demo-*.tif"))) == 3


def test_the_demos_pen_is_not_kept_as_tissue_and_a_second_demo_goes_on(tmp_path, capsys):
    run_demo(tmp_path, Console(verbosity=-1))
    slide = open_store(tmp_path / "tiles.zarr").slide("demo-pen")
    thumbnail = slide.thumbnail.astype(int)
    mask = slide.tissue_mask
    blue = (thumbnail[..., 2] > thumbnail[..., 0] + 60) & (thumbnail[..., 0] < 90)
    assert blue.sum() > 500
    assert mask[blue].mean() < 0.02
    run_demo(tmp_path, Console())
    assert "nothing to do, 2 slides are up to date" in capsys.readouterr().out


def test_the_package_needs_no_file_that_it_does_not_ship():
    assert (Path(__file__).parent.parent / "LICENSE").is_file()
