"""A slide file into pixels, places, tissue, pictures and annotations.

>>> from wsi import Slide, Tiling
>>> slide = Slide.open("case-1.svs")
>>> grid = slide.grid(Tiling(mpp=0.5, tile_px=256))
"""

from wsi._version import __version__
from wsi.annotation import Annotation
from wsi.geojson import read_geojson, write_geojson
from wsi.grid import Box, TileGrid, Tiling
from wsi.pyramid import Pyramid
from wsi.resolution import Mpp
from wsi.slide import Slide
from wsi.stream import TileBatch, TileStream
from wsi.tissue import TissueOptions

__all__ = [
    "Annotation",
    "Box",
    "Mpp",
    "Pyramid",
    "Slide",
    "TileBatch",
    "TileGrid",
    "TileStream",
    "Tiling",
    "TissueOptions",
    "__version__",
    "read_geojson",
    "write_geojson",
]
