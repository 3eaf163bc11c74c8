"""Splits are by patient, whatever happens."""

import numpy as np
import pytest

from wsi_idc.errors import StoreError, UsageError
from wsi_idc.store import hold_store
from wsi_idc.train.data import labelled_tiles
from wsi_idc.train.settings import TrainSettings
from wsi_idc.train.splits import make_folds, make_split


def silent(line: str) -> None:
    raise AssertionError(line)


def sides(tiles, split):
    parts = (split.train, split.val, split.held_out)
    return [sorted(set(tiles.patient[places].tolist())) for places in parts]


def test_the_manifest_decides_and_test_patients_are_never_used(make_store, patients):
    tiles = labelled_tiles(make_store(patients))
    split = make_split(tiles, TrainSettings(), silent)
    assert sides(tiles, split) == [["a", "b", "c", "d"], ["e", "f"], []]


def test_without_val_patients_a_part_of_the_patients_validates_and_the_seed_decides_which(make_store):
    tiles = labelled_tiles(make_store({f"p{number}": "" for number in range(10)}))
    found = [sides(tiles, make_split(tiles, TrainSettings(val_split=0.3, seed=seed), silent)) for seed in (0, 0, 1, 2)]
    assert found[0] == found[1]
    assert len({str(split) for split in found}) > 1
    for train, val, _ in found:
        assert not set(train) & set(val)
        assert len(train) + len(val) == 10
        assert 2 <= len(val) <= 4


def test_each_fold_holds_out_other_patients_and_val_patients_stay_val(make_store, patients):
    tiles = labelled_tiles(make_store(patients))
    folds = [sides(tiles, split) for split in make_folds(tiles, TrainSettings(folds=2))]
    assert sorted(folds[0][2] + folds[1][2]) == ["a", "b", "c", "d"]
    for train, val, out in folds:
        assert val == ["e", "f"]
        assert sorted(train + out) == ["a", "b", "c", "d"]


def test_patients_whom_the_first_weights_have_seen_train_in_every_fold(make_store, patients):
    tiles = labelled_tiles(make_store(patients))
    folds = list(make_folds(tiles, TrainSettings(folds=2), {"a", "b", "not here"}))
    assert sorted(name for fold in folds for name in set(tiles.patient[fold.held_out].tolist())) == ["c", "d"]
    for fold in folds:
        assert {"a", "b"} < set(tiles.patient[fold.train].tolist())
        assert (np.diff(fold.train) > 0).all()


def test_folds_of_an_earlier_cross_validation_are_parted_further(make_store):
    tiles = labelled_tiles(make_store(dict.fromkeys("abcdefgh", "") | {"v": "val", "w": "val"}))
    within = [["a", "c", "e", "g"], ["b", "d", "f"]]
    folds = [sides(tiles, split) for split in make_folds(tiles, TrainSettings(folds=4), ["h"], within)]
    assert sorted(folds[0][2] + folds[1][2]) == within[0]
    assert sorted(folds[2][2] + folds[3][2]) == within[1]
    for train, _, out in folds:
        assert sorted(train + out) == list("abcdefgh")
    whole = [sides(tiles, split)[2] for split in make_folds(tiles, TrainSettings(folds=2), ["h"], within)]
    assert whole == within
    with pytest.raises(UsageError, match="--folds 3: is no multiple of the 2 folds"):
        next(make_folds(tiles, TrainSettings(folds=3), ["h"], within))
    with pytest.raises(UsageError, match="1 patients were neither trained on nor held out"):
        next(make_folds(tiles, TrainSettings(folds=2), [], within))


def test_folds_without_val_patients_make_their_own_from_the_training_part(make_store):
    tiles = labelled_tiles(make_store({f"p{number}": "" for number in range(9)}))
    for split in make_folds(tiles, TrainSettings(folds=3)):
        train, val, out = sides(tiles, split)
        assert sorted(train + val + out) == sorted(f"p{number}" for number in range(9))


def test_two_slides_of_one_patient_on_two_sides_are_refused(make_store, patients):
    store = make_store(patients)
    with hold_store(store.address) as held:
        held.slide_node("slide-e").update({"patient_id": "a"})
    with pytest.raises(UsageError, match=r"patient a: is in 'train' and in 'val'"):
        make_split(labelled_tiles(store), TrainSettings(), silent)


def test_a_random_split_is_made_only_with_a_warning(make_store, patients):
    tiles = labelled_tiles(make_store(patients))
    lines: list[str] = []
    split = make_split(tiles, TrainSettings(split_by="tile"), lines.append)
    assert "warning" in lines[0]
    train, val, _ = sides(tiles, split)
    assert set(train) & set(val)
    assert "g" not in train + val
    assert not set(split.train) & set(split.val)


def test_one_patient_only_is_a_clear_line(make_store):
    with pytest.raises(UsageError, match="labelled tiles of 1 patient, at least 2 are needed"):
        make_split(labelled_tiles(make_store({"a": ""})), TrainSettings(), silent)


def test_one_class_only_is_a_clear_line(make_store, patients):
    tiles = labelled_tiles(make_store(patients, labels=(0.0, 0.2)))
    with pytest.raises(UsageError, match="split train: all 96 labelled tiles are non-IDC"):
        make_split(tiles, TrainSettings(), silent)


def test_a_store_without_labels_is_a_clear_line(make_store, patients):
    with pytest.raises(StoreError, match="has no labels"):
        labelled_tiles(make_store(patients, labels=(float("nan"),)))


def test_unknown_tiles_are_left_out_and_counted(make_store, patients):
    tiles = labelled_tiles(make_store(patients, unknown=3))
    assert tiles.unknown == 3 * len(patients)
    assert len(tiles) == 21 * len(patients)
    assert not np.isnan(tiles.part).any()


def test_a_tile_is_positive_from_the_part_that_is_set(make_store, patients):
    tiles = labelled_tiles(make_store(patients, labels=(0.2, 0.5, 0.8, 1.0)))
    assert [tiles.positive(part).mean() for part in (0.2, 0.5, 0.6, 1.0)] == [1.0, 0.75, 0.5, 0.25]
