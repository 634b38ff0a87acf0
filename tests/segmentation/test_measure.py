"""Tables of areas: a row a slide and class, and nothing where a number is not known."""

import csv
import math
from pathlib import Path

import pytest
import shapely

from segmentation.measure import ClassSummary, summarize, write_areas_csv
from wsi.annotation import Annotation


def test_every_slide_and_class_has_its_row_and_what_is_not_known_is_empty(tmp_path: Path) -> None:
    pieces = [Annotation(shapely.box(0, 0, 1000, 1000), "a"), Annotation(shapely.box(0, 0, 10, 10), "b")]
    known = summarize(pieces, (0.5, 0.5), tissue_mm2=0.5)
    unknown = summarize(pieces[:1], (1.0, 1.0))
    rows = [*(("x, y.svs", area) for area in known), ("ä/z.svs", unknown[0])]
    write_areas_csv(tmp_path / "areas.csv", rows)
    with (tmp_path / "areas.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["slide"], row["class"]) for row in found] == [("x, y.svs", "a"), ("x, y.svs", "b"), ("ä/z.svs", "a")]
    assert [float(row["area_mm2"]) for row in found] == pytest.approx([0.25, 25e-6, 1.0])
    assert [row["tissue_share"] for row in found] == ["0.5", "5e-05", ""]
    assert [row["per_mm2"] for row in found] == ["2", "2", ""]
    assert [row["count"] for row in found] == ["1"] * 3


def test_a_table_of_nothing_has_its_head_and_replaces_an_older_one(tmp_path: Path) -> None:
    area = ClassSummary("a", 1, 1.0, 1.0, 1.0, 1.0, math.nan, math.nan)
    write_areas_csv(tmp_path / "areas.csv", [("s", area)])
    write_areas_csv(tmp_path / "areas.csv", [])
    (head,) = (tmp_path / "areas.csv").read_text(encoding="utf-8").splitlines()
    assert head.startswith("slide,class,count,area_mm2,")
