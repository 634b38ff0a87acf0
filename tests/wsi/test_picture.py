"""Pictures of areas: each in the colour of its class, where it lies, its holes left as they are."""

import numpy as np
import shapely

from wsi.annotation import Annotation, class_color
from wsi.picture import draw_areas
from wsi.slide import Overview

GREY = 200
VEIL = 0.3


def view() -> Overview:
    """60 x 40 pixels of a slide of 240 x 80."""
    return Overview(np.full((40, 60, 3), GREY, np.uint8), (4.0, 2.0))


def veiled(colour: tuple[int, int, int]) -> np.ndarray:
    return np.array([GREY * (1 - VEIL) + channel * VEIL for channel in colour])


def test_areas_are_veiled_and_outlined_where_they_lie_and_holes_are_not() -> None:
    hole = shapely.box(100, 30, 140, 50)
    ring = shapely.box(40, 10, 200, 70).difference(hole)
    before = view()
    image = draw_areas(before, [Annotation(ring, "tumour", color=(255, 0, 0))]).astype(float)
    assert (before.image == GREY).all()
    np.testing.assert_allclose(image[8:12, 14:24].reshape(-1, 3), np.tile(veiled((255, 0, 0)), (40, 1)), atol=1)
    for inside_hole_or_off in (image[18:23, 28:32], image[:, :8], image[:3], image[:, 53:]):
        assert (inside_hole_or_off == GREY).all()
    assert image[20, 10, 1] < 60  # the outline, in the full colour
    assert image[20, 25, 1] < 60  # that of the hole too


def test_classes_have_their_colours_where_none_is_given() -> None:
    shapes = [Annotation(shapely.box(10, 10, 90, 70), "tumour"), Annotation(shapely.box(130, 10, 220, 70), "stroma")]
    image = draw_areas(view(), shapes).astype(float)
    assert class_color("tumour") != class_color("stroma")
    np.testing.assert_allclose(image[20, 12], veiled(class_color("tumour")), atol=1)
    np.testing.assert_allclose(image[20, 44], veiled(class_color("stroma")), atol=1)


def test_every_part_of_an_area_is_drawn_and_points_are_not() -> None:
    parts = shapely.MultiPolygon([shapely.box(10, 10, 60, 70), shapely.box(150, 10, 220, 70)])
    image = draw_areas(view(), [Annotation(parts, "a", color=(0, 0, 0)), Annotation(shapely.Point(100, 40), "b")])
    assert (image[20, [8, 46]] < 150).all()
    assert (image[:, 18:35] == GREY).all()


def test_nothing_found_leaves_the_picture() -> None:
    assert (draw_areas(view(), []) == GREY).all()
