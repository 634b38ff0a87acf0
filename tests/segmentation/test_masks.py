"""Masks: what is written is read back by tifffile, OpenSlide, Zarr and this project's own readers, at its place."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import openslide
import pytest
import shapely
import tifffile
import zarr

from segmentation.masks import write_ome_tiff, write_ome_zarr
from segmentation.place import MapPlace
from wsi.annotation import class_color
from wsi.annotations import read_annotations
from wsi.errors import UsageError
from wsi.geojson import Frame
from wsi.mask import MaskOptions
from wsi.slide import Slide

CLASSES = {1: "Tumor", 2: "Stroma"}
PLACE = MapPlace((4, 4), (0.25, 0.5), (100, 200))


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    found = np.zeros((1300, 2100), np.uint8)
    found[100:900, 200:1700] = 1
    found[300:500, 500:900] = 2
    return found


def test_an_ome_tiff_opens_everywhere_with_its_colours_and_size(tmp_path: Path, labels: np.ndarray) -> None:
    path = tmp_path / "mask.ome.tif"
    write_ome_tiff(path, labels, PLACE, CLASSES)
    with tifffile.TiffFile(path) as file:
        levels = file.series[0].levels
        assert [level.shape for level in levels] == [(1300, 2100), (650, 1050), (325, 525), (163, 263)]
        for power, level in enumerate(levels):
            assert np.array_equal(level.asarray(), labels[:: 2**power, :: 2**power])
        assert file.pages.first.is_tiled
        pixels = next(e for e in ElementTree.fromstring(file.ome_metadata or "").iter() if e.tag.endswith("Pixels"))
        assert (pixels.get("PhysicalSizeX"), pixels.get("PhysicalSizeY")) == ("1.0", "2.0")
        plane = next(e for e in pixels if e.tag.endswith("Plane"))
        assert (plane.get("PositionX"), plane.get("PositionY")) == ("25.0", "100.0")
    with openslide.OpenSlide(path) as slide:
        assert slide.dimensions == (2100, 1300)
        assert slide.read_region((600, 400), 0, (1, 1)).getpixel((0, 0)) == (*class_color("Stroma"), 255)
    with Slide.open(path, mpp=1.0) as mine:
        assert mine.size == (2100, 1300)
        assert tuple(mine.thumbnail(2100)[200, 300]) == class_color("Tumor")


def test_an_ome_tiff_is_an_annotation_at_its_place(tmp_path: Path, labels: np.ndarray) -> None:
    write_ome_tiff(tmp_path / "case.ome.tif", labels, MapPlace((4, 4), (0.25, 0.25)), CLASSES)
    frame = Frame("case.svs", (8400, 5200), (0.25, 0.25))
    found = read_annotations(tmp_path / "case.ome.tif", frame=frame, mask=MaskOptions(classes=CLASSES))
    assert [a.class_name for a in found.annotations] == ["Tumor", "Stroma"]
    assert found.annotations[1].geometry.equals(shapely.box(2000, 1200, 3600, 2000))


def test_many_objects_take_16_bits_and_none_may_be_more(tmp_path: Path) -> None:
    labels = np.arange(600 * 500).reshape(600, 500) % 1000
    classes = dict.fromkeys(range(1, 1000), "Gland")
    write_ome_tiff(tmp_path / "m.ome.tif", labels, PLACE, classes)
    assert np.array_equal(tifffile.imread(tmp_path / "m.ome.tif"), labels)
    with pytest.raises(UsageError, match="label 999"):
        write_ome_tiff(tmp_path / "n.ome.tif", labels, PLACE, {1: "Gland"})
    assert not (tmp_path / "n.ome.tif").exists()
    with pytest.raises(UsageError, match="from 1 to 65535"):
        write_ome_tiff(tmp_path / "n.ome.tif", labels, PLACE, {70_000: "Gland"})
    with pytest.raises(UsageError, match=r"end it in \.ome\.tif"):
        write_ome_tiff(tmp_path / "n.tif", labels, PLACE, classes)


def test_an_ome_zarr_label_says_where_it_lies_and_what_its_labels_are(tmp_path: Path, labels: np.ndarray) -> None:
    write_ome_zarr(tmp_path / "mask.zarr", labels, PLACE, CLASSES)
    folder = tmp_path / "mask.zarr" / "labels"
    assert _ome(folder) == {"version": "0.5", "labels": ["segmentation"]}
    ome = _ome(folder / "segmentation")
    assert ome["image-label"]["properties"] == [
        {"label-value": 1, "class": "Tumor"},
        {"label-value": 2, "class": "Stroma"},
    ]
    assert ome["image-label"]["colors"][0]["rgba"] == [*class_color("Tumor"), 255]
    (multiscale,) = ome["multiscales"]
    assert [axis["name"] for axis in multiscale["axes"]] == ["y", "x"]
    for power, dataset in enumerate(multiscale["datasets"]):
        array = zarr.open_array(folder / "segmentation" / dataset["path"], mode="r", zarr_format=3)
        assert np.array_equal(array[:], labels[:: 2**power, :: 2**power])
        scale, shift = dataset["coordinateTransformations"]
        assert scale["scale"] == [2.0 * 2**power, 1.0 * 2**power]
        corner = [s - e / 2 for s, e in zip(shift["translation"], scale["scale"], strict=True)]
        assert corner == [100.0, 25.0]  # microns, of the map's own corner
    assert len(multiscale["datasets"]) == 3


def _ome(folder: Path) -> Any:
    return json.loads((folder / "zarr.json").read_text())["attributes"]["ome"]


def test_a_zarr_that_is_there_or_half_done_is_left_alone(tmp_path: Path, labels: np.ndarray) -> None:
    (tmp_path / "there.zarr").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        write_ome_zarr(tmp_path / "there.zarr", labels, PLACE, CLASSES)
    with pytest.raises(UsageError, match="label 512"):
        write_ome_zarr(tmp_path / "new.zarr", labels.astype(np.int64) * 256, PLACE, CLASSES)
    assert [path.name for path in tmp_path.iterdir()] == ["there.zarr"]
