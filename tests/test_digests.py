"""A source is known by its content."""

import os
from pathlib import Path

import pytest

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


def test_a_folder_is_read_no_more_than_a_file_of_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_WHOLE", 1000)
    monkeypatch.setattr(module, "_SAMPLE", 10)
    folder = tmp_path / "dicom"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number:03}.dcm").write_bytes(os.urandom(900))
    before = fingerprint(folder)
    opened = []
    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *rest, **named: opened.append(self) or plain(self, *rest, **named))
    assert fingerprint(folder) == before
    assert len(opened) <= 32 * 2
    monkeypatch.undo()
    for name, position in (("000.dcm", 0), ("199.dcm", 899)):
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 1
        (folder / name).write_bytes(content)
        after = fingerprint(folder)
        assert after != before
        before = after


def test_a_small_file_that_moves_in_a_folder_changes_it(tmp_path):
    (tmp_path / "a").write_bytes(b"12")
    (tmp_path / "b").write_bytes(b"3")
    before = fingerprint(tmp_path)
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"23")
    assert fingerprint(tmp_path) != before


def test_a_files_value_is_the_one_that_stores_hold(tmp_path):
    (tmp_path / "a.svs").write_bytes(b"pixels")
    (tmp_path / "large.svs").write_bytes(bytes(range(256)) * 40_000)
    assert fingerprint(tmp_path / "a.svs") == "0f477b53aa807c32"
    assert fingerprint(tmp_path / "large.svs") == "2888a766d0d2f045"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_refused_and_one_in_a_folder_is_passed_over(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is not a file or folder"):
        fingerprint(tmp_path / "pipe")
    (tmp_path / "a").write_bytes(b"1")
    fingerprint(tmp_path)
