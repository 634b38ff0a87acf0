"""Annotated slides: files find their slides, what seems wrong is said, and nothing odd is learned from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from PIL import Image

from segmentation.annotated import AnnotatedCohort, annotated_slides
from segmentation.sampling import IGNORED, REGION
from tests.segmentation.trained import save_picture, tumour, write_truth
from wsi.discover import discover
from wsi.errors import CohortError, UsageError

MPP = (1.0, 1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in (1, 2):
        save_picture(tmp_path / "slides" / f"{seed}.png", seed)
        write_truth(tmp_path / "truth" / f"{seed}.geojson", seed)
    return tmp_path


def read(folder: Path, classes: tuple[str, ...] = ("tumour",), **options: Any) -> AnnotatedCohort:
    return annotated_slides(discover(folder / "slides").sources, folder / "truth", classes, **{"mpp": MPP, **options})


def add(path: Path, shape: shapely.Geometry, name: str | None) -> None:
    contents = json.loads(path.read_text(encoding="utf-8"))
    properties = {"objectType": "annotation"} | ({"classification": {"name": name}} if name else {})
    contents["features"].append(
        {"type": "Feature", "geometry": json.loads(shapely.to_geojson(shape)), "properties": properties}
    )
    path.write_text(json.dumps(contents), encoding="utf-8")


def emptied(path: Path) -> None:
    path.write_text('{"type": "FeatureCollection", "features": []}', encoding="utf-8")


def test_slides_come_with_their_own_shapes_resolution_and_tissue(folder: Path) -> None:
    cohort = read(folder)
    assert cohort.notes == ()
    assert [Path(each.location).name for each in cohort.slides] == ["1.png", "2.png"]
    for seed, each in zip((1, 2), cohort.slides, strict=True):
        (drawn,) = each.annotations
        assert drawn.class_name == "tumour"
        assert drawn.geometry.equals(tumour(seed))
        assert each.mpp == MPP
        assert each.tissue
        assert shapely.union_all([piece.geometry for piece in each.tissue]).contains(tumour(seed))


def test_other_columns_of_the_table_become_facts(folder: Path) -> None:
    table = folder / "slides" / "t.csv"
    table.write_text("slide,mpp,patient,grade\n1.png,0.5,p,3\n2.png,,q,\n", encoding="utf-8")
    found = discover(table)
    cohort = annotated_slides(found.sources, folder / "truth", ("tumour",), mpp=None)
    (kept,) = cohort.slides
    assert kept.facts == {"patient": "p", "grade": "3"}
    assert kept.mpp == (0.5, 0.5)
    assert any("2.png" in note and note.endswith("left out") for note in cohort.notes)  # nobody says its resolution


def test_a_file_without_shapes_says_that_there_is_nothing(folder: Path) -> None:
    emptied(folder / "truth" / "2.geojson")
    cohort = read(folder)
    assert cohort.slides[1].annotations == ()
    assert cohort.notes == ("2.png: nothing is drawn on it: all of it counts as background",)


def test_a_slide_with_a_chosen_region_and_no_class_is_background_there(folder: Path) -> None:
    emptied(folder / "truth" / "2.geojson")
    add(folder / "truth" / "2.geojson", shapely.box(20, 20, 80, 80), REGION)
    cohort = read(folder)
    assert [each.class_name for each in cohort.slides[1].annotations] == [REGION]


def test_a_slide_with_nothing_but_what_is_to_be_ignored_is_left_out(folder: Path) -> None:
    emptied(folder / "truth" / "2.geojson")
    add(folder / "truth" / "2.geojson", shapely.box(20, 20, 80, 80), IGNORED)
    cohort = read(folder)
    assert len(cohort.slides) == 1
    assert cohort.notes[-1] == "2.png: left out"


def test_a_file_of_which_no_shape_can_be_read_is_not_taken_for_an_empty_one(folder: Path) -> None:
    bad = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}, "properties": {}}
    (folder / "truth" / "2.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [bad]}), "utf-8")
    cohort = read(folder)
    assert len(cohort.slides) == 1
    assert cohort.notes[-1] == "2.png: no shape could be read; left out"


def test_shapes_of_no_class_are_of_the_only_one_asked_for_and_of_none_where_there_are_more(folder: Path) -> None:
    emptied(folder / "truth" / "1.geojson")
    add(folder / "truth" / "1.geojson", tumour(1), None)
    assert read(folder).slides[0].annotations[0].class_name == "tumour"
    two = read(folder, ("tumour", "stroma"))
    assert len(two.slides) == 1
    assert any("1 shape without a class, none of tumour, stroma" in note for note in two.notes)


def test_a_file_that_tells_classes_apart_keeps_them(folder: Path) -> None:
    add(folder / "truth" / "1.geojson", shapely.box(0, 0, 9, 9), None)
    assert [each.class_name for each in read(folder).slides[0].annotations] == ["tumour", None]


def test_a_mask_of_one_label_is_of_the_class_asked_for(folder: Path) -> None:
    (folder / "truth" / "1.geojson").unlink()
    mask = np.zeros((192, 256), np.uint8)
    x0, y0, x1, y1 = (int(v) for v in tumour(1).bounds)
    mask[y0:y1, x0:x1] = 1
    Image.fromarray(mask).save(folder / "truth" / "1_mask.png")
    (drawn,) = read(folder).slides[0].annotations
    assert drawn.class_name == "tumour"
    assert drawn.geometry.symmetric_difference(tumour(1)).area == 0


def test_a_slide_without_a_file_and_a_file_without_a_slide_are_named(folder: Path) -> None:
    (folder / "truth" / "2.geojson").rename(folder / "truth" / "2x.geojson")
    cohort = read(folder)
    assert len(cohort.slides) == 1
    assert any(note.endswith("2.png: no annotations; left out") for note in cohort.notes)
    assert any(note.startswith("2x.geojson: belong") for note in cohort.notes)


def test_nothing_to_learn_from_is_one_line_that_says_why(folder: Path) -> None:
    with pytest.raises(CohortError, match=r"no slide has annotations to learn from: .*did you mean 'tumor'") as caught:
        read(folder, ("tumor",))
    assert "\n" not in str(caught.value)
    with pytest.raises(CohortError, match="belong to no slide"):
        annotated_slides((), folder / "truth", ("tumour",))


def test_a_folder_that_is_not_there_and_two_files_for_a_slide_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="no folder of annotations"):
        annotated_slides(discover(folder / "slides").sources, folder / "nowhere", ("tumour",))
    write_truth(folder / "truth" / "1_mask.geojson", 1)
    with pytest.raises(UsageError, match="several files could be its annotations"):
        read(folder)
