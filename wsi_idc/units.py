"""Units in types: which pixels a number counts, and what lengths are in.

A signature that says `Level0Px` cannot be given a level's pixels unseen; arithmetic gives plain numbers again, which
are named anew where they cross a boundary. Arrays say their unit in the docstring, as do steps, extents and scales:
floats, whose pixels are not whole.
"""

from typing import NewType

Level0Px = NewType("Level0Px", int)
"""Pixels of a slide's finest level; a place counts from the slide's origin, and the origin itself from the file's."""
LevelPx = NewType("LevelPx", int)
"""Pixels of the pyramid level that is spoken of."""
TilePx = NewType("TilePx", int)
"""Pixels of a tile, at the grid's resolution."""
Um = NewType("Um", float)
"""Micrometres."""
Mpp = NewType("Mpp", float)
"""Micrometres per pixel."""

FILE_ORIGIN = (Level0Px(0), Level0Px(0))
"""The origin (x, y) of a slide that is all of its file."""
MPP_RANGE = (Mpp(0.05), Mpp(100.0))
"""um/px that a slide can have; outside it, a figure is a mistake of units."""
