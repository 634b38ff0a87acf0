"""Tests of drawing tiles, fitting prototypes, and keeping them on disk."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

import mil.prototypes.kmeans
from features.store import FeatureStore
from mil.bag import Bag
from mil.cohort import Cohort
from mil.prototypes import Prototypes, SlideSet, TilePool, draw_tiles, fit_prototypes, report_k
from mil.prototypes.kmeans import kmeans, kmeans_torch, lloyd, nearest
from mil.sources import ArraySource
from tests.mil.made_up import write_store
from wsi.errors import (
    CohortError,
    NotExtractedError,
    RunMismatchError,
    StoreCorruptError,
    StoreFormatError,
    UsageError,
)

DIM = 6


def kinds(n: int, k: int = 4, seed: int = 0, spread: float = 0.5) -> Any:
    """(n, DIM) float32 around k well separated places, and which place each row belongs to."""
    rng = np.random.default_rng(seed)
    places = 6 * np.eye(k, DIM)
    kind = rng.integers(0, k, n)
    return (places[kind] + rng.normal(0, spread, (n, DIM))).astype(np.float32), kind


def slide_set(sizes: dict[str, int], sites: dict[str, str] | None = None) -> SlideSet:
    bags = {name: Bag(kinds(n, seed=index)[0], None, name) for index, (name, n) in enumerate(sizes.items())}
    return SlideSet(ArraySource(bags), tuple(sizes), None if sites is None else tuple(sites[name] for name in sizes))


def pool_of(x: Any, n_slides: int = 4) -> TilePool:
    return TilePool(x, np.arange(len(x)) % n_slides, tuple(f"s{i}" for i in range(n_slides)), {}, {})


class TestDrawing:
    def test_no_slide_gives_more_than_its_share_and_a_small_one_all_it_has(self) -> None:
        pool = draw_tiles(slide_set({"a": 100, "b": 7, "c": 50}), 60)
        assert np.bincount(pool.slide).tolist() == [20, 7, 20]
        assert pool.slides == ("a", "b", "c")
        assert len(pool) == 47 == pool.provenance["n_tiles"]

    def test_sites_share_equally_and_slides_of_a_site_share_its_part(self) -> None:
        sites = {"a": "X", "b": "X", "c": "X", "d": "Y"}
        pool = draw_tiles(slide_set(dict.fromkeys("abcd", 100), sites), 60, balance="sites")
        assert np.bincount(pool.slide).tolist() == [10, 10, 10, 30]

    def test_sites_that_are_not_known_cannot_be_balanced(self) -> None:
        with pytest.raises(UsageError, match="column of sites"):
            draw_tiles(slide_set({"a": 5}), 60, balance="sites")

    @given(order=st.permutations("abcde"), seed=st.integers(0, 5))
    @settings(max_examples=20)
    def test_the_order_of_slides_changes_nothing(self, order: list[str], seed: int) -> None:
        slides = slide_set(dict.fromkeys("abcde", 40))
        again = SlideSet(slides.source, tuple(order))
        assert np.array_equal(draw_tiles(slides, 50, seed=seed).x, draw_tiles(again, 50, seed=seed).x)

    def test_what_a_slide_gives_does_not_depend_on_the_other_slides(self) -> None:
        slides = slide_set(dict.fromkeys("abcde", 40))
        alone = draw_tiles(SlideSet(slides.source, ("c",)), 10)
        among = draw_tiles(slides, 50)
        assert np.array_equal(alone.x, among.x[among.slide == 2])

    def test_other_seeds_draw_other_tiles_and_slides_draw_unlike_each_other(self) -> None:
        x = kinds(40)[0]
        twins = SlideSet(ArraySource({name: Bag(x, None, name) for name in "ab"}), ("a", "b"))
        pool = draw_tiles(twins, 20)
        assert not np.array_equal(pool.x[:10], pool.x[10:])
        assert not np.array_equal(draw_tiles(twins, 20, seed=1).x, pool.x)

    def test_every_tile_is_as_likely_as_any_other(self) -> None:
        x = np.arange(20, dtype=np.float32)[:, None]
        slides = SlideSet(ArraySource({"a": Bag(x, None, "a")}), ("a",))
        drawn = np.concatenate([draw_tiles(slides, 5, seed=seed).x[:, 0] for seed in range(800)])
        counts = np.bincount(drawn.astype(int), minlength=20)
        assert counts.sum() == 4000
        assert abs(counts - 200).max() < 5 * np.sqrt(200)

    def test_tiles_that_could_not_be_read_are_never_drawn(self, tmp_path: Path) -> None:
        x = kinds(30)[0]
        status = np.zeros(30, np.uint8)
        status[::3] = 1
        write_store(tmp_path, {"a.svs": x}, status=status)
        pool = draw_tiles(SlideSet.from_store(tmp_path, "made-up"), 100)
        assert np.array_equal(pool.x, x[status == 0])

    def test_a_store_is_read_as_its_bags_are(self, tmp_path: Path) -> None:
        write_store(tmp_path, {f"x/{name}.svs": kinds(30, seed=i)[0] for i, name in enumerate("abc")})
        slides = SlideSet.from_store(tmp_path, "made-up")
        bags = {key: slides.source.read(key) for key in slides.slides}
        in_memory = SlideSet(ArraySource(bags), slides.slides)
        assert np.array_equal(draw_tiles(slides, 30, seed=4).x, draw_tiles(in_memory, 30, seed=4).x)


class TestSlideSet:
    def test_a_table_says_which_slides_and_where_they_come_from(self, tmp_path: Path) -> None:
        store = write_store(tmp_path / "OUT", {f"x/{name}.svs": kinds(9)[0] for name in "abc"})
        table = tmp_path / "train.csv"
        table.write_text("slide,site\na.svs,X\nx/c.svs,Y\nnone.svs,Y\n")
        slides = SlideSet.from_store(store.root, "made-up", table)
        assert [store.slide(key).relpath for key in slides.slides] == ["x/a.svs", "x/c.svs"]
        assert slides.sites == ("X", "Y")
        assert [tuple(left) for left in slides.left_out] == [("none.svs", "not in the store")]

    def test_slides_without_tiles_or_features_are_left_out_and_said(self, tmp_path: Path) -> None:
        write_store(tmp_path, {"a.svs": kinds(9)[0], "b.svs": kinds(0)[0]})
        write_store(tmp_path, {"c.svs": kinds(9)[0]}, encoder="other")
        slides = SlideSet.from_store(tmp_path, "made-up")
        assert len(slides.slides) == 1
        assert sorted(left.reason for left in slides.left_out) == ["no features of made-up", "no tiles"]

    def test_no_slide_at_all_is_an_error_that_says_why(self, tmp_path: Path) -> None:
        write_store(tmp_path / "OUT", {"a.svs": kinds(9)[0]})
        message = r"no slide has features of uni \(there are: made-up\); run wsi extract with --encoder uni"
        with pytest.raises(NotExtractedError, match=message):
            SlideSet.from_store(tmp_path / "OUT", "uni")
        (tmp_path / "t.csv").write_text("slide\nb.svs\n")
        with pytest.raises(UsageError, match=r"no slide with tiles; 1 left out \(not in the store\)"):
            SlideSet.from_store(tmp_path / "OUT", "made-up", tmp_path / "t.csv")

    def test_a_table_without_slides_is_refused(self, tmp_path: Path) -> None:
        write_store(tmp_path / "OUT", {"a.svs": kinds(9)[0]})
        (tmp_path / "t.csv").write_text("name\na.svs\n")
        with pytest.raises(CohortError, match="no column of slides"):
            SlideSet.from_store(tmp_path / "OUT", "made-up", tmp_path / "t.csv")


class TestFitting:
    def test_prototypes_find_the_kinds_of_tiles_the_most_common_first(self) -> None:
        x, kind = kinds(900)
        x, kind = x[(kind != 2) | (np.arange(900) % 3 == 0)], kind[(kind != 2) | (np.arange(900) % 3 == 0)]
        found = fit_prototypes(pool_of(x), k=4)
        labels = nearest(x, found.centres)
        assert all(len(set(kind[labels == index])) == 1 for index in range(4))
        assert (np.diff(found.shares) <= 0).all()
        assert set(kind[labels == 3]) == {2}
        np.testing.assert_allclose(found.shares, np.bincount(labels) / len(x))
        np.testing.assert_allclose(found.centres, [x[labels == index].mean(0) for index in range(4)], atol=1e-4)

    def test_a_cohort_is_as_good_as_a_slide_set(self) -> None:
        bags = [Bag(kinds(30, seed=i)[0], None, f"s{i}") for i in range(4)]
        cohort = Cohort.from_arrays(bags, [0, 1, 0, 1])
        slides = SlideSet(cohort.source, cohort.slides)
        assert fit_prototypes(cohort, k=3).digest == fit_prototypes(slides, k=3).digest

    def test_one_seed_gives_the_same_bits_with_one_thread_and_with_two(self) -> None:
        x = np.random.default_rng(0).normal(size=(6000, 24)).astype(np.float32)
        found = []
        for threads in (1, 2, 4):
            with threadpool_limits(threads):
                found.append(kmeans(x, 9, seed=3, restarts=2).centres.tobytes())
        assert len(set(found)) == 1

    def test_one_seed_gives_the_same_prototypes_and_another_others(self) -> None:
        pool = pool_of(np.random.default_rng(0).normal(size=(500, DIM)).astype(np.float32))
        assert fit_prototypes(pool, k=7, seed=1).digest == fit_prototypes(pool, k=7, seed=1).digest
        assert (
            fit_prototypes(pool, k=7, seed=2, restarts=1).digest != fit_prototypes(pool, k=7, seed=1, restarts=1).digest
        )

    def test_large_pools_go_in_mini_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mil.prototypes.kmeans, "MINIBATCH_TILES", 500)
        x, kind = kinds(2000)
        found = kmeans(x, 4, seed=0, restarts=3)
        assert found.method == "sklearn mini-batch"
        labels = nearest(x, found.centres)
        assert all(len(set(kind[labels == index])) == 1 for index in range(4))

    def test_lloyd_on_tensors_comes_to_what_scikit_learn_does_from_the_same_start(self) -> None:
        from sklearn.cluster import KMeans

        x = np.random.default_rng(5).normal(size=(800, DIM)).astype(np.float32)
        start = x[:9].copy()
        expected = KMeans(9, init=start, n_init=1, max_iter=100, tol=1e-4, algorithm="lloyd").fit(x)
        centres, inertia = lloyd(torch.from_numpy(x), torch.from_numpy(start))
        np.testing.assert_allclose(centres.numpy(), expected.cluster_centers_, atol=1e-4)
        assert inertia == pytest.approx(expected.inertia_ / len(x), rel=1e-5)

    def test_tensors_are_clustered_as_well_as_by_scikit_learn(self) -> None:
        x, kind = kinds(600)
        ours, theirs = kmeans_torch(torch.from_numpy(x), 4, seed=0, restarts=4), kmeans(x, 4, seed=0, restarts=4)
        assert ours.counts.tolist() == theirs.counts.tolist() == sorted(np.bincount(kind).tolist(), reverse=True)
        np.testing.assert_allclose(ours.centres, theirs.centres, atol=1e-4)

    def test_a_centre_that_loses_all_tiles_finds_others(self) -> None:
        x = kinds(200)[0]
        start = np.concatenate([x[:3], np.full((1, DIM), 1e3, np.float32)])
        centres, _ = lloyd(torch.from_numpy(x), torch.from_numpy(start))
        assert len(np.unique(nearest(x, centres.numpy()))) == 4

    @pytest.mark.parametrize("x", [np.zeros((3, DIM)), np.zeros((50, DIM)), np.arange(3 * DIM).reshape(3, DIM)])
    def test_too_few_different_tiles_are_refused(self, x: Any) -> None:
        with pytest.raises(UsageError, match="too few, or too alike, for 4"):
            fit_prototypes(pool_of(x.astype(np.float32)), k=4)

    def test_the_report_prefers_the_true_number_of_kinds(self) -> None:
        report = report_k(pool_of(kinds(600)[0], 6), (2, 4, 8), repeats=3)
        two, four, eight = report.rows
        assert four.silhouette > max(two.silhouette, eight.silhouette)
        assert four.halves == pytest.approx(1)
        assert four.seeds == pytest.approx(1)
        assert eight.halves < 0.95
        assert two.inertia > four.inertia > eight.inertia
        assert "600 tiles of 6 slides, 3 draws" in str(report)

    def test_halves_are_of_slides_not_of_tiles(self) -> None:
        """Every slide has a kind of its own: what halves of the slides teach is of no use to the others."""
        rng = np.random.default_rng(0)
        slide = np.repeat(np.arange(8), 50)
        x = (20 * np.eye(8)[slide] + rng.normal(size=(400, 8))).astype(np.float32)
        (row,) = report_k(TilePool(x, slide, tuple("abcdefgh"), {}, {}), (4,), repeats=4, restarts=10).rows
        assert row.halves < 0.7

    def test_a_single_slide_has_no_halves(self) -> None:
        with pytest.raises(UsageError, match="two slides"):
            report_k(pool_of(kinds(50)[0], 1))


class TestOnDisk:
    def made(self, **features: Any) -> Prototypes:
        centres = np.random.default_rng(0).normal(size=(3, DIM)).astype(np.float32)
        facts = {"encoder": ["made-up"], "weights_sha256": ["a"], "dim": [DIM], "mpp": 0.5, "tile_px": 256} | features
        return Prototypes(centres, np.array([0.5, 0.3, 0.2]), facts, {"seed": 0, "k": 3})

    def test_what_is_loaded_is_what_was_saved(self, tmp_path: Path) -> None:
        made = self.made()
        made.save(tmp_path / "deep" / "p.zarr")
        found = Prototypes.load(tmp_path / "deep" / "p.zarr")
        assert np.array_equal(found.centres, made.centres)
        assert np.array_equal(found.shares, made.shares)
        assert (found.features, found.provenance, found.digest) == (made.features, made.provenance, made.digest)
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["p.zarr"]

    def test_any_zarr_reader_can_read_them(self, tmp_path: Path) -> None:
        import zarr

        self.made().save(tmp_path / "p.zarr")
        group = zarr.open_group(tmp_path / "p.zarr", mode="r")
        np.testing.assert_array_equal(np.asarray(group["centres"]), self.made().centres)
        assert dict(group.attrs)["wsi"]["kind"] == "prototypes"  # type: ignore[index, call-overload]

    def test_nothing_is_overwritten(self, tmp_path: Path) -> None:
        self.made().save(tmp_path / "p.zarr")
        with pytest.raises(UsageError, match="is there already"):
            self.made().save(tmp_path / "p.zarr")

    def test_a_kill_before_the_last_step_leaves_nothing_under_the_name(self, tmp_path: Path) -> None:
        code = (
            "import os, sys\nimport wsi._files as module\n"
            "from tests.mil.prototypes.test_fitting import TestOnDisk\n"
            "module.fsync_tree = lambda path: os._exit(9)\nTestOnDisk().made().save(sys.argv[1])"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "p.zarr")]
        killed = subprocess.run(command, cwd=Path(__file__).parents[3], check=False, timeout=60)
        assert killed.returncode == 9
        assert not (tmp_path / "p.zarr").exists()
        self.made().save(tmp_path / "p.zarr")
        assert Prototypes.load(tmp_path / "p.zarr").digest == self.made().digest

    def test_damage_is_noticed(self, tmp_path: Path) -> None:
        self.made().save(tmp_path / "p.zarr")
        (chunk,) = (path for path in (tmp_path / "p.zarr" / "centres" / "c").rglob("*") if path.is_file())
        data = bytearray(chunk.read_bytes())
        data[len(data) // 3] ^= 1
        chunk.write_bytes(data)
        with pytest.raises(StoreCorruptError, match=r"p\.zarr: centres are damaged; fit the prototypes again"):
            Prototypes.load(tmp_path / "p.zarr")

    def test_what_is_not_prototypes_is_refused_in_a_line(self, tmp_path: Path) -> None:
        with pytest.raises(NotExtractedError, match="wsi prototypes fit"):
            Prototypes.load(tmp_path / "p.zarr")
        store = write_store(tmp_path / "OUT", {"a.svs": kinds(9)[0]})
        with pytest.raises(StoreFormatError, match="holds slide of version 1"):
            Prototypes.load(store.path_of(store.keys[0]))
        with pytest.raises(StoreCorruptError, match="not prototypes"):
            Prototypes.load(tmp_path)

    def test_another_encoder_is_one_clear_error(self) -> None:
        with pytest.raises(RunMismatchError, match=r"OUT: other features .*encoder \['b'\] here, \['made-up'\] there"):
            self.made().check({"encoder": ["b"], "mpp": 0.5}, where="OUT")
        self.made().check({"encoder": ["made-up"], "mpp": 0.5}, where="OUT")

    def test_the_digest_is_of_the_numbers_alone(self) -> None:
        assert self.made().digest == self.made(mpp=1.0).digest
        other = Prototypes(self.made().centres + np.float32(1e-6), self.made().shares, {}, {})
        assert other.digest != self.made().digest

    def test_prototypes_cannot_be_changed(self) -> None:
        with pytest.raises(ValueError, match="read-only"):
            self.made().centres[0, 0] = 1

    def test_prototypes_that_make_no_sense_are_refused(self) -> None:
        with pytest.raises(UsageError, match="finite vectors"):
            Prototypes(np.full((2, 3), np.nan, np.float32), np.array([0.5, 0.5]), {}, {})
        with pytest.raises(UsageError, match="sum to one"):
            Prototypes(np.zeros((2, 3), np.float32), np.array([0.5, 0.6]), {}, {})

    def test_provenance_says_how_they_were_fitted(self, tmp_path: Path) -> None:
        write_store(tmp_path, {f"{name}.svs": kinds(30, seed=i)[0] for i, name in enumerate("abc")}, revision="4f1")
        found = fit_prototypes(SlideSet.from_store(tmp_path, "made-up"), k=4, seed=7, n_tiles=60)
        expected = {"k": 4, "seed": 7, "n_slides": 3, "n_tiles": 60, "balance": "slides", "method": "sklearn lloyd"}
        assert expected.items() <= found.provenance.items()
        assert found.provenance["revision"] == ["4f1"]
        assert found.features["weights_sha256"] == ["a"]
        assert found.features["mpp"] == FeatureStore(tmp_path).tiling.mpp
