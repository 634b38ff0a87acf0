"""ProbabilityMap: the probability of each class over a whole slide, a pixel a patch or finer, in a Zarr array."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from features.extract import encode_batches
from features.runner import EncoderRunner
from segmentation.blend import Blend, WritableMap, hann_window, tile_corners
from segmentation.classifier import PatchFacts
from segmentation.place import MapPlace
from wsi._files import make_folder_atomically
from wsi.annotation import Annotation
from wsi.errors import StoreCorruptError, StoreFormatError, UsageError
from wsi.geojson import Frame
from wsi.grid import TileGrid
from wsi.heatmap import Heatmap
from wsi.slide import Slide

__all__ = ["Corners", "HeatOptions", "ProbabilityMap", "blend_scores", "heat_grid", "write_heat", "write_map"]

Corners = tuple[tuple[int, int], ...]
"""Upper left ones, (x, y) in level-0 pixels."""

_FORMAT: Final = "wsi-heat-map"
_VERSION: Final = 1
_ARRAY: Final = "probability"
_CHUNK_PX: Final = 256


@dataclass(frozen=True)
class HeatOptions:
    """How a slide is looked at; saved with its map.

    Attributes:
        steps: map pixels to a patch's side. With 1 patches lie side by side, as in H2G-Net; with 2 they overlap by half,
            and where several lie each counts by how near its middle is.
        min_tissue: the least tissue in a patch that is looked at.
        batch_size: patches at once.
        threads: that decode; as many as there are cores by default.
    """

    steps: int = 1
    min_tissue: float = 0.1
    batch_size: int = 64
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or (self.threads is not None and self.threads < 1):
            raise UsageError(
                f"steps, batch_size and threads are from 1, got {self.steps}, {self.batch_size}, {self.threads}"
            )
        if not 0 <= self.min_tissue <= 1:
            raise UsageError(f"min_tissue is from 0 to 1, got {self.min_tissue}")


@dataclass(frozen=True, eq=False)
class ProbabilityMap:
    """Probabilities of classes over a slide, NaN where nothing was scored: no tissue, or pixels that cannot be read.

    Attributes:
        path: the Zarr group.
        classes: names, background first.
        place: where the map lies on the slide.
        frame: the slide's size, resolution and the origin its annotations leave in.
        unreadable: (x, y) level-0 corners of patches that could not be read.
        facts: how it was made, as JSON values.
    """

    path: Path
    classes: tuple[str, ...]
    place: MapPlace
    frame: Frame
    unreadable: Corners
    facts: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "ProbabilityMap":
        """A map that ``write_heat`` wrote.

        Raises:
            StoreFormatError: it is none, or of another release.
        """
        try:
            group = zarr.open_group(store=path, mode="r")
            about: dict[str, Any] = dict(group.attrs)
            if (about["format"], about["version"]) != (_FORMAT, _VERSION):
                raise StoreFormatError(f"{path}: not a heat map of this release, which reads {_FORMAT} {_VERSION}")
            return cls(
                path,
                tuple(about["classes"]),
                MapPlace(about["scale"], about["frame"]["mpp"]),
                Frame(**about["frame"]),
                tuple((int(x), int(y)) for x, y in about["unreadable"]),
                about,
            )
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise StoreFormatError(f"{path}: cannot be read as a heat map ({error}); score the slide again") from error

    @property
    def array(self) -> "zarr.Array[Any]":
        """(K, H, W) floating point, to be sliced."""
        return zarr.open_array(store=self.path / _ARRAY, mode="r")

    def probability(self, name: str) -> NDArray[np.float32]:
        """(H, W) probability of a class.

        Raises:
            UsageError: there is no such class.
            StoreCorruptError: what is on the disk is not what was written.
        """
        if name not in self.classes:
            raise UsageError(f"{self.path}: no class {name!r}; there are {', '.join(self.classes)}")
        rows = np.asarray(self._read(self.classes.index(name), slice(None)), np.float32)
        self._count(int(np.count_nonzero(~np.isnan(rows))))
        return rows

    def check(self) -> None:
        """Read all of it, some rows at a time.

        Raises:
            StoreCorruptError: what is on the disk is not what was written.
        """
        tops = range(0, self.array.shape[1], _CHUNK_PX)
        rows = (self._read(0, slice(top, top + _CHUNK_PX)) for top in tops)
        self._count(sum(int(np.count_nonzero(~np.isnan(part))) for part in rows))

    def _read(self, channel: int, rows: slice) -> NDArray[np.floating[Any]]:
        try:
            return np.asarray(self.array[channel, rows])
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise StoreCorruptError(f"{self.path}: cannot be read ({error}); score the slide again") from error

    def _count(self, scored: int) -> None:
        if scored != self.facts["scored"]:
            raise StoreCorruptError(
                f"{self.path}: {scored} pixels are there of {self.facts['scored']}; score the slide again"
            )

    def heatmap(self, name: str) -> Heatmap:
        """The scored pixels of a class as tiles, for pictures, outlines and QuPath."""
        values = self.probability(name)
        stride = (round(self.place.scale[0]), round(self.place.scale[1]))
        y, x = np.nonzero(~np.isnan(values))
        grid = TileGrid(
            xy=np.stack([x * stride[0], y * stride[1]], axis=1),
            tile_px=max(1, self.facts["patch_px"] // self.facts["options"]["steps"]),
            side=stride,
            stride=stride,
            mpp=(self.facts["mpp"], self.facts["mpp"]),
        )
        return Heatmap(grid, values[y, x], self.frame, name)


def heat_grid(
    slide: Slide, facts: PatchFacts, options: HeatOptions, tissue: Sequence[Annotation] | None = None
) -> TileGrid:
    """The patches of a slide that hold enough tissue, in rows; those at its right and lower edge stick out.

    Raises:
        TooCoarseError: the slide is too coarse for what the classifier was trained on.
    """
    grid = slide.grid(facts.tiling(steps=options.steps, min_tissue=options.min_tissue), tissue=tissue)
    facts.check(grid)
    return grid


def blend_scores(
    out: WritableMap,
    slide: Slide,
    grid: TileGrid,
    runner: EncoderRunner,
    options: HeatOptions,
    *,
    watch: Callable[[int], None] | None = None,
) -> Corners:
    """Score patches and blend their probabilities into a map whose pixels are the grid's strides.

    Tiles are decoded while those before go through the network; rows are written as soon as no patch can change them.

    Args:
        out: (K, H, W) floats.
        watch: is told how many patches were scored since it was last.

    Returns:
        Level-0 corners of the patches that could not be read.
    """
    steps = round(grid.side[0] / grid.stride[0])
    place = _place(slide, grid)
    corners = tile_corners(grid, place)
    unreadable: list[tuple[int, int]] = []
    with Blend(out, hann_window(steps)) as blend:
        batches = encode_batches(slide, grid, runner, batch_size=options.batch_size, threads=options.threads)
        for first, scores in batches:
            rows = slice(first, first + len(scores))
            blend.add(corners[rows], np.broadcast_to(scores[..., None, None], (*scores.shape, steps, steps)))
            bad = np.isnan(scores).any(axis=1)
            unreadable += [(x, y) for x, y in grid.xy[rows][bad].tolist()]
            if watch is not None:
                watch(len(scores))
    return tuple(unreadable)


def _place(slide: Slide, grid: TileGrid) -> MapPlace:
    return MapPlace((float(grid.stride[0]), float(grid.stride[1])), slide.mpp.xy)


def write_heat(
    path: Path,
    slide: Slide,
    runner: EncoderRunner,
    facts: PatchFacts,
    options: HeatOptions | None = None,
    *,
    tissue: Sequence[Annotation] | None = None,
    grid: TileGrid | None = None,
    watch: Callable[[int], None] | None = None,
) -> ProbabilityMap:
    """Score a slide's tissue and write the map; it is whole or not there. Memory does not grow with the slide.

    Args:
        path: a folder that is not there yet.
        runner: of a classifier's ``encoder()``.
        facts: the same classifier's.
        tissue: outlines to use instead of looking for them.
        grid: what ``heat_grid`` gave for these options, where it is at hand.
        watch: is told how many patches were scored since it was last.

    Raises:
        UsageError: there is something at ``path`` already.
        TooCoarseError: the slide is too coarse for the classifier.
    """
    options = options or HeatOptions()
    if runner.encoder.dim != len(facts.classes):
        raise UsageError(
            f"{runner.encoder.spec.name}: answers {runner.encoder.dim} numbers for {len(facts.classes)} classes"
        )
    grid = heat_grid(slide, facts, options, tissue) if grid is None else grid
    about: dict[str, Any] = {
        "colours": [list(colour) for colour in facts.colours],
        "mpp": facts.mpp,
        "patch_px": facts.patch_px,
        "options": asdict(options),
        "classifier_sha256": runner.encoder.weights_sha256,
        "precision": runner.encoder.precision,
        "patches": len(grid),
    }

    def blended(out: WritableMap) -> Corners:
        return blend_scores(out, slide, grid, runner, options, watch=watch)

    return write_map(path, slide, _place(slide, grid), facts.classes, blended, about)


def write_map(
    path: Path,
    slide: Slide,
    place: MapPlace,
    classes: Sequence[str],
    fill: Callable[[WritableMap], Corners],
    facts: Mapping[str, Any],
    *,
    shape: tuple[int, int] | None = None,
    dtype: str = "float32",
) -> ProbabilityMap:
    """Write a map of probabilities; it is whole or not there.

    Args:
        path: a folder that is not there yet.
        place: where its pixels lie on the slide.
        classes: background first.
        fill: writes the probabilities by rows, and gives the level-0 corners of what could not be read.
        facts: JSON values that are saved with it, ``patches`` and ``patch_px`` among them.
        shape: (H, W) of it; by default what covers the slide.

    Raises:
        UsageError: there is something at ``path`` already.
    """
    if path.exists():
        raise UsageError(f"{path}: is there already; remove it or choose another name")
    if shape is None:
        (width, height), (x, y) = slide.size, place.scale
        shape = (math.ceil(height / y), math.ceil(width / x))
    with make_folder_atomically(path) as staging:
        group = zarr.create_group(staging)
        array = group.create_array(
            _ARRAY,
            shape=(len(classes), *shape),
            chunks=(len(classes), *(min(_CHUNK_PX, length) for length in shape)),
            dtype=dtype,
            fill_value=float("nan"),
            compressors=(ZstdCodec(level=1), Crc32cCodec()),
            dimension_names=("class", "y", "x"),
        )
        counted = _Counted(array)
        unreadable = fill(counted)
        about: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            **facts,
            "classes": list(classes),
            "scale": list(place.scale),
            "frame": {
                key: list(value) if isinstance(value, tuple) else value for key, value in asdict(slide.frame).items()
            },
            "unreadable": [list(corner) for corner in unreadable],
            "scored": counted.scored,
        }
        group.attrs.update(about)
    return ProbabilityMap.open(path)


class _Counted:
    """A map that counts the pixels with numbers as they are written, by which a lost chunk is noticed later."""

    def __init__(self, array: "zarr.Array[Any]") -> None:
        self._array = array
        self.shape = array.shape
        self.chunks = array.chunks
        self.scored = 0

    def __setitem__(self, key: tuple[slice, slice], value: Any, /) -> None:
        self.scored += int(np.count_nonzero(~np.isnan(value[0])))
        self._array[key] = value
