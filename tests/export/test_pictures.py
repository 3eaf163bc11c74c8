"""The picture of a map shows the slide, the probabilities in their places, and what it may be used for."""

import numpy as np
import pytest
from PIL import Image

from wsi_idc.errors import UsageError
from wsi_idc.export.pictures import draw_map


def test_a_map_is_drawn_beside_its_slide(store, tmp_path):
    draw_map(store, "mean", "a", tmp_path / "a.png")
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    assert picture.shape[1] == 1210
    left, right = picture[:, :600], picture[:, 600:1080]
    tissue = np.abs(left - (170, 90, 150)).max(axis=2) < 40
    assert tissue.mean() > 0.1
    assert (np.abs(right - (170, 90, 150)).max(axis=2) < 25).mean() < 0.01


def test_a_map_that_is_not_there_is_one_line(store, tmp_path):
    with pytest.raises(UsageError, match="has no map by other"):
        draw_map(store, "other", "a", tmp_path / "a.png")
    with pytest.raises(UsageError, match="cannot be written"):
        draw_map(store, "mean", "a", tmp_path / "none" / "a.png")
