"""A store with maps that are known: a tile's probability is the mean of its pixels over 255."""

import pytest

from wsi_idc.extract import extract
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.settings import ExtractSettings, InferSettings
from wsi_idc.store import open_store


@pytest.fixture
def store(slides, bundle, recorder):
    """Of slides a and b, with maps by `mean`, and of one that failed."""
    path = slides.parent / "tiles.zarr"
    extract(read_manifest(slides), path, ExtractSettings(), listener=recorder)
    infer(path, read_bundle(bundle), InferSettings(), listener=recorder)
    return open_store(path)
