"""The grid is exact geometry, the same for every run."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wsi_idc.grid import Grid
from wsi_idc.settings import TileSpec

specs = st.builds(
    TileSpec,
    size_px=st.integers(8, 600),
    mpp=st.floats(0.1, 20),
    stride_px=st.integers(1, 900),
    last=st.sampled_from(["keep", "drop"]),
)
mpps = st.tuples(st.floats(0.05, 100), st.floats(0.05, 100))


@st.composite
def grids(draw):
    """Grids with at most about 200 cells along an axis, so that every cell can be looked at."""
    spec, mpp = draw(specs), draw(mpps)
    size = tuple(
        draw(st.integers(1, max(2, min(200_000, int(200 * spec.stride_px * spec.mpp / axis))))) for axis in mpp
    )
    return Grid(spec, size, mpp)


@given(grids())
def test_positions_are_the_ideal_ones_rounded_half_up(grid):
    cells = grid.cells()
    ideal = cells[:, ::-1] * np.array(grid.step)
    assert np.abs(grid.position(cells) - ideal).max(initial=0) <= 0.5


@given(grids())
def test_kept_tiles_start_inside_and_dropped_ones_would_not_end_inside(grid):
    rows, columns = grid.shape
    for axis, count in ((0, columns), (1, rows)):
        beyond = grid.position(np.array([[count, count]]))[0][axis]
        last = grid.position(np.array([[max(count - 1, 0)] * 2]))[0][axis]
        if grid.spec.last == "keep":
            assert beyond >= grid.size[axis]
            assert count == 0 or last < grid.size[axis]
        else:
            assert beyond + grid.extent[axis] > grid.size[axis] + 0.5
            assert count == 0 or last + grid.extent[axis] <= grid.size[axis] + 0.5


@given(grids())
def test_cells_come_row_by_row_and_are_as_many_as_the_grid_says(grid):
    cells = grid.cells()
    assert len(cells) == len(grid)
    assert cells.dtype == np.int32
    assert [tuple(cell) for cell in cells.tolist()] == sorted(tuple(cell) for cell in cells.tolist())


@given(grids(), st.integers(1, 5))
def test_a_larger_slide_has_the_same_tiles_at_the_same_places(grid, factor):
    larger = Grid(grid.spec, (grid.size[0] * factor, grid.size[1] * factor), grid.mpp)
    assert np.array_equal(larger.position(grid.cells()), grid.position(grid.cells()))
    assert all(more >= less for more, less in zip(larger.shape, grid.shape, strict=True))


def test_the_idc_data_sets_grid():
    grid = Grid(TileSpec(), (2800, 2350), (4.0, 4.0))
    assert grid.shape == (47, 56)
    assert grid.position(np.array([[2, 1]])).tolist() == [[50, 100]]


def test_the_last_tile_is_kept_or_dropped_by_name():
    keep = Grid(TileSpec(), (120, 100), (4.0, 4.0))
    drop = Grid(TileSpec(last="drop"), (120, 100), (4.0, 4.0))
    assert (keep.shape, drop.shape) == ((2, 3), (2, 2))


def test_a_slide_smaller_than_a_tile():
    assert Grid(TileSpec(), (10, 10), (4.0, 4.0)).shape == (1, 1)
    assert len(Grid(TileSpec(last="drop"), (10, 10), (4.0, 4.0)).cells()) == 0


def test_axes_have_their_own_resolution():
    grid = Grid(TileSpec(), (1000, 1000), (1.0, 2.0))
    assert grid.step == (200.0, 100.0)
    assert grid.shape == (10, 5)
