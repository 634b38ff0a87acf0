"""Tests of looking for slides: what alike means, who is found, how a search is judged, and what an index misses."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mil import search as module
from mil.prototypes import Embeddings, embed_slides
from mil.search import Hit, Metric, SlideSearch, evaluate_search
from mil.slide_sheet import draw_hits
from tests.mil.made_up import write_store
from wsi.errors import EnvironmentFaultError, NotExtractedError, UsageError


def plain(matrix: Any) -> Embeddings:
    x = np.asarray(matrix, np.float32)
    return Embeddings("made-up", tuple(f"s{i}" for i in range(len(x))), x, {"mean": x.shape[1:]}, {})


def mixtures(importance: Any, mean: Any) -> Embeddings:
    """PANTHER vectors of S slides: π (S, K), μ (S, K, D), Σ all ones."""
    pi, mu = np.asarray(importance, np.float32), np.asarray(mean, np.float32)
    parts = {"importance": pi, "mean": mu, "variance": np.ones_like(mu)}
    matrix = np.concatenate([part.reshape(len(pi), -1) for part in parts.values()], axis=1)
    names = tuple(f"s{i}" for i in range(len(pi)))
    return Embeddings("panther", names, matrix, {name: part.shape[1:] for name, part in parts.items()}, {})


def made_up(n: int, k: int = 4, d: int = 8, seed: int = 0) -> Embeddings:
    rng = np.random.default_rng(seed)
    return mixtures(rng.dirichlet(np.ones(k), n), rng.normal(size=(n, k, d)) + 5)


class TestMetrics:
    def test_cosine_is_that_of_the_vectors_and_the_slide_itself_is_not_found(self) -> None:
        search = SlideSearch.of(plain([[1, 0], [3, 4], [0, -2], [5, 0.1]]))
        assert [hit.slide for hit in search.nearest("s0", 9)] == ["s3", "s1", "s2"]
        assert [hit.similarity for hit in search.nearest("s0")] == pytest.approx([0.9998, 0.6, 0], abs=1e-4)

    def test_what_all_slides_share_is_taken_away_where_it_is_centred(self) -> None:
        vectors = np.array([[100, 1, 0], [100, 0.9, 0], [130, -1, 0], [70, -0.9, 0]])
        assert min(hit.similarity for hit in SlideSearch.of(plain(vectors)).nearest("s0", 3)) > 0.99
        centred = SlideSearch.of(plain(vectors), "centred").nearest("s0", 3)
        assert centred[0].slide == "s1"
        assert centred[-1].similarity < 0

    def test_prototypes_are_weighed_by_what_both_slides_have_of_them(self) -> None:
        importance = [[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.5, 0.5]]
        mean = [[[2, 0], [0, 3]], [[2, 0], [0, -3]], [[2, 0], [0, 3]], [[-3, 1], [1, 0]]]
        embeddings = mixtures(importance, mean)
        pi, mu = np.array(importance), np.array(mean, float)
        centre = (pi[..., None] * mu).sum((0, 1)) / pi.sum()
        u = mu - centre
        u /= np.linalg.norm(u, axis=2, keepdims=True)
        expected = np.einsum("sk,tk,skd,tkd->st", np.sqrt(pi), np.sqrt(pi), u, u)
        found = SlideSearch.of(embeddings, "prototypes")
        np.testing.assert_allclose(found.points @ found.points.T, expected, atol=1e-6)
        assert found.nearest("s0")[0].slide == "s1"  # alike in the tissue that both are made of, opposite in the rest

    @given(st.integers(0, 100), st.sampled_from(["cosine", "centred", "prototypes"]))
    @settings(max_examples=30, deadline=None)
    def test_being_alike_is_mutual_and_no_slide_is_more_alike_than_itself(self, seed: int, metric: Metric) -> None:
        search = SlideSearch.of(made_up(12, seed=seed), metric)
        similarity = search.points @ search.points.T
        np.testing.assert_allclose(similarity, similarity.T)
        np.testing.assert_allclose(np.diag(similarity), 1, rtol=1e-4)
        assert np.abs(similarity).max() <= 1 + 1e-5

    def test_an_embedding_without_the_parts_is_refused(self) -> None:
        with pytest.raises(UsageError, match="needs importance and mean"):
            SlideSearch.of(plain([[1, 2], [2, 1]]), "prototypes")
        with pytest.raises(UsageError, match="single slide"):
            SlideSearch.of(plain([[1, 2]]), "centred")
        with pytest.raises(UsageError, match="none of cosine"):
            SlideSearch.of(plain([[1, 2]]), "euclid")  # type: ignore[arg-type]


class TestNearest:
    def test_slides_left_out_are_replaced_by_the_next(self) -> None:
        search = SlideSearch.of(made_up(9))
        first, second, third = search.nearest("s4", 3)
        assert search.nearest("s4", 2, without={first.slide}) == (second, third)

    def test_equally_alike_slides_come_in_the_order_of_their_keys(self) -> None:
        search = SlideSearch.of(plain([[1, 0], [0, 1], [0, 1], [0, 2]]))
        assert [hit.slide for hit in search.nearest("s0")] == ["s1", "s2", "s3"]

    def test_a_slide_that_is_not_there_and_a_top_of_nothing_are_refused(self) -> None:
        search = SlideSearch.of(made_up(3))
        with pytest.raises(NotExtractedError, match="no slide 'slide-7' among the 3"):
            search.nearest("slide-7")
        with pytest.raises(UsageError, match="top"):
            search.nearest("s0", 0)


class TestEvaluation:
    def test_precision_and_average_precision_are_those_of_the_ranking(self) -> None:
        angles = np.radians([0, 10, 21, 30, 40])
        search = SlideSearch.of(plain(np.stack([np.cos(angles), np.sin(angles)], 1)))
        labels = dict(zip(search.slides, "xyxxx", strict=True))
        patients = dict(zip(search.slides, "abcde", strict=True))
        report = evaluate_search(search, labels, patients, ks=(1, 2))
        # Of other patients, nearest first: s0 finds y x x x, s2 finds x y x x, s3 and s4 find x x y x. Nobody shares y.
        ap = [(1 / 2 + 2 / 3 + 3 / 4) / 3, (1 + 2 / 3 + 3 / 4) / 3, *[(1 + 1 + 3 / 4) / 3] * 2]
        first = [[0.0, 0.5], [1.0, 0.5], [1.0, 1.0], [1.0, 1.0]]
        assert report.metrics["mAP"].value == pytest.approx(np.mean(ap))
        assert [report.metrics[f"precision@{k}"].value for k in (1, 2)] == pytest.approx(np.mean(first, axis=0))
        assert (report.n_queries, report.n_patients, report.n_alone) == (4, 4, 1)
        assert report.chance == pytest.approx(0.75)

    def test_slides_of_the_same_patient_are_never_found(self) -> None:
        """Each patient's two slides are the same point, and every other slide of the class lies opposite."""
        points = [[1, 0], [1, 0], [-1, 0.1], [-1, 0.1], [0, 1], [0, 1], [0.1, -1], [0.1, -1]]
        search = SlideSearch.of(plain(points))
        labels = dict(zip(search.slides, "xxxxyyyy", strict=True))
        by_patient = dict(zip(search.slides, "aabbccdd", strict=True))
        assert evaluate_search(search, labels, by_patient, ks=(1,)).metrics["precision@1"].value == 0
        alone = {slide: slide for slide in search.slides}
        assert evaluate_search(search, labels, alone, ks=(1,)).metrics["precision@1"].value == 1

    def test_the_interval_is_over_patients(self) -> None:
        """Twenty slides of one patient that are right and one of another that is not: two draws, not twenty-one."""
        (interval,) = module._over_patients(np.array([[1.0]] * 20 + [[0.0]]), ["p"] * 20 + ["q"], 500, 0)
        assert interval == pytest.approx((20 / 21, 0, 1))

    def test_slides_without_a_label_neither_ask_nor_are_found(self) -> None:
        search = SlideSearch.of(plain([[1, 0], [1, 0.01], [0.8, 0.5], [0, 1]]))
        labels = {"s0": "x", "s2": "x", "s3": "y"}
        report = evaluate_search(search, labels, {slide: slide for slide in search.slides}, ks=(1,))
        assert (report.n_queries, report.n_alone) == (2, 1)
        assert report.metrics["precision@1"].value == 1

    def test_nothing_to_find_is_said(self) -> None:
        search = SlideSearch.of(made_up(3))
        alone = {slide: slide for slide in search.slides}
        with pytest.raises(UsageError, match="no class is shared"):
            evaluate_search(search, alone, alone)
        with pytest.raises(UsageError, match="fewer than k = 3"):
            evaluate_search(search, dict.fromkeys(search.slides, "x"), alone, ks=(3,))


