"""What the system does not give is told in the system's words, never as damage."""

import errno
import os
import socket

import numpy as np
import pytest

from wsi_idc.errors import AccessError, DamageError, RegionError, SlideError
from wsi_idc.slides import open_slide, whole


@pytest.fixture
def slide(tmp_path, make):
    return make.write_tiff(tmp_path / "a.tif", make.texture(200, 200))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("name", ["a.svs", "a.png", "a.dcm", "a"])
def test_a_pipe_a_socket_or_a_device_is_refused_and_never_opened(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.svs")
        for path in (name, "socket.svs", "/dev/zero"):
            with pytest.raises(SlideError, match="is not a file or folder; give a file or a folder"):
                open_slide(path, 4.0)


WORDS = {
    errno.EACCES: "permission denied; check the rights",
    errno.ESTALE: "the file server lost it: try again",
    errno.EIO: "input/output error; the disk or the network failed",
}


@pytest.mark.parametrize("code", WORDS)
def test_a_slide_that_cannot_be_had_is_not_called_damaged(slide, monkeypatch, code):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code), str(slide))

    monkeypatch.setattr(type(slide), "open", refuse)
    with pytest.raises(AccessError, match=WORDS[code]) as caught:
        open_slide(slide)
    assert not isinstance(caught.value, DamageError)
    assert "scan" not in str(caught.value)
    assert str(caught.value).count(str(slide)) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_slide_without_rights_is_refused_in_one_line(slide):
    slide.chmod(0)
    with pytest.raises(AccessError, match="permission denied; check the rights"):
        open_slide(slide)


class Failing:
    """A backend whose pixels cannot be had."""

    def __init__(self, backend, error):
        self.description, self.shared, self.error, self.close = backend.description, False, error, backend.close

    def read(self, *_):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
        RuntimeError(f"libtiff: {os.strerror(errno.EIO)}"),
    ],
)
def test_a_region_that_cannot_be_had_is_not_called_damaged(slide, error):
    with open_slide(slide) as opened:
        opened._backend = Failing(opened._backend, error)
        with pytest.raises(AccessError, match=r"cannot read the region at x 0, y 0 .*try again") as caught:
            opened.read(0, 0, 0, 10, 10)
    assert "damaged" not in str(caught.value)


def test_a_file_that_is_gone_while_it_is_read_is_gone_and_not_damaged(slide):
    with open_slide(slide) as opened:
        opened._backend = Failing(opened._backend, ValueError("cannot decode"))
        with pytest.raises(RegionError, match="damaged there"):
            opened.read(0, 0, 0, 10, 10)
        slide.unlink()
        with pytest.raises(AccessError, match="No such file or directory; check the path"):
            opened.read(0, 0, 0, 10, 10)


def test_no_memory_is_no_damage(slide, monkeypatch):
    with open_slide(slide) as opened:
        opened._backend = Failing(opened._backend, MemoryError())
        with pytest.raises(MemoryError):
            opened.read(0, 0, 0, 10, 10)

    def greedy(*_):
        raise MemoryError

    monkeypatch.setattr(np, "frombuffer", greedy)
    assert whole.np.frombuffer is greedy
    with pytest.raises(MemoryError):
        open_slide(slide)
