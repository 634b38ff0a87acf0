"""Masks: a label map as a pyramidal OME-TIFF and as an OME-Zarr label image.

Both are written a row of tiles at a time and are whole or not there. Coarser levels hold every second pixel of the level
before, so that labels stay labels.

Sources: the OME-TIFF specification 6; NGFF 0.5.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from segmentation.components import PixelRows
from segmentation.place import MapPlace
from wsi._files import make_folder_atomically, replace_atomically
from wsi.annotation import class_color
from wsi.errors import UsageError

__all__ = ["write_ome_tiff", "write_ome_zarr"]

_TILE_PX: Final = 512
_CHUNK_PX: Final = 1024
_NGFF: Final = "0.5"
_MAX_LABEL: Final = 65_535


def write_ome_tiff(
    path: str | os.PathLike[str], labels: PixelRows, place: MapPlace, classes: Mapping[int, str]
) -> None:
    """Write a label map (H, W) as a tiled, compressed OME-TIFF pyramid with the classes' colours as its palette.

    Args:
        path: ends in ``.ome.tif`` or ``.ome.tiff``.
        classes: the name of each label; 0 is background, which is black.

    Raises:
        UsageError: another name, or labels above 65535.
    """
    import tifffile

    path = Path(path)
    if not path.name.lower().endswith((".ome.tif", ".ome.tiff")):
        raise UsageError(f"{path}: readers know an OME-TIFF by its name; end it in .ome.tif")
    dtype = _dtype(classes)
    factors = _factors(labels.shape, _TILE_PX)
    palette = _palette(classes, np.iinfo(dtype).max + 1)
    x_um, y_um = place.pixel_um
    metadata = {
        "axes": "YX",
        "Name": "; ".join(f"{label} = {name}" for label, name in classes.items()),
        "PhysicalSizeX": x_um,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": y_um,
        "PhysicalSizeYUnit": "µm",
        "Plane": {
            "PositionX": [place.origin[0] * place.mpp[0]],
            "PositionXUnit": ["µm"],
            "PositionY": [place.origin[1] * place.mpp[1]],
            "PositionYUnit": ["µm"],
        },
    }
    with replace_atomically(path) as file, tifffile.TiffWriter(file, bigtiff=True, ome=True) as writer:
        for factor in factors:
            shape = _level_shape(labels.shape, factor)
            writer.write(
                _tiles(labels, factor, dtype),
                shape=shape,
                dtype=dtype,
                tile=(_TILE_PX, _TILE_PX),
                compression="zlib",
                photometric="palette",
                colormap=palette,
                resolution=(1e4 / (x_um * factor), 1e4 / (y_um * factor)),
                resolutionunit="CENTIMETER",
                subifds=len(factors) - 1 if factor == 1 else 0,
                subfiletype=0 if factor == 1 else 1,
                metadata=metadata if factor == 1 else None,
            )


def write_ome_zarr(
    path: str | os.PathLike[str],
    labels: PixelRows,
    place: MapPlace,
    classes: Mapping[int, str],
    *,
    name: str = "segmentation",
) -> None:
    """Write a label map (H, W) as the label image ``labels/NAME`` of an OME-Zarr (NGFF 0.5, Zarr 3) group.

    Places are in microns from the slide's upper left corner. An existing folder is left as it is and refused.

    Raises:
        UsageError: there is something at ``path`` already, or labels above 65535.
    """
    import zarr
    from zarr.codecs import ZstdCodec

    path = Path(path)
    if path.exists():
        raise UsageError(f"{path}: is there already; remove it or choose another name")
    dtype = _dtype(classes)
    factors = _factors(labels.shape, _CHUNK_PX)
    with make_folder_atomically(path) as staging:
        root = zarr.create_group(staging, attributes={"ome": {"version": _NGFF}})
        root.create_group("labels", attributes={"ome": {"version": _NGFF, "labels": [name]}})
        image = root.create_group(f"labels/{name}", attributes=_label_attributes(name, factors, place, classes))
        for level, factor in enumerate(factors):
            shape = _level_shape(labels.shape, factor)
            array = image.create_array(
                str(level),
                shape=shape,
                chunks=(min(_CHUNK_PX, shape[0]), min(_CHUNK_PX, shape[1])),
                dtype=dtype,
                dimension_names=("y", "x"),
                compressors=ZstdCodec(level=3, checksum=True),
            )
            for top, rows in _rows(labels, factor, _CHUNK_PX, dtype):
                array[top : top + len(rows)] = rows


def _label_attributes(name: str, factors: list[int], place: MapPlace, classes: Mapping[int, str]) -> dict[str, Any]:
    x_um, y_um = place.pixel_um
    left_um, top_um = place.origin[0] * place.mpp[0], place.origin[1] * place.mpp[1]
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [
                {"type": "scale", "scale": [y_um * factor, x_um * factor]},
                {"type": "translation", "translation": [top_um + y_um * factor / 2, left_um + x_um * factor / 2]},
            ],
        }
        for level, factor in enumerate(factors)
    ]
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    return {
        "ome": {
            "version": _NGFF,
            "multiscales": [{"name": name, "axes": axes, "datasets": datasets}],
            "image-label": {
                "colors": [{"label-value": k, "rgba": [*class_color(v), 255]} for k, v in classes.items()],
                "properties": [{"label-value": k, "class": v} for k, v in classes.items()],
                "source": {"image": "../../"},
            },
        }
    }


def _dtype(classes: Mapping[int, str]) -> type[np.uint8] | type[np.uint16]:
    highest = max(classes, default=0)
    if highest > _MAX_LABEL or min(classes, default=1) < 1:
        raise UsageError(f"labels of a mask are from 1 to {_MAX_LABEL}; got {min(classes)} to {highest}")
    return np.uint8 if highest < 256 else np.uint16


def _factors(shape: tuple[int, ...], tile_px: int) -> list[int]:
    """1, 2, 4, … until the map fits a tile."""
    factors = [1]
    while max(_level_shape(shape, factors[-1])) > tile_px:
        factors.append(2 * factors[-1])
    return factors


def _level_shape(shape: tuple[int, ...], factor: int) -> tuple[int, int]:
    return -(-shape[0] // factor), -(-shape[1] // factor)


def _rows(
    labels: PixelRows, factor: int, n_rows: int, dtype: type[np.unsignedinteger[Any]]
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Some rows of a level at a time, and where they begin."""
    height = _level_shape(labels.shape, factor)[0]
    step = max(1, _CHUNK_PX // factor)  # so many at once that what is read does not grow with the factor
    for top in range(0, height, n_rows):
        bottom = min(top + n_rows, height)
        parts = [
            np.asarray(labels[y * factor : min(y + step, bottom) * factor])[::factor, ::factor]
            for y in range(top, bottom, step)
        ]
        rows = np.concatenate(parts)
        if rows.size and rows.max() > np.iinfo(dtype).max:
            raise UsageError(f"the map holds the label {rows.max()}, for which no class is given")
        yield top, rows.astype(dtype)


def _tiles(labels: PixelRows, factor: int, dtype: type[np.unsignedinteger[Any]]) -> Iterator[NDArray[Any]]:
    for _, rows in _rows(labels, factor, _TILE_PX, dtype):
        height, width = rows.shape
        padded = np.zeros((_TILE_PX, -(-width // _TILE_PX) * _TILE_PX), dtype)
        padded[:height, :width] = rows
        for left in range(0, width, _TILE_PX):
            yield padded[:, left : left + _TILE_PX]


def _palette(classes: Mapping[int, str], size: int) -> NDArray[np.uint16]:
    """(3, size) 16-bit colours of labels."""
    palette = np.zeros((3, size), np.uint16)
    for label, name in classes.items():
        palette[:, label] = np.array(class_color(name)) * 257
    return palette
