"""The map as an OME-Zarr of its own, in either version of the format: float32, NaN where there is no tile."""

from pathlib import Path

import numpy as np

from wsi_idc import USE
from wsi_idc.results import Result
from wsi_idc.store.ngff import NgffVersion, ngff_attributes

_CHUNK = 1024


def write_ome_zarr(result: Result, path: Path, version: NgffVersion) -> None:
    """Write a folder that holds the map, compressed in the way that every reader knows.

    Raises:
        OSError: it cannot be written.
    """
    import zarr
    from numcodecs import Zlib
    from zarr.codecs import GzipCodec

    image = result.image
    about = {
        "slide_id": result.slide_id,
        "model": {"name": result.model, "positive": result.positive, "threshold": result.threshold},
        "use": USE,
    }
    attributes = {**ngff_attributes(result.slide, result.model, [result.positive], 2, version), **about}
    old = version == "0.4"
    group = zarr.create_group(path, zarr_format=2 if old else 3, attributes=attributes)
    array = group.create_array(
        "0",
        shape=image.shape,
        dtype=image.dtype,
        chunks=tuple(min(max(side, 1), _CHUNK) for side in image.shape),
        compressors=[Zlib(5) if old else GzipCodec(level=5)],
        chunk_key_encoding={"name": "v2" if old else "default", "separator": "/"},
        dimension_names=None if old else ("y", "x"),
        fill_value=float(np.nan),
    )
    array[...] = image
