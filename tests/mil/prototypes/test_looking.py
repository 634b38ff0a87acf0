"""Tests of what can be seen of prototypes: surveys, sheets, maps, charts and tables of outcomes."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import CoxPHFitter
from PIL import Image
from scipy.stats import kruskal

from features.store import FeatureStore
from mil.bag import Bag
from mil.cohort import Cohort
from mil.prototypes import (
    ProtoCounts,
    PrototypeMap,
    Prototypes,
    SlideSet,
    Survey,
    map_slide,
    outcome_table,
    survey_slides,
)
from mil.prototypes.charts import proportions, share_map
from mil.prototypes.outcomes import corrected, patient_shares
from mil.prototypes.palette import prototype_color, prototype_name, slide_name
from mil.prototypes.pictures import draw_charts, draw_maps, draw_sheets
from mil.prototypes.sheets import contact_sheet, tile_pixels
from mil.target import Labels
from tests.mil.made_up import grid_of, write_store
from wsi.errors import RunMismatchError, UsageError
from wsi.geojson import Frame, read_geojson

K, DIM = 3, 6
CENTRES = (10 * np.eye(K, DIM)).astype(np.float32)
PROTOTYPES = Prototypes(CENTRES, np.array([0.5, 0.3, 0.2]), {"encoder": ["made-up"]}, {})
FRAME = Frame("s.svs", (200, 160), (0.25, 0.25), (3, 5))


def tiles(kinds: list[int], far: list[float] | None = None) -> Any:
    """(N, DIM) tiles of these prototypes, each ``far`` from its own along the last feature."""
    x = CENTRES[kinds].copy()
    x[:, -1] = 0 if far is None else far
    return x


def survey_of(bags: dict[str, Any], **options: Any) -> Survey:
    slides = SlideSet.from_bags([Bag(x, None, name) for name, x in bags.items()])
    return survey_slides(slides, PROTOTYPES, **options)


def shared(shares: Any, slides: tuple[str, ...] | None = None) -> Survey:
    """A survey of these shares (S, K)."""
    shares = np.asarray(shares, float)
    shares = shares / shares.sum(axis=1, keepdims=True)
    names = slides or tuple(f"s{i}" for i in range(len(shares)))
    k = shares.shape[1]
    prototypes = Prototypes(np.eye(k, dtype=np.float32), np.full(k, 1 / k), {}, {})
    return Survey(prototypes, names, np.full(len(shares), 10), shares, ((),) * k)


def cohort_of(y: Any, patients: Any = None, **labels: Any) -> Cohort:
    bags = [Bag(np.ones((1, 2), np.float32), None, f"s{i}") for i in range(len(y))]
    return Cohort.from_arrays(bags, y, patients, labels=Labels("target", **labels) if labels else None)


class TestSurvey:
    def test_shares_are_of_each_slide_and_the_total_is_of_all_tiles(self) -> None:
        survey = survey_of({"a": tiles([0, 0, 1, 2]), "b": tiles([1] * 12)})
        assert survey.shares.tolist() == [[0.5, 0.25, 0.25], [0, 1, 0]]
        np.testing.assert_allclose(survey.total, [2 / 16, 13 / 16, 1 / 16])

    def test_the_nearest_tiles_come_from_different_slides_nearest_first(self) -> None:
        bags = {
            "a": tiles([0, 0, 0, 1], [3, 1, 2, 0]),
            "b": tiles([0, 1], [1.5, 4]),
            "c": tiles([0, 2], [0.5, 0]),
        }
        survey = survey_of(bags, n_near=2)
        assert [(tile.slide, tile.row) for tile in survey.nearest[0]] == [("2", 0), ("0", 1)]
        assert [tile.distance for tile in survey.nearest[0]] == pytest.approx([0.5, 1])
        assert [(tile.slide, tile.row) for tile in survey.nearest[1]] == [("0", 3), ("1", 1)]
        assert len(survey.nearest[2]) == 1  # no other slide has any of it, and tiles of others do not fill in
        two = survey_of(bags, n_near=4, per_slide=2).nearest[0]
        assert [(tile.slide, tile.row) for tile in two] == [("2", 0), ("0", 1), ("1", 0), ("0", 2)]

    def test_tiles_belong_where_the_hard_assignment_of_the_methods_puts_them(self) -> None:
        x = np.random.default_rng(0).normal(4, 4, (300, DIM)).astype(np.float32)
        scaled = Prototypes(CENTRES, PROTOTYPES.shares, {}, {}, np.array([9, 1, 3, 1, 2, 1], np.float32))
        for prototypes in (PROTOTYPES, scaled):
            survey = survey_slides(SlideSet.from_bags([Bag(x, None, "a")]), prototypes)
            expected = ProtoCounts().assign(torch.from_numpy(x), prototypes)[0].mean(0)
            np.testing.assert_allclose(survey.shares[0], expected.numpy(), atol=1e-6)

    def test_features_of_another_encoder_are_refused(self, tmp_path: Path) -> None:
        write_store(tmp_path / "OUT", {"a.svs": tiles([0, 1])}, encoder="other")
        with pytest.raises(RunMismatchError, match="other"):
            survey_slides(SlideSet.from_store(tmp_path / "OUT", "other"), PROTOTYPES)


class TestPalette:
    def test_colours_do_not_repeat_and_stay_apart_for_the_colour_blind(self) -> None:
        """Machado, Oliveira, Fernandes 2009, severity 1; CIELAB distances."""
        linear = (np.array([prototype_color(i) for i in range(32)]) / 255) ** 2.2
        protan = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
        deutan = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
        to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        for sight in (np.eye(3), np.array(protan), np.array(deutan)):
            f = np.cbrt(np.clip(linear @ sight.T, 0, 1) @ to_xyz.T / [0.9505, 1, 1.089])
            lab = np.stack([116 * f[:, 1], 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
            apart = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1e3 * np.eye(32)
            assert apart[:16, :16].min() > 15
            assert apart.min() > 9

    def test_names_count_from_one_and_colours_go_on_beyond_the_last(self) -> None:
        assert [prototype_name(0), prototype_name(15)] == ["Prototype 1", "Prototype 16"]
        assert prototype_color(32) == prototype_color(0)


class TestMap:
    def test_annotations_are_the_tiles_of_each_prototype_as_one_shape(self, tmp_path: Path) -> None:
        made = PrototypeMap(grid_of(8), np.array([0, 0, 2, -1, 0, 2, 2, -1]), K, FRAME)
        first, last = made.annotations()
        assert (first.class_name, last.class_name) == ("Prototype 1", "Prototype 3")
        assert (first.color, last.color) == (prototype_color(0), prototype_color(2))
        corner = [shapely.box(0, 0, 20, 10), shapely.box(0, 10, 10, 20)]
        assert first.geometry.equals(shapely.union_all(corner))
        assert last.measurements == pytest.approx({"Tiles": 3, "Share": 0.5, "Area mm^2": 300 * 0.0625 / 1e6})
        made.save(tmp_path / "m.geojson")
        read = read_geojson(tmp_path / "m.geojson").annotations
        assert [each.class_name for each in read] == ["Prototype 1", "Prototype 3"]
        assert read[1].geometry.equals(last.geometry)
        assert read[1].color == prototype_color(2)

    def test_a_picture_has_the_colour_of_each_tile_and_none_where_there_is_none(self) -> None:
        made = PrototypeMap(grid_of(8), np.array([0, 1, 2, -1, 0, 1, 2, -1]), K, FRAME)
        picture = made.picture()
        for column, index in enumerate((0, 1, 2)):
            expected = 0.6 * np.array(prototype_color(index)) + 0.4 * 255
            np.testing.assert_allclose(picture[5, column * 10 + 5], expected, atol=1)
        assert (picture[5, 35] == 255).all()
        assert (picture[100, 100] == 255).all()
        assert any((picture[:, 200:] == prototype_color(1)).all(axis=2).ravel())  # the legend

    def test_tiles_without_features_belong_to_none(self, tmp_path: Path) -> None:
        status = np.array([0, 1, 0, 0], np.uint8)
        x = tiles([0, 1, 2, 1])
        x[1] = 0
        write_store(tmp_path / "OUT", {"a.svs": x}, status=status)
        slides = SlideSet.from_store(tmp_path / "OUT", "made-up")
        assert map_slide(slides.source, slides.slides[0], PROTOTYPES).prototype.tolist() == [0, -1, 2, 1]

    @pytest.mark.parametrize("wrong", [[0, 1], [0, 1, 3, 0], [0, -2, 1, 1]])
    def test_indices_that_fit_no_prototype_or_tile_are_refused(self, wrong: list[int]) -> None:
        with pytest.raises(ValueError, match="4 tiles need"):
            PrototypeMap(grid_of(4), np.array(wrong), K, FRAME)

    def test_another_suffix_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="saved as"):
            PrototypeMap(grid_of(1), np.array([0]), K, FRAME).save(tmp_path / "m.svg")


@pytest.fixture
def cohort_folder(tmp_path: Path) -> Any:
    """A store of two pictures, whose tile (column, row) is coloured (50 column, 50 row, 9), and of one that is gone."""
    column, row = np.meshgrid(np.arange(200) // 10, np.arange(160) // 10)
    image = np.stack([np.minimum(50 * column, 255), np.minimum(50 * row, 255), np.full(row.shape, 9)], 2).astype(
        np.uint8
    )
    for name in "ab":
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    bags = {
        str(tmp_path / "a.png"): tiles([0, 1, 1, 2, 0, 0, 2, 1], [1, 1, 2, 1, 2, 3, 2, 0]),
        str(tmp_path / "b.png"): tiles([0, 0, 0, 1]),
        str(tmp_path / "gone.png"): tiles([2, 2, 2, 0], [0, 1, 1, 1]),
    }
    write_store(tmp_path / "OUT", bags)
    return tmp_path


class TestSheets:
    def test_pixels_are_those_of_the_tile_named(self, cohort_folder: Path) -> None:
        slides = SlideSet.from_store(cohort_folder / "OUT", "made-up")
        survey = survey_slides(slides, PROTOTYPES)
        failed: dict[str, Any] = {}
        pixels = tile_pixels(
            FeatureStore(cohort_folder / "OUT"), slides.source, [t for near in survey.nearest for t in near],
            failed=lambda slide, error: failed.update({slide: error}),
        )  # fmt: skip
        (tile,) = [tile for tile in survey.nearest[1] if slide_name(tile.slide) == "a.png"]
        assert tile.row == 7
        assert pixels[tile].shape == (5, 5, 3)
        assert (pixels[tile] == (150, 50, 9)).all()
        assert [slide_name(name) for name in failed] == ["gone.png"]
        sheet = contact_sheet(survey, 2, pixels)
        words = [axes.get_xlabel() for axes in sheet.axes]
        assert words[:2] == ["gone.png\ndistance 0", "a.png\ndistance 1"]
        assert [len(axes.images) for axes in sheet.axes[:2]] == [0, 1]  # no pixels are made up for a slide that is gone

    def test_everything_is_drawn_and_what_lacks_pixels_is_named(self, cohort_folder: Path) -> None:
        slides = SlideSet.from_store(cohort_folder / "OUT", "made-up")
        survey = survey_slides(slides, PROTOTYPES)
        out = cohort_folder / "pictures"
        assert [slide_name(name) for name in draw_sheets(survey, slides.source, out)] == ["gone.png"]
        draw_charts(survey, out)
        assert [slide_name(name) for name in draw_maps(survey, slides.source, out)] == ["gone.png"]
        with (out / "shares.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [(row["slide"], row["tiles"], row["Prototype 1"]) for row in rows] == [
            ("a.png", "8", "0.375"), ("b.png", "4", "0.75"), ("gone.png", "4", "0.25"),
        ]  # fmt: skip
        drawn = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
        assert drawn[0] == "cohort.png"
        assert [name for name in drawn if name.startswith("sheets/")] == [
            f"sheets/prototype-{i}.png" for i in (1, 2, 3)
        ]
        assert len([name for name in drawn if name.startswith("maps/")]) == 6


class TestCharts:
    def test_a_bar_is_as_long_as_the_share(self) -> None:
        figure = proportions(shared([[2, 1, 1], [0, 1, 3]]))
        bars = [[bar.get_width() for bar in container] for container in figure.axes[0].containers]
        np.testing.assert_allclose(bars, [[0.5, 0], [0.25, 0.25], [0.25, 0.75]])

    def test_like_slides_stand_together_and_every_name_stands_by_its_row(self) -> None:
        kinds = [[8, 1, 1], [1, 8, 1], [7, 2, 1], [1, 7, 2], [8, 2, 1]]
        survey = shared(kinds)
        figure = share_map(survey, {f"s{i}": "even" if i % 2 == 0 else "odd" for i in range(5)})
        (axes,) = [axes for axes in figure.axes if axes.get_xlabel() == "prototype"]
        names = [tick.get_text() for tick in axes.get_yticklabels()]
        assert {frozenset(names[:3]), frozenset(names[3:])} & {frozenset(("s0", "s2", "s4"))} or set(names[2:]) == {
            "s0",
            "s2",
            "s4",
        }
        columns = [int(tick.get_text()) - 1 for tick in axes.get_xticklabels()]
        rows = [survey.slides.index(name) for name in names]
        np.testing.assert_allclose(np.asarray(axes.images[0].get_array()) ** 2, survey.shares[np.ix_(rows, columns)])

    @pytest.mark.parametrize("shares", [[[1.0]], [[1, 2, 3]], [[1, 1], [1, 1], [1, 1]]])
    def test_one_slide_one_prototype_or_no_difference_can_be_drawn(self, shares: Any) -> None:
        figure = share_map(shared(shares))
        figure.canvas.draw()
        proportions(shared(shares)).canvas.draw()


class TestOutcomes:
    rng = np.random.default_rng(3)

    def test_two_classes_give_the_chance_that_the_second_has_more(self) -> None:
        first = [[1, 9, 5], [2, 8, 5], [3, 7, 5], [1, 9, 5], [2, 8, 5]]
        second = [[7, 3, 5], [8, 2, 5], [6, 4, 5], [9, 1, 5], [8, 2, 5]]
        table = outcome_table(shared(first + second), cohort_of(["x"] * 5 + ["y"] * 5))
        assert [row.effect for row in table.rows[:2]] == [1.0, 0.0]
        assert table.rows[0].p < 0.02
        assert math.isnan(table.rows[2].p)  # the same share everywhere: nothing to test
        assert math.isnan(table.rows[2].q)
        assert table.rows[0].q == pytest.approx(max(table.rows[0].p, table.rows[1].p))
        np.testing.assert_allclose(table.rows[0].means, [1.8 / 15, 7.6 / 15])
        assert (
            str(table).splitlines()[-1].startswith("target: Mann-Whitney, 10 patients; effect: chance that y has more")
        )
        assert "nan" not in str(table)

    def test_a_patient_counts_once_with_the_mean_of_the_slides(self) -> None:
        survey = shared([[1, 0], [0, 1], [3, 1], [1, 3], [1, 1]])
        cohort = cohort_of(["x", "x", "y", "x", "y"], ["p", "p", "q", "r", "s"])
        shares, y, _ = patient_shares(survey, cohort)
        np.testing.assert_allclose(shares[:, 0], [0.5, 0.75, 0.25, 0.5])
        assert y.tolist() == [0, 1, 0, 1]
        assert outcome_table(survey, cohort).n_patients == 4

    def test_slides_that_only_one_side_knows_take_no_part(self) -> None:
        survey = shared([[1, 0], [0, 1], [1, 1], [1, 2]], ("s0", "s2", "s3", "other"))
        assert outcome_table(survey, cohort_of(["x", "y", "x", "y"])).n_patients == 3

    @pytest.mark.parametrize(
        ("y", "options", "test"),
        [
            (np.linspace(0, 1, 12) + 0.05, {}, "Spearman"),
            (["a"] * 4 + ["b"] * 4 + ["c"] * 4, {}, "Kruskal-Wallis"),
            (["1"] * 4 + ["2"] * 4 + ["3"] * 4, {"kind": "ordinal"}, "Spearman"),
        ],
    )
    def test_values_and_grades_are_found_where_they_were_put(self, y: Any, options: Any, test: str) -> None:
        share = np.linspace(0.1, 0.6, 12)
        other = self.rng.uniform(0.1, 0.2, 12)
        survey = shared(np.stack([share, other, 1 - share - other], 1))
        table = outcome_table(survey, cohort_of(y, **options))
        assert table.test == test
        assert table.rows[0].effect > 0.8
        assert table.rows[0].q < 0.05 < table.rows[1].p

    def test_a_hazard_ratio_rises_with_what_kills(self) -> None:
        share = self.rng.uniform(0.05, 0.6, 60)
        other = self.rng.uniform(0.05, 0.3, 60)
        time = self.rng.exponential(np.exp(-6 * share)) + 0.01
        event = self.rng.random(60) < 0.8
        survey = shared(np.stack([share, other, 1 - share - other], 1))
        table = outcome_table(survey, cohort_of(np.stack([time, event], 1)))
        assert table.n_events == event.sum()
        assert table.rows[0].effect > 1.5
        assert table.rows[2].effect < 0.8
        assert table.rows[0].q < 1e-3 < table.rows[1].p

    def test_hazard_ratios_are_for_a_deviation_and_p_of_the_likelihood_ratio(self) -> None:
        share = self.rng.uniform(0.05, 0.9, 12)
        time, event = self.rng.exponential(np.exp(-2 * share)) + 0.01, np.arange(12) % 4 > 0
        survey = shared(np.stack([share, 1 - share], 1))
        row = outcome_table(survey, cohort_of(np.stack([time, event], 1))).rows[0]
        plain = CoxPHFitter().fit(
            pd.DataFrame({"share": survey.shares[:, 0], "time": time, "event": event}), "time", "event"
        )
        assert math.log(row.effect) == pytest.approx(plain.params_["share"] * survey.shares[:, 0].std(), rel=1e-4)
        assert row.p == pytest.approx(plain.log_likelihood_ratio_test().p_value, rel=1e-4)
        assert abs(row.p - plain.summary["p"]["share"]) > 1e-3 * row.p  # Wald's is another

    def test_of_several_classes_the_effect_is_epsilon_squared(self) -> None:
        share = self.rng.uniform(0.1, 0.9, 12)
        row = outcome_table(shared(np.stack([share, 1 - share], 1)), cohort_of(["a", "b", "c"] * 4)).rows[0]
        found = kruskal(*(share[i::3] for i in range(3)))
        assert row.effect == pytest.approx(found.statistic * (12 + 1) / (12**2 - 1))  # Tomczak and Tomczak, 2014
        assert row.p == pytest.approx(found.pvalue)

    def test_patients_whose_first_label_is_not_known_take_no_part(self) -> None:
        bags = [np.ones((3, 2), np.float32)] * 4
        cohort = Cohort.from_arrays(
            [Bag(x, None, f"s{i}") for i, x in enumerate(bags)],
            {"first": ["x", None, "y", "x"], "second": [1.0, 2.0, 3.0, 4.5]},
        )
        shares, y, _ = patient_shares(shared([[1, 0], [0, 1], [1, 1], [1, 3]]), cohort)
        assert y.tolist() == [0, 1, 0]
        np.testing.assert_allclose(shares[:, 0], [1, 0.5, 0.25])

    def test_a_hazard_without_end_is_no_number(self) -> None:
        share = np.repeat([0.1, 0.9], 10)
        time, event = np.concatenate([np.full(10, 9.0), np.linspace(1, 2, 10)]), np.repeat([0, 1], 10)
        table = outcome_table(shared(np.stack([share, 1 - share], 1)), cohort_of(np.stack([time, event], 1)))
        assert math.isnan(table.rows[0].effect)
        assert math.isnan(table.rows[0].p)

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
    @settings(max_examples=50, deadline=None)
    def test_corrected_p_are_never_smaller_and_keep_their_order(self, p: list[float]) -> None:
        q = corrected(p)
        assert (q >= np.array(p) - 1e-12).all()
        assert (np.diff(q[np.argsort(p)]) >= -1e-12).all()
        assert (q <= 1).all()

    def test_p_that_are_not_known_do_not_count(self) -> None:
        assert corrected([0.01, math.nan, 0.5]).tolist() == pytest.approx([0.02, math.nan, 0.5], nan_ok=True)

    def test_the_table_is_written_in_the_order_of_the_prototypes(self, tmp_path: Path) -> None:
        survey = shared([[1, 4], [2, 3], [4, 1], [3, 2]])
        outcome_table(survey, cohort_of(["x", "x", "y", "y"])).write(tmp_path / "o.csv")
        with (tmp_path / "o.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["prototype"] for row in rows] == ["1", "2"]
        assert float(rows[0]["mean share, y"]) == pytest.approx(0.7)

    def test_too_few_patients_are_refused(self) -> None:
        with pytest.raises(UsageError, match="too few"):
            outcome_table(shared([[1, 1], [1, 2]]), cohort_of(["x", "y"]))
