"""Pixels and batches: the right tiles, in an order that the seed decides."""

import numpy as np
import pytest

from wsi_idc import store as store_module
from wsi_idc.errors import StoreError
from wsi_idc.store import hold_store
from wsi_idc.train.data import Order, labelled_tiles, read_pixels


@pytest.mark.parametrize("limit", [1e9, 1.0], ids=["in memory", "memory-mapped"])
def test_pixels_are_those_of_the_chosen_tiles(make_store, make, patients, tmp_path, monkeypatch, limit):
    monkeypatch.setattr("wsi_idc.store.slide.CHUNK_BYTES", 1)
    monkeypatch.setattr("wsi_idc.store.slide.CHUNKS_PER_SHARD", 5)
    store = make_store(patients, unknown=2)
    tiles = labelled_tiles(store)
    chosen = np.flatnonzero(np.random.default_rng(0).random(len(tiles)) < 0.4)
    pixels = read_pixels(tiles, chosen, tmp_path / "work" / "tiles.npy", limit)
    assert isinstance(pixels, np.memmap) == (limit == 1.0)
    for place, own in zip(chosen, pixels, strict=True):
        of_slide = make.pixels_of(store.slide(str(tiles.slide[place])))
        assert np.array_equal(of_slide[int(tiles.row[place])], own)


def test_a_store_without_pixels_is_a_clear_line(make_store, patients):
    store = make_store(patients)
    complete = store.slide_node("slide-b").record().complete
    del complete["checksums"]["tiles"]
    with hold_store(store.address) as held:
        held.slide_node("slide-b").update({"complete": complete})
    with pytest.raises(StoreError, match="slide-b: its tiles' pixels were not kept"):
        labelled_tiles(store)


def test_slides_of_two_grids_are_refused(make_store, patients):
    make_store(patients)
    store = make_store({"z": "train"}, size=20)
    with pytest.raises(StoreError, match="different grids"):
        labelled_tiles(store_module.open_store(store.address))


def test_labels_and_patients_are_part_of_the_identity(make_store, patients):
    store = make_store(patients)
    before = labelled_tiles(store).identity
    assert labelled_tiles(store).identity == before
    with hold_store(store.address) as held:
        held.slide_node("slide-c").update({"split": "val"})
    assert labelled_tiles(store).identity != before


def test_each_epoch_has_its_own_order_and_the_same_one_again():
    first, again = Order(100, 16, seed=5), Order(100, 16, seed=5)
    assert len(first) == 6
    epochs = []
    for order in (first, again):
        order.set_epoch(3)
        epochs.append(np.concatenate(list(order)))
    assert np.array_equal(*epochs)
    assert len(set(epochs[0].tolist())) == 96
    first.set_epoch(4)
    assert not np.array_equal(np.concatenate(list(first)), epochs[0])


def test_processes_share_each_batch_between_them():
    whole = list(Order(100, 16, seed=5))
    parts = [list(Order(100, 16, seed=5, rank=rank, world=2)) for rank in range(2)]
    for batch, left, right in zip(whole, *parts, strict=True):
        assert len(left) == len(right) == 8
        assert sorted([*left, *right]) == sorted(batch)


def test_validation_covers_every_tile_once_in_order():
    assert np.concatenate(list(Order(100, 16, seed=None))).tolist() == list(range(100))


def test_balanced_sampling_draws_both_classes_alike():
    positive = np.arange(1000) < 50
    drawn = np.concatenate(list(Order(1000, 10, seed=0, positive=positive)))
    assert 0.45 < positive[drawn].mean() < 0.55