class TestIndex:
    def test_an_index_finds_nearly_all_that_an_exact_search_finds(self) -> None:
        pytest.importorskip("faiss")
        embeddings = made_up(2000)
        exact = SlideSearch.of(embeddings, "prototypes", index="exact")
        quick = SlideSearch.of(embeddings, "prototypes", index="hnsw")
        found = 0
        for slide in exact.slides[::40]:
            right = exact.nearest(slide, 10)
            hits = quick.nearest(slide, 10)
            assert len(hits) == 10
            assert slide not in {hit.slide for hit in hits}
            of = {hit.slide: hit.similarity for hit in right}
            for hit in hits:
                if hit.slide in of:
                    assert hit.similarity == pytest.approx(of[hit.slide], abs=1e-5)
            found += len(of.keys() & {hit.slide for hit in hits})
        assert found / 500 >= 0.95
        hidden = {hit.slide for hit in right[:3]}
        assert not hidden & {hit.slide for hit in quick.nearest(slide, 10, without=hidden)}

    def test_few_slides_are_compared_one_by_one(self) -> None:
        assert SlideSearch.of(made_up(5)).index == "exact"

    def test_many_are_looked_up_where_it_can_be(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("faiss")
        monkeypatch.setattr(module, "INDEX_SLIDES", 20)
        assert SlideSearch.of(made_up(21)).index == "hnsw"
        assert SlideSearch.of(made_up(20)).index == "exact"

    def test_without_faiss_it_is_said_what_to_install_and_auto_stays_exact(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = builtins.__import__

        def lacking(name: str, *rest: Any, **more: Any) -> Any:
            if name == "faiss":
                raise ImportError(name)
            return real(name, *rest, **more)

        monkeypatch.setattr(builtins, "__import__", lacking)
        with pytest.raises(EnvironmentFaultError, match=r"pip install 'wsi-engine\[search\]'"):
            SlideSearch.of(made_up(5), index="hnsw")
        monkeypatch.setattr(module, "INDEX_SLIDES", 3)
        assert SlideSearch.of(made_up(5)).index == "exact"


def test_a_sheet_shows_what_was_found_and_names_what_is_gone(tmp_path: Path) -> None:
    Image.fromarray(np.full((160, 200, 3), (200, 40, 90), np.uint8)).save(tmp_path / "a.png")
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    store = write_store(tmp_path / "OUT", {str(tmp_path / "a.png"): x, str(tmp_path / "b.png"): x + 1})
    embed_slides(store, None, "mean")
    search = SlideSearch.of(Embeddings.from_store(store, "mean-made-up"))
    key = search.key_of("a.png")
    hits = search.nearest(key)
    gone = draw_hits(store, key, hits, tmp_path / "sheet.png")
    assert gone == (search.key_of("b.png"),)
    with Image.open(tmp_path / "sheet.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or ()}
    assert (200, 40, 90) in colours
    assert hits == (Hit(gone[0], hits[0].similarity),)
