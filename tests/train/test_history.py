"""The course of a training is one table and a plot in which every epoch can be seen."""

import io

import numpy as np
from PIL import Image

from wsi_idc.train.history import draw_history, merge_logs

LOG = "epoch,train_loss,val_loss,val_auc,lr\n"


def test_an_epoch_that_a_later_attempt_did_again_is_the_later_ones(tmp_path):
    for attempt, rows in (("000", "0,0.7,0.6,0.5,0.1\n1,0.5,0.5,0.6,0.1\n"), ("001", "1,0.4,0.3,0.9,0.1\n")):
        (tmp_path / attempt).mkdir()
        (tmp_path / attempt / "metrics.csv").write_text(LOG + rows)
    assert [(row["epoch"], row["val_auc"]) for row in merge_logs(tmp_path)] == [(1, 0.5), (2, 0.9)]


def test_a_single_epoch_can_be_seen_in_both_panels():
    def picture(loss):
        rows = [{"epoch": 1, "train_loss": loss, "val_loss": loss, "val_auc": loss, "lr": 0.1}]
        return np.asarray(Image.open(io.BytesIO(draw_history(rows))).convert("RGB")).astype(int)

    drawn, empty = picture(0.6), picture(float("nan"))
    assert drawn.shape == empty.shape
    orange = np.abs(drawn - (255, 127, 14)).sum(axis=2) < 40
    half = drawn.shape[1] // 2
    # The legend's own line is orange too: there is more in the panel than that.
    assert orange[:, half:].sum() > 10
    assert orange[:, :half].sum() > (np.abs(empty - (255, 127, 14)).sum(axis=2) < 40)[:, :half].sum()
