"""Feature files of others: read with all they say, written so that they read them."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from features.interop import feature_files, read_facts, read_features, write_trident
from features.store import UNREADABLE
from tests.mil.made_up import DIM, write_store
from wsi.errors import BadFeaturesError, NotExtractedError, SlideNotFoundError, UsageError
from wsi.geojson import Frame


@pytest.fixture
def vectors() -> Any:
    return np.random.default_rng(0).normal(size=(5, DIM)).astype(np.float32)


def test_clam_files_are_read(tmp_path: Path, vectors: Any) -> None:
    places = np.arange(10, dtype=np.int32).reshape(5, 2) * 256
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["coords"] = vectors, places
    found = read_features(tmp_path / "a.h5")
    assert (found.layout, found.encoder, found.mpp, found.frame) == ("clam", None, None, None)
    np.testing.assert_array_equal(found.features, vectors)
    np.testing.assert_array_equal(found.xy, places)


def test_the_extra_axis_of_panther_is_taken_off(tmp_path: Path, vectors: Any) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["coords"] = vectors[None], np.zeros((1, 5, 2), np.int64)
    found = read_features(tmp_path / "a.h5")
    assert found.features is not None
    assert (found.n_tiles, found.dim, found.features.shape) == (5, DIM, (5, DIM))


def test_trident_files_are_read_with_encoder_resolution_and_slide_size(tmp_path: Path, vectors: Any) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["coords"] = vectors, np.zeros((5, 2), np.int64)
        file["features"].attrs.update({"encoder": "uni_v1", "name": "a"})
        file["coords"].attrs.update(
            {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20}
            | {"overlap": 0, "name": "a", "level0_width": 4000, "level0_height": 3000, "savetodir": "None"}
        )
    found = read_facts(tmp_path / "a.h5")
    assert (found.layout, found.encoder, found.mpp, found.tile_px, found.side) == ("trident", "uni_v1", 0.5, 256, 512)
    assert found.frame == Frame("a", (4000, 3000), (0.25, 0.25))
    assert found.features is None


@pytest.mark.parametrize(
    ("attributes", "microns", "mpp"),
    [
        ({"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "stamp_version": "2.5.0"}, 256.0, 256 / 224),
        ({"unit": "um", "tile_size": 256.0}, 256.0, None),
        ({}, 256.0 * 256 / 224, None),
    ],
)
def test_stamp_files_keep_their_microns(tmp_path: Path, vectors: Any, attributes: Any, microns: Any, mpp: Any) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["feats"], file["coords"] = vectors.astype(np.float16), np.full((5, 2), 256, np.float32)
        file.attrs.update({"extractor": "chief-ctranspath", **attributes})
    found = read_features(tmp_path / "a.h5")
    assert (found.layout, found.encoder, found.xy) == ("stamp", "chief-ctranspath", None)
    assert found.mpp == mpp
    assert found.xy_um is not None
    assert found.features is not None
    np.testing.assert_allclose(found.xy_um, microns, rtol=1e-6)
    assert found.features.dtype == np.float16


def test_what_is_written_is_what_trident_needs_and_reads_back_equal(tmp_path: Path, vectors: Any) -> None:
    status = np.array([0, 0, UNREADABLE, 0, 0], np.uint8)
    store = write_store(tmp_path / "OUT", {"x/a.svs": vectors}, status=status)
    (path,) = write_trident(store, "made-up", tmp_path / "trident")
    assert path == tmp_path / "trident" / "features_made-up" / "a.h5"
    with h5py.File(path) as file:
        about = dict(file["coords"].attrs)
        assert file["coords"].dtype == np.int64
        assert file["features"].attrs["encoder"] == "made-up"
    needed = ("patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap", "name")
    assert [about[key] for key in needed] == [5, 10, 40, 20, 0, "a"]
    assert (about["level0_width"], about["level0_height"], about["n_left_out"]) == (200, 160, 1)
    found = read_features(path)
    np.testing.assert_array_equal(found.features, vectors[[0, 1, 3, 4]])
    np.testing.assert_array_equal(found.xy, store.slide("a").grid.xy[[0, 1, 3, 4]])
    assert (found.encoder, found.mpp, found.side) == ("made-up", 0.5, 10)


def test_a_slide_without_tiles_is_written_as_trident_does(tmp_path: Path) -> None:
    store = write_store(tmp_path / "OUT", {"a.svs": np.empty((0, DIM), np.float32)})
    found = read_features(write_trident(store, "made-up", tmp_path)[0])
    assert (found.n_tiles, found.dim) == (0, DIM)


def test_two_slides_of_one_name_and_an_encoder_that_is_not_there_are_refused(tmp_path: Path, vectors: Any) -> None:
    store = write_store(tmp_path / "OUT", {"x/a.svs": vectors, "y/a.svs": vectors})
    with pytest.raises(UsageError, match=r"two slides of .* are called a"):
        write_trident(store, "made-up", tmp_path)
    with pytest.raises(NotExtractedError, match="no slide has features of 'uni'"):
        write_trident(store, "uni", tmp_path)


def test_damaged_and_foreign_files_are_named(tmp_path: Path, vectors: Any) -> None:
    path = tmp_path / "a.h5"
    with pytest.raises(SlideNotFoundError, match="no such feature file"):
        read_facts(path)
    path.write_bytes(b"\x89HDF\r\n\x1a\n cut off")
    with pytest.raises(BadFeaturesError, match=r"a\.h5: cannot be read as HDF5"):
        read_facts(path)
    with h5py.File(path, "w") as file:
        file["coords"] = np.zeros((5, 2))
    with pytest.raises(BadFeaturesError, match="holds coords; a feature file"):
        read_facts(path)
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = vectors, np.zeros((4, 2))
    with pytest.raises(BadFeaturesError, match=r"5 vectors, but places of shape \(4, 2\)"):
        read_features(path)
    with h5py.File(path, "w") as file:
        file["feats"] = vectors[0]
        file.attrs["feat_type"] = "slide"
    with pytest.raises(BadFeaturesError, match="one row for each tile"):
        read_facts(path)


def test_files_are_named_by_their_path_below_the_folder(tmp_path: Path) -> None:
    for name in ("x/b.h5", "a.svs.h5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(feature_files(tmp_path)) == ["a.svs", "x/b"]
    with pytest.raises(SlideNotFoundError, match="no such folder"):
        feature_files(tmp_path / "none")
