"""Annotations: what they refuse, what their id depends on, their colours, and whether they lie on the slide."""

import pickle
from itertools import combinations
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from wsi.annotation import Annotation, canonical_class_name, check_inside, class_color, tissue_annotations
from wsi.errors import AnnotationError

SQUARE = shapely.box(0, 0, 10, 10)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"geometry": shapely.Polygon()}, "not empty"),
        ({"geometry": None}, "not empty"),
        ({"geometry": "POINT (1 1)"}, "not empty"),
        ({"class_name": "Tumor:Positive"}, "write it as 'Tumor: Positive'"),
        ({"class_name": " "}, "write it as None"),
        ({"class_name": "Tu\nmor"}, "write it as 'Tu mor'"),
        ({"name": 3}, "is not text"),
        ({"color": (0, 0, 256)}, "0 to 255"),
        ({"color": (0, 0)}, "0 to 255"),
        ({"color": (0.5, 0, 0)}, "0 to 255"),
        ({"color": (float("nan"), 0, 0)}, "0 to 255"),
        ({"color": "red"}, "0 to 255"),
        ({"measurements": {"": 1.0}}, "needs a name"),
        ({"measurements": {"score": "high"}}, "'score' is no number"),
        ({"measurements": {"score": None}}, "'score' is no number"),
        ({"metadata": {"stain": 5}}, "text to text"),
        ({"object_type": "polygon"}, "is none of annotation, cell, detection, tile, tmaCore"),
        ({"nucleus": SQUARE}, "only a cell"),
        ({"nucleus": shapely.Point(), "object_type": "cell"}, "not empty"),
    ],
)
def test_an_annotation_refuses_what_it_cannot_hold_and_says_why(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(AnnotationError, match=reason):
        Annotation(**{"geometry": SQUARE} | arguments)


def test_an_annotation_does_not_change_with_the_dictionaries_it_was_made_from() -> None:
    measurements: dict[str, Any] = {"score": np.float32(0.5)}
    metadata = {"stain": "H&E"}
    annotation = Annotation(SQUARE, measurements=measurements, metadata=metadata)
    measurements["score"], metadata["stain"] = np.float32(1), "IHC"
    assert annotation.measurements == {"score": 0.5}
    assert annotation.metadata == {"stain": "H&E"}
    assert type(annotation.measurements["score"]) is float


def test_an_annotation_can_be_sent_to_another_process_and_stand_in_a_set() -> None:
    annotation = Annotation(SQUARE, "Tumor", color=(1, 2, 3), measurements={"score": 0.5}, metadata={"a": "b"})
    assert pickle.loads(pickle.dumps(annotation)) == annotation
    assert len({annotation, Annotation(SQUARE, "Tumor", color=(1, 2, 3), measurements={"score": 0.5})}) == 2


def test_the_id_is_the_same_on_every_machine() -> None:
    assert Annotation(SQUARE, "Tumor", name="1").id == UUID("165040fd-1d44-5699-9bd4-469fe0af0085")


def test_the_id_stays_when_the_same_shape_is_drawn_from_another_corner_or_scored_again() -> None:
    annotation = Annotation(SQUARE, "Tumor")
    turned = shapely.Polygon([(10, 10), (10, 0), (0.001, -0.0), (-0.001, 10)])
    again = Annotation(turned, "Tumor", color=(1, 2, 3), measurements={"score": 1}, metadata={"a": "b"}, is_locked=True)
    assert again.id == annotation.id


@pytest.mark.parametrize(
    "other",
    [
        Annotation(shapely.box(0, 0, 10, 10.01), "Tumor", name="1"),
        Annotation(SQUARE, "Stroma", name="1"),
        Annotation(SQUARE, None, name="Tumor1"),
        Annotation(SQUARE, "Tumor1", name=""),
        Annotation(SQUARE, "Tumor"),
        Annotation(SQUARE, "Tumor", name="2"),
        Annotation(SQUARE, "Tumor", name="1", object_type="detection"),
    ],
)
def test_the_id_differs_when_shape_class_name_or_type_do(other: Annotation) -> None:
    assert other.id != Annotation(SQUARE, "Tumor", name="1").id


@given(st.text())
def test_a_canonical_class_name_is_kept_and_always_accepted(name: str) -> None:
    canonical = canonical_class_name(name)
    assert Annotation(SQUARE, canonical).class_name == canonical
    assert canonical is None or (canonical_class_name(canonical) == canonical and all(canonical.split(": ")))


def test_common_classes_have_fixed_colours_in_any_case_and_spelling() -> None:
    assert class_color("Tumor") == class_color("tumour") == class_color("TUMOR") == (213, 94, 0)
    assert class_color("Tissue") == (0, 158, 115)


def test_other_classes_have_the_same_colour_on_every_machine() -> None:
    colors = [class_color(name) for name in ("Gleason 3", "Gleason 4", "Mitosis")]
    assert colors == [(17, 119, 51), (68, 170, 153), (229, 178, 187)]


def _seen_by(name: str, matrix: Any) -> Any:
    linear = (np.array(class_color(name)) / 255) ** 2.2
    return np.clip(matrix @ linear, 0, 1) ** (1 / 2.2) * 255


@pytest.mark.parametrize(
    "matrix",
    [
        # Machado, Oliveira, Fernandes: A physiologically-based model for simulation of color vision deficiency, 2009:
        # protanopia and deuteranopia, severity 1.
        np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
        np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    ],
    ids=["protanopia", "deuteranopia"],
)
def test_colour_blind_people_tell_the_common_classes_apart(matrix: Any) -> None:
    names = ("Tissue", "Tumor", "Stroma", "Immune cells", "Necrosis", "Normal", "Other", "Region*")
    for first, second in combinations(names, 2):
        assert np.abs(_seen_by(first, matrix) - _seen_by(second, matrix)).max() > 30, (first, second)


def test_tissue_is_numbered_in_order_and_measured_in_millimetres() -> None:
    holed = shapely.Polygon(SQUARE.exterior, [shapely.box(2, 2, 4, 4).exterior])
    wide, other = tissue_annotations(iter([shapely.box(0, 0, 2000, 1000), holed]), mpp=(0.5, 0.25))
    assert (wide.class_name, wide.name, other.name) == ("Tissue", "Tissue 1", "Tissue 2")
    assert wide.geometry == shapely.box(0, 0, 2000, 1000)
    assert wide.measurements == pytest.approx({"Area mm^2": 1.0 * 0.25, "Perimeter mm": 2 * (1.0 + 0.25)})
    assert other.measurements["Area mm^2"] == pytest.approx((100 - 4) * 0.5 * 0.25 / 1e6)


SIZE = (50_000, 30_000)


@given(
    st.lists(
        st.tuples(st.integers(200, 40_000), st.integers(200, 20_000), st.integers(1, 9_000), st.integers(1, 9_000)),
        max_size=4,
    )
)
def test_what_lies_inside_the_slide_raises_no_question(boxes: list[tuple[int, int, int, int]]) -> None:
    assert check_inside([Annotation(shapely.box(x, y, x + w, y + h)) for x, y, w, h in boxes], SIZE) is None


@pytest.mark.parametrize("shift", [(-9_000, 0), (45_000, 26_000), (0, -9_999)])
def test_what_lies_outside_is_told_with_an_offset_that_brings_it_inside(shift: tuple[int, int]) -> None:
    boxes = [shapely.box(1_000, 1_000, 9_000, 9_000), shapely.box(0, 0, 10, 10)]
    moved = [shapely.transform(box, lambda xy: xy + shift) for box in boxes]
    hint = check_inside([Annotation(box) for box in moved], SIZE)
    assert hint is not None
    assert "origin mismatch?" in hint
    assert "\n" not in hint
    offset = np.array([int(number) for number in hint.split("(")[1].split(")")[0].split(",")])
    back = [Annotation(shapely.transform(box, lambda xy: xy + offset)) for box in moved]
    assert shapely.total_bounds([box.geometry for box in back]).min() >= 0
    assert check_inside(back, SIZE) is None


def test_less_than_half_of_the_area_outside_is_no_mismatch_however_many_shapes() -> None:
    inside = Annotation(shapely.box(500, 500, 5_000, 5_000))
    outside = [Annotation(shapely.box(-100 - i, -50, -90 - i, -40)) for i in range(20)]
    assert check_inside([inside, *outside], SIZE) is None
    assert check_inside([Annotation(shapely.box(-999, 0, 1_001, 500))], SIZE) is None


def test_annotations_larger_than_the_slide_are_not_offered_an_offset() -> None:
    hint = check_inside([Annotation(shapely.box(-90_000, 0, 90_000, 10_000))], SIZE)
    assert hint is not None
    assert "72%" in hint
    assert "larger than the slide" in hint


@pytest.mark.parametrize(
    "shape",
    [
        shapely.Point(60_000, 100),
        shapely.LineString([(60_000, 100), (60_500, 100)]),
        shapely.Polygon([(60_000, 0), (60_500, 500), (60_500, 0), (60_000, 500)]),
    ],
    ids=["point", "line", "bow-tie"],
)
def test_points_lines_and_crossing_outlines_are_noticed_outside_as_well(shape: Any) -> None:
    assert "100%" in (check_inside([Annotation(shape)], SIZE) or "")
    assert check_inside([Annotation(shapely.transform(shape, lambda xy: xy - (20_000, 0)))], SIZE) is None


def test_coordinates_that_could_be_degrees_are_told() -> None:
    degrees = [Annotation(shapely.box(-71.2, 42.1, -71.1, 42.2))]
    assert "longitude and latitude" in (check_inside(degrees, SIZE) or "")
    assert check_inside([*degrees, Annotation(shapely.box(0, 0, 5_000, 5_000))], SIZE) is None
    assert check_inside([Annotation(shapely.box(1, 1, 80, 80))], (200, 100)) is None


def test_points_that_are_not_finite_are_no_place_at_all() -> None:
    with np.errstate(invalid="ignore"):
        nowhere = Annotation(shapely.LineString([(np.nan, 0), (90_000, 0)]))
    assert check_inside([nowhere], SIZE) is None
    assert check_inside([nowhere, Annotation(shapely.box(500, 500, 600, 600))], SIZE) is None
    assert check_inside([], SIZE) is None
