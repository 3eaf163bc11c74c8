"""A source is known by its content."""

import os

from wsi_idc import digests as module
from wsi_idc.digests import fingerprint


def test_a_touched_timestamp_is_no_change(tmp_path):
    file = tmp_path / "a.svs"
    file.write_bytes(b"pixels")
    before = fingerprint(file)
    os.utime(file, (1, 1))
    assert fingerprint(file) == before


def test_one_changed_byte_is(tmp_path):
    file = tmp_path / "a.svs"
    file.write_bytes(b"pixels")
    before = fingerprint(file)
    file.write_bytes(b"pixelz")
    assert fingerprint(file) != before


def test_a_large_file_is_sampled_from_first_to_last_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_WHOLE", 1000)
    monkeypatch.setattr(module, "_SAMPLE", 10)
    file = tmp_path / "a.svs"
    content = bytearray(os.urandom(5000))
    file.write_bytes(content)
    before = fingerprint(file)
    for position in (0, 4999):
        changed = bytearray(content)
        changed[position] ^= 1
        file.write_bytes(changed)
        assert fingerprint(file) != before
    file.write_bytes(content + b"x")
    assert fingerprint(file) != before


def test_a_folder_is_its_names_and_contents(tmp_path):
    folder = tmp_path / "dicom"
    folder.mkdir()
    (folder / "1.dcm").write_bytes(b"one")
    before = fingerprint(folder)
    (folder / "1.dcm").rename(folder / "2.dcm")
    renamed = fingerprint(folder)
    (folder / "2.dcm").write_bytes(b"two")
    assert len({before, renamed, fingerprint(folder)}) == 3


def test_a_mirax_file_has_its_data_folder_with_it(tmp_path):
    (tmp_path / "a.mrxs").write_bytes(b"index")
    alone = fingerprint(tmp_path / "a.mrxs")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "Data0000.dat").write_bytes(b"pixels")
    assert fingerprint(tmp_path / "a.mrxs") != alone
