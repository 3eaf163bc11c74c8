"""A source is the same wherever it lies: on a disk, or in an object store."""

import os
from pathlib import Path

import obstore
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from wsi_idc import digests
from wsi_idc.digests import fingerprint
from wsi_idc.objects import objects_at
from wsi_idc.sources import Url, roots

WHOLE, SAMPLE = digests._WHOLE, digests._SAMPLE


@pytest.fixture
def upload(objects):
    """Puts a file, or a folder, into a new bucket; gives its URL."""

    def put(path: Path, key: str = "") -> Url:
        bucket = objects.bucket()
        store = objects_at(f"s3://{bucket}")
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file():
                inner = file.relative_to(path).as_posix() if file != path else ""
                obstore.put(store, f"{key or path.name}/{inner}".rstrip("/"), file.read_bytes())
        return Url(f"s3://{bucket}/{key or path.name}")

    return put


@pytest.mark.parametrize("size", [0, 1, SAMPLE, WHOLE - 1, WHOLE, WHOLE + 1, WHOLE + SAMPLE, 3 * WHOLE + 7])
def test_a_file_has_one_fingerprint_wherever_it_lies(tmp_path, upload, size):
    (tmp_path / "a.svs").write_bytes(os.urandom(size))
    assert fingerprint(upload(tmp_path / "a.svs")) == fingerprint(tmp_path / "a.svs")


@pytest.fixture
def one_bucket(objects):
    name = objects.bucket()
    return f"s3://{name}", objects_at(f"s3://{name}")


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["a", "b.dcm", "b/c", "b/c.d", "b-c", "0/x y", "0/%20", "é", "Z"]),
        st.integers(0, 900),
        min_size=1,
    ),
    st.integers(0, 2**32),
)
@example({"b/c": 900, "b-c": 900, "b.dcm": 900}, 0)
def test_a_folder_has_one_fingerprint_wherever_it_lies(tmp_path_factory, one_bucket, sizes, seed):
    import random

    url, store = one_bucket
    folder = tmp_path_factory.mktemp("folder")
    generator = random.Random(seed)
    for name, size in sizes.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(generator.randbytes(size))
        obstore.put(store, f"{folder.name}/{name}", (folder / name).read_bytes())
    obstore.put(store, f"{folder.name}-beside/x", b"not in it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "_WHOLE", 1000)
        patch.setattr(digests, "_SAMPLE", 10)
        assert fingerprint(Url(f"{url}/{folder.name}")) == fingerprint(Url(f"{url}/{folder.name}/"))
        assert fingerprint(Url(f"{url}/{folder.name}")) == fingerprint(folder)


def test_a_mirax_file_has_its_folder_with_it_and_consoles_folders_are_nothing(tmp_path, upload, objects):
    (tmp_path / "m" / "a").mkdir(parents=True)
    (tmp_path / "m" / "a.mrxs").write_bytes(b"index")
    (tmp_path / "m" / "a" / "Data0000.dat").write_bytes(b"pixels")
    url = upload(tmp_path / "m")
    import urllib.request

    marker = f"{objects.endpoint}/{url.bucket[5:]}/m/a/"
    urllib.request.urlopen(urllib.request.Request(marker, method="PUT")).close()
    assert fingerprint(Url(f"{url}/a.mrxs")) == fingerprint(tmp_path / "m" / "a.mrxs")
    assert fingerprint(Url(f"{url}/a")) == fingerprint(tmp_path / "m" / "a")


def test_nothing_in_a_key_is_decoded(tmp_path, upload):
    (tmp_path / "a.svs").write_bytes(b"pixels")
    url = upload(tmp_path / "a.svs", "x y/a%20b#c?d.svs")
    assert (url.name, url.suffix) == ("a%20b#c?d.svs", ".svs")
    assert fingerprint(url) == fingerprint(tmp_path / "a.svs")


def test_a_large_object_costs_a_request_for_each_sample_and_one_more(tmp_path, upload, objects):
    (tmp_path / "a.svs").write_bytes(os.urandom(2 * WHOLE))
    url = upload(tmp_path / "a.svs")
    before = len(objects.requests())
    fingerprint(url)
    assert len(objects.requests()) - before == 33


def test_what_is_not_there_is_said_of_the_object_or_of_the_bucket(objects):
    with pytest.raises(FileNotFoundError, match=r"no such object, and none below it: 's3://bucket-\w+/a\.svs'"):
        roots(Url(f"s3://{objects.bucket()}/a.svs"))
    with pytest.raises(OSError, match=r"there is no such bucket.*'s3://nowhere-at-all/a\.svs'"):
        roots(Url("s3://nowhere-at-all/a.svs"))


def test_an_object_replaced_since_it_was_looked_at_is_never_read(tmp_path, upload):
    (tmp_path / "a.svs").write_bytes(b"pixels")
    url = upload(tmp_path / "a.svs")
    (part,) = roots(url)[0].parts
    assert part.read(1, 3) == b"ix"
    obstore.put(objects_at(url.bucket), url.key, b"others")
    with pytest.raises(OSError, match="was replaced while it was read"):
        part.read(1, 3)
