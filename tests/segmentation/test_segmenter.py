"""Segmenter: each method asks for what it needs, and maps are shared only where they would be the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

from segmentation.classifier import PatchClassifier
from segmentation.heat import HeatOptions, ProbabilityMap
from segmentation.place import MapPlace
from segmentation.segmenter import Found, Segmenter, read_about, write_model
from segmentation.stages import PatchStage
from segmentation.train import train
from tests.segmentation.trained import config, save_picture, slide, tumour
from wsi.annotation import Annotation
from wsi.errors import ModelMismatchError, UsageError
from wsi.slide import Slide

MPP = (1.0, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model by the method patches."""
    scratch = tmp_path_factory.mktemp("model")
    train([slide(scratch, seed) for seed in range(4)], config("patches"), scratch / "model")
    return scratch / "model"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return save_picture(tmp_path / "a.png", 31)


def scored(segmenter: Segmenter, picture: Path, path: Path) -> tuple[Found, ProbabilityMap]:
    with Slide.open(picture, mpp=MPP) as opened:
        heat = segmenter.score(opened, path)
        return segmenter.find(opened, heat), heat


def test_patches_are_of_the_likeliest_class_of_the_map_and_lie_where_it_lies(
    folder: Path, picture: Path, tmp_path: Path
) -> None:
    segmenter = Segmenter.load(folder, device="cpu")
    assert segmenter.classes == ("tumour",)
    found, heat = scored(segmenter, picture, tmp_path / "h.zarr")
    assert found.place == heat.place == MapPlace((16.0, 16.0), MPP)
    assert found.classes == {1: "tumour"}
    probability = heat.probability("tumour")
    np.testing.assert_array_equal(found.labels[:], probability > 0.5)
    np.testing.assert_allclose(found.probability[:], np.maximum(probability, 1 - probability), atol=1e-6)
    y, x = ((np.argwhere(found.labels[:] == 1) + 0.5) * 16).mean(0)
    assert (x, y) == pytest.approx(tumour(31).centroid.coords[0], abs=6)


def test_the_seconds_of_the_first_stage_are_counted(folder: Path, picture: Path, tmp_path: Path) -> None:
    segmenter = Segmenter.load(folder, device="cpu")
    assert segmenter.busy_s == 0
    scored(segmenter, picture, tmp_path / "h.zarr")
    first = segmenter.busy_s
    scored(segmenter, picture, tmp_path / "again.zarr")
    assert segmenter.busy_s > first > 0


def _with(folder: Path, heat: HeatOptions) -> Segmenter:
    classifier = PatchClassifier.load(folder / "classifier.safetensors")
    return Segmenter(read_about(folder), PatchStage(classifier.encoder(), classifier.facts, heat), None)


def test_maps_share_a_name_only_where_they_would_be_the_same(folder: Path) -> None:
    mark: dict[str, Any] = {"bytes": 3, "sha256": "a"}
    name = Segmenter.load(folder, device="cpu").heat_name(mark)
    assert Segmenter.load(folder, device="cpu").heat_name(dict(reversed(mark.items()))) == name
    assert _with(folder, HeatOptions(batch_size=7, threads=1)).heat_name(mark) == name
    others = {
        Segmenter.load(folder, device="cpu").heat_name({**mark, "bytes": 4}),
        _with(folder, HeatOptions(steps=2)).heat_name(mark),
        _with(folder, HeatOptions(min_tissue=0.2)).heat_name(mark),
    }
    assert len(others) == 3
    assert name not in others


def test_saved_settings_of_the_first_stage_are_used(folder: Path, picture: Path, tmp_path: Path) -> None:
    found, _ = scored(_with(folder, HeatOptions(steps=2)), picture, tmp_path / "h.zarr")
    assert found.place.scale == (8.0, 8.0)


def test_patches_without_a_map_and_a_picture_with_a_first_stage_are_refused(folder: Path, picture: Path) -> None:
    segmenter = Segmenter.load(folder, device="cpu")
    with Slide.open(picture, mpp=MPP) as opened:
        with pytest.raises(UsageError, match="told from the first stage's map; give it"):
            segmenter.find(opened)
        alone = Segmenter({**segmenter.about, "method": "picture"}, None, None)
        assert alone.first is None
        with pytest.raises(UsageError, match="by the method picture has no first stage"):
            alone.grid(opened, ())
    assert segmenter.first is not None


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"format": "x", "version": 1}', '{"format": 1, "version": 1, "files": 3}']
)
def test_what_is_no_note_of_a_model_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelMismatchError, match=r"model\.json: cannot be read as a model"):
        read_about(tmp_path)


def test_a_model_is_the_networks_that_are_there_and_what_was_said_of_it(tmp_path: Path) -> None:
    (tmp_path / "refinement.safetensors").write_bytes(b"weights")
    write_model(tmp_path, {"method": "picture", "classes": ["ä"]})
    about = read_about(tmp_path)
    assert (about["method"], about["classes"], list(about["files"])) == ("picture", ["ä"], ["refinement.safetensors"])
    (tmp_path / "refinement.safetensors").write_bytes(b"weightz")
    with pytest.raises(ModelMismatchError, match=r"refinement\.safetensors: is missing or damaged"):
        read_about(tmp_path)


def test_the_first_stage_of_a_cascade_alone_says_what_its_map_says(
    trained_model: Path, picture: Path, tmp_path: Path
) -> None:
    cascade = Segmenter.load(trained_model, device="cpu")
    both, heat = scored(cascade, picture, tmp_path / "h.zarr")
    alone = cascade.first_alone()
    assert alone.about["method"] == "patches"
    with Slide.open(picture, mpp=MPP) as opened:
        first = alone.find(opened, heat)
    np.testing.assert_array_equal(first.labels[:], heat.probability("tumour") > 0.5)
    assert first.place == heat.place != both.place
    with pytest.raises(UsageError, match="has no first stage"):
        Segmenter({**cascade.about, "method": "picture"}, None, None).first_alone()


def test_only_the_tissue_that_is_given_is_looked_at(folder: Path, picture: Path, tmp_path: Path) -> None:
    segmenter = Segmenter.load(folder, device="cpu")
    half = [Annotation(shapely.box(0, 0, 128, 96), "Tissue")]
    with Slide.open(picture, mpp=MPP) as opened:
        assert len(segmenter.grid(opened, half)) == 8 * 6  # of 16 px
        heat = segmenter.score(opened, tmp_path / "h.zarr", tissue=half)
    assert heat.facts["patches"] == 8 * 6
    assert np.isnan(heat.probability("tumour")[:, 8:]).all()
