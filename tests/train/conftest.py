"""A small store whose tiles can be learnt, made without slides."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.train.runs import QUICK, quiet
from wsi_idc.settings import TileSpec
from wsi_idc.store import Store, hold_store, open_store
from wsi_idc.store.slide import create_tiles, tiles_per_shard, write_shards
from wsi_idc.train import TrainSettings, run
from wsi_idc.train.result import TrainResult

SIZE = 16
PATIENTS = {"a": "train", "b": "train", "c": "", "d": "train", "e": "val", "f": "val", "g": "test"}
QUALITY = (("tissue", 1.0), ("blur", 500.0), ("pen", 0.0))
"""What the store says of every tile besides its label."""
Patients = Mapping[str, str]
"""Patient id to split."""
MakeStore = Callable[..., Store]


def make_tiles(truth: NDArray[np.bool_], generator: np.random.Generator, size: int = SIZE) -> NDArray[np.uint8]:
    """Noise, bluer where it is IDC, with a colour cast drawn once for all: uint8 (n, size, size, 3) RGB."""
    base = np.where(truth[:, None], (150, 90, 170), (215, 160, 195)) + generator.normal(0, 12, 3)
    noise = generator.normal(0, 30, (len(truth), size, size, 3))
    return np.clip(base[:, None, None, :] + noise, 0, 255).astype(np.uint8)


def store_maker(folder: Path) -> MakeStore:
    """Makes stores in a folder, of one slide a patient."""

    def make(
        patients: Patients,
        *,
        tiles: int = 24,
        size: int = SIZE,
        unknown: int = 0,
        labels: Sequence[float] = (0.0, 1.0),
        name: str = "tiles.zarr",
    ) -> Store:
        spec = TileSpec(size_px=size, mpp=4.0)
        address = folder / name
        with hold_store(address, create=True) as store:
            for number, (patient, split) in enumerate(patients.items()):
                generator = np.random.default_rng(number)
                part = np.asarray(labels, np.float32)[np.arange(tiles) % len(labels)]
                pixels = make_tiles(part >= 0.5, generator, size)
                part[:unknown] = np.nan
                node = store.slide_node(f"slide-{patient}")
                attempt = node.begin()
                create_tiles(node, spec, tiles)
                step = tiles_per_shard(size)
                shards = [pixels[start : start + step] for start in range(0, tiles, step)]
                cell = np.stack([np.zeros(tiles, np.int32), np.arange(tiles, dtype=np.int32)], 1)
                checksums = {
                    "tiles": [checksum for _, checksum in write_shards(node, attempt, 0, iter(shards))],
                    "idc": node.put("idc", part, ("tile",)),
                    "cell": node.put("cell", cell, ("tile", "axis")),
                    **{name: node.put(name, np.full(tiles, value, np.float32), ("tile",)) for name, value in QUALITY},
                    "thumbnail": node.put("thumbnail", np.concatenate(pixels[:, ::4, ::4], 1), ("y", "x", "c")),
                }
                node.commit(
                    {
                        "patient_id": patient,
                        "split": split,
                        "path": f"{patient}.tif",
                        "tile": spec.content(),
                        "size": [size * tiles, size],
                        "mpp": [4.0, 4.0],
                        "complete": {
                            "tiles": tiles,
                            "identity": f"{patient}-{number}",
                            "checksums": checksums,
                            "made_from": {},
                        },
                    },
                    attempt,
                )
        return open_store(address)

    return make


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """Makes stores of one slide a patient."""
    return store_maker(tmp_path)


@pytest.fixture
def patients() -> dict[str, str]:
    """Seven patients, two of whom validate and one of whom nobody may see."""
    return dict(PATIENTS)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the seven patients, trained as `QUICK` says; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    run(store_maker(folder)(PATIENTS).address, folder / "first", TrainSettings(**QUICK), say=quiet)
    return folder / "first"


@pytest.fixture(scope="session")
def cross_validated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """Two folds of the seven patients, trained as `QUICK` says, and what that gave; not to be changed."""
    folder = tmp_path_factory.mktemp("cross_validated")
    result = run(store_maker(folder)(PATIENTS).address, folder / "cv", TrainSettings(folds=2, **QUICK), say=quiet)
    assert result is not None
    return folder / "cv", result
