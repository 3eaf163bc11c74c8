"""The recipes are what they say, and every setting says whether it changes the result."""

from dataclasses import replace
from pathlib import Path

import pytest

from wsi_idc.errors import UsageError
from wsi_idc.model.bundle import SHIPPED, read_bundle
from wsi_idc.settings import build
from wsi_idc.train.settings import AUGMENTATIONS, RECIPES, TrainSettings


def test_the_seed_recipe_is_exactly_what_it_says():
    recipe = TrainSettings(recipe="seed").resolve()
    how = AUGMENTATIONS[recipe.augmentation]
    config = TrainSettings(recipe="seed").network_config(96)
    assert config.kind == "resnet50"
    assert config.input_px == 50
    assert config.tile_px == 96
    assert config.contrast == "stretch"
    assert config.activation == "elu"
    assert (how.rotation_deg, how.shift, how.shear_deg, how.zoom, how.mirror) == (20, 0.1, 10, 0.1, "horizontal")
    assert (how.stain, how.colour, how.brightness) == (0, 0, 0)
    assert (recipe.optimizer, recipe.schedule, recipe.monitor) == ("rmsprop", "plateau", "val_loss")
    assert recipe.patience > 0
    assert (recipe.ema, recipe.mixup, recipe.smoothing, recipe.weight_decay) == (0, 0, 0, 0)


def test_what_is_said_goes_before_the_recipe():
    said = TrainSettings(epochs=3, lr=0.5, activation="elu", batch_size=8).resolve()
    assert (said.epochs, said.lr, said.activation, said.batch_size) == (3, 0.5, "elu", 8)
    assert TrainSettings().resolve() == RECIPES["default"]


def test_another_augmentation_leaves_the_rest_of_the_recipe():
    said = TrainSettings(augmentation="light").resolve()
    assert said == replace(RECIPES["default"], augmentation="light")
    assert AUGMENTATIONS["light"].stain < AUGMENTATIONS["full"].stain
    assert TrainSettings(recipe="seed").resolve().augmentation == "seed"


def test_every_setting_is_content_or_runtime():
    for name, field in TrainSettings.model_fields.items():
        assert field.json_schema_extra["kind"] in {"content", "runtime"}, name


def test_how_it_runs_does_not_change_the_hash():
    assert TrainSettings(threads=3, memory_gb=1).content_hash() == TrainSettings().content_hash()
    assert TrainSettings(seed=3).content_hash() != TrainSettings().content_hash()


def test_a_card_names_other_bundles_without_folders():
    assert TrainSettings(init=Path("/somewhere/else/first")).recorded()["init"] == "first"


def test_a_card_says_what_only_a_recipe_can_say(monkeypatch):
    usual = TrainSettings().content_hash()
    recipe = replace(RECIPES["default"], stem="no-pool", teacher=Path("/somewhere/t"), mixup=0.2)
    monkeypatch.setitem(RECIPES, "default", recipe)
    said = TrainSettings()
    assert said.network_config(50).stem == "no-pool"
    assert said.recorded() | {"stem": "no-pool", "teacher": "t", "mixup": 0.2, "smoothing": 0.0} == said.recorded()
    assert said.content_hash() != usual


def test_the_record_of_a_card_whose_mixup_was_an_option_is_still_read():
    record = read_bundle(SHIPPED).fields.training["settings"]
    assert (record["mixup"], record["stem"]) == (None, "standard")
    known = {name: value for name, value in record.items() if name in TrainSettings.model_fields}
    assert TrainSettings(**known).unlike(record) == []
    assert TrainSettings(**known).unlike(record | {"mixup": 0.2, "lr": 1.0}) == ["lr", "mixup"]


def test_an_impossible_value_names_its_option():
    with pytest.raises(UsageError, match="--val-split"):
        build(TrainSettings, val_split=0.9)
