"""`info` says of a slide what `extract` would."""

import pytest

from wsi_idc.errors import SlideError
from wsi_idc.info import describe_slide, info_lines
from wsi_idc.settings import ExtractSettings


def test_a_slide_that_extract_refuses_is_refused(tmp_path, make):
    path = make.write_tiff(tmp_path / "a.tif", make.texture(200, 200), mpp=9.0)
    with pytest.raises(SlideError, match="too coarse for tiles at 4"):
        describe_slide(path, None, ExtractSettings(), None)


def test_a_slide_somewhat_too_coarse_is_warned_of(tmp_path, make):
    path = make.tissue_slide(tmp_path / "a.tif", mpp=6.0)
    fields = describe_slide(path, None, ExtractSettings(), None)
    assert fields["warnings"] == ["its finest level has 6 um/px: tiles at 4 are upsampled 1.5 times"]
    assert any(line.startswith("warning ") for line in info_lines(fields))


def test_a_resolution_that_was_given_is_called_so(tmp_path, make):
    path = make.tissue_slide(tmp_path / "a.tif")
    fields = describe_slide(path, 4.0, ExtractSettings(), None)
    assert fields["mpp_source"] == "given"
    assert "um/px       4 x 4 (given)" in info_lines(fields)


def test_the_reader_asked_for_is_the_one_that_reads(tmp_path, make):
    path = make.tissue_slide(tmp_path / "a.tif")
    for reader, name in (("auto", "OpenSlide"), ("openslide", "OpenSlide"), ("tiatoolbox", "tiatoolbox TIFF")):
        fields = describe_slide(path, None, ExtractSettings(reader=reader), None)
        assert (fields["reader"], fields["origin"]) == (name, [0, 0])
