"""Tests of slide embeddings in a store."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import features.writing
from features.lease import Lease
from features.store import FeatureStore
from mil.prototypes import EMBEDDERS, Embeddings, Panther, Prototypes, SlideSet, embed_slides, fit_prototypes
from tests.mil.made_up import write_store
from wsi.errors import NotExtractedError, RunMismatchError, UsageError

DIM = 6


def tiles(n: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return (5 * np.eye(4, DIM)[rng.integers(0, 4, n)] + rng.normal(size=(n, DIM))).astype(np.float32)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    found: FeatureStore = write_store(
        tmp_path / "OUT", {f"x/{name}.svs": tiles(20 + i, i) for i, name in enumerate("abc")}
    )
    return found


@pytest.fixture
def prototypes(store: FeatureStore) -> Prototypes:
    return fit_prototypes(SlideSet.from_store(store.root, "made-up"), k=4)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_slide_gets_the_vector_that_the_method_makes_of_its_tiles(
    store: FeatureStore, prototypes: Prototypes
) -> None:
    report = embed_slides(store, prototypes)
    assert (report.done, report.skipped, report.left_out, report.failed) == (store.keys, (), (), ())
    for slide in store:
        found, expected = (
            slide.embedding("panther-made-up"),
            Panther().embed(slide.features("made-up").torch(), prototypes),
        )
        assert slide.embeddings == ("panther-made-up",)
        assert found.shapes == {"importance": (4,), "mean": (4, DIM), "variance": (4, DIM)}
        for part in found.shapes:
            assert np.array_equal(found.part(part), expected[part][0].numpy())
        assert np.array_equal(found.numpy(), expected.vector[0].numpy())
        assert found.facts["prototypes"] == prototypes.digest
        assert found.facts["hyper"] == {"em_iter": 1, "tau": 0.001, "eps": 0.1, "output": "allcat"}
        assert found.facts["features"]["encoder"] == ["made-up"]


@pytest.mark.parametrize("method", EMBEDDERS)
def test_every_method_can_be_kept(store: FeatureStore, prototypes: Prototypes, method: str) -> None:
    assert len(embed_slides(store, prototypes, method).done) == 3
    assert len(embed_slides(store, prototypes, method).skipped) == 3
    expected = EMBEDDERS[method]().embed(store.slide("b.svs").features("made-up").torch(), prototypes).vector[0]
    torch.testing.assert_close(torch.from_numpy(store.slide("b.svs").embedding(f"{method}-made-up").numpy()), expected)
    assert store.verify(deep=True) == []


def test_what_is_there_is_not_touched_again(store: FeatureStore, prototypes: Prototypes) -> None:
    embed_slides(store, prototypes)
    before = bytes_of(store.root / "slides")
    told: list[Any] = []
    report = embed_slides(store, prototypes, done=lambda *each: told.append(each))
    assert (report.done, report.skipped) == ((), store.keys)
    assert told == [(key, "there already") for key in store.keys]
    assert bytes_of(store.root / "slides") == before


def test_a_slide_that_has_come_is_embedded_and_the_others_are_left_alone(
    store: FeatureStore, prototypes: Prototypes
) -> None:
    embed_slides(store, prototypes)
    write_store(store.root, {"x/d.svs": tiles(9, 9)})
    report = embed_slides(store, prototypes)
    assert [store.slide(key).relpath for key in report.done] == ["x/d.svs"]
    assert len(report.skipped) == 3


def test_a_vector_made_otherwise_is_kept_until_it_shall_be_replaced(
    store: FeatureStore, prototypes: Prototypes
) -> None:
    embed_slides(store, prototypes)
    other = Panther(em_iter=2)
    report = embed_slides(store, prototypes, other)
    assert [failure.code for failure in report.failed] == ["ENCODER_CHANGED"] * 3
    assert "'em_iter': 1" in report.failed[0].message
    assert "--replace" in report.failed[0].message
    assert store.slide("a.svs").embedding("panther-made-up").facts["hyper"]["em_iter"] == 1
    assert len(embed_slides(store, prototypes, other, replace=True).done) == 3
    assert store.slide("a.svs").embedding("panther-made-up").facts["hyper"]["em_iter"] == 2
    assert len(list((store.root / ".replaced").iterdir())) == 3
    assert store.verify(deep=True) == []


def test_two_names_live_side_by_side(store: FeatureStore, prototypes: Prototypes) -> None:
    embed_slides(store, prototypes)
    embed_slides(store, prototypes, Panther(output="weight_avg_mean"), name="panther-average")
    assert store.slide("a.svs").embeddings == ("panther-average", "panther-made-up")
    assert store.slide("a.svs").embedding("panther-average").shapes == {"mean": (DIM,)}


def test_the_same_method_on_two_encoders_makes_two_embeddings_and_neither_is_taken_for_the_other(
    store: FeatureStore, prototypes: Prototypes
) -> None:
    embed_slides(store, prototypes)
    assert Embeddings.from_store(store).name == "panther-made-up"  # the only one
    write_store(
        store.root, {f"x/{name}.svs": tiles(20 + i, i)[:, :4] for i, name in enumerate("abc")}, encoder="timm:b"
    )
    report = embed_slides(store, fit_prototypes(SlideSet.from_store(store.root, "timm:b"), 4, restarts=1))
    assert (report.name, len(report.done)) == ("panther-timm:b", 3)
    assert store.slide("a.svs").embeddings == ("panther-made-up", "panther-timm:b")
    assert Embeddings.from_store(store, "panther-timm:b").shapes["mean"] == (4, 4)
    with pytest.raises(UsageError, match="holds embeddings panther-made-up, panther-timm:b; say which"):
        Embeddings.from_store(store)


def test_tiles_that_could_not_be_read_have_no_part(tmp_path: Path) -> None:
    x, status = tiles(30, 0), np.zeros(30, np.uint8)
    status[::2] = 1
    store = write_store(tmp_path, {"a.svs": x}, status=status)
    embed_slides(store, None, "mean")
    np.testing.assert_allclose(store.slide("a.svs").embedding("mean-made-up").numpy(), x[1::2].mean(0), rtol=1e-5)


def test_slides_without_tiles_or_features_are_left_out_and_said(store: FeatureStore, prototypes: Prototypes) -> None:
    write_store(store.root, {"x/empty.svs": tiles(0, 0)})
    write_store(store.root, {"x/other.svs": tiles(9, 0)}, encoder="other")
    report = embed_slides(store, prototypes)
    reasons = {store.slide(left.slide).relpath: left.reason for left in report.left_out}
    assert reasons == {"x/empty.svs": "no tiles", "x/other.svs": "no features of made-up"}
    assert len(report.done) == 3


def test_a_slide_of_other_weights_is_not_embedded(store: FeatureStore, prototypes: Prototypes) -> None:
    write_store(store.root, {"x/z.svs": tiles(9, 0)}, weights="b")
    report = embed_slides(store, prototypes)
    assert [(store.slide(failure.slide).relpath, failure.code) for failure in report.failed] == [
        ("x/z.svs", "ENCODER_CHANGED")
    ]


def test_prototypes_of_another_encoder_are_refused_before_anything_is_done(
    store: FeatureStore, prototypes: Prototypes
) -> None:
    foreign = Prototypes(prototypes.centres, prototypes.shares, {**prototypes.features, "mpp": 1.0}, {})
    with pytest.raises(RunMismatchError, match=r"mpp 0.5 here, 1.0 there"):
        embed_slides(store, foreign)
    assert not list(store.root.rglob("embeddings"))


def test_a_method_that_needs_prototypes_says_so(store: FeatureStore) -> None:
    with pytest.raises(UsageError, match="wsi prototypes fit"):
        embed_slides(store, None, "h2t")


def test_a_slide_at_work_elsewhere_is_said_and_the_others_are_done(store: FeatureStore, prototypes: Prototypes) -> None:
    with Lease(store.root / ".locks", store.keys[1]):
        report = embed_slides(store, prototypes)
    assert [(failure.slide, failure.code) for failure in report.failed] == [(store.keys[1], "BUSY")]
    assert report.done == (store.keys[0], store.keys[2])


@pytest.mark.parametrize("where", ["seal", "_publish"])
def test_a_kill_leaves_no_vector_or_a_whole_one_and_the_next_run_goes_on(
    store: FeatureStore, prototypes: Prototypes, where: str
) -> None:
    prototypes.save(store.root.parent / "p.zarr")
    code = f"""
import os, sys
import features.writing as writing
from mil.prototypes import Prototypes, embed_slides
calls, real = [], writing.{where}
def deadly(*args):
    calls.append(1)
    if len(calls) == 2:
        os._exit(9)
    return real(*args)
writing.{where} = deadly
embed_slides(sys.argv[1], Prototypes.load(sys.argv[2]))
"""
    command = [sys.executable, "-c", code, str(store.root), str(store.root.parent / "p.zarr")]
    killed = subprocess.run(command, cwd=Path(__file__).parents[3], check=False, timeout=60)
    assert killed.returncode == 9
    assert store.verify(deep=True) == []
    report = embed_slides(store, prototypes)
    assert len(report.done) + len(report.skipped) == 3
    assert len(Embeddings.from_store(store).slides) == 3
    assert store.verify(deep=True) == []


def test_another_process_that_was_faster_keeps_its_vector(
    store: FeatureStore, prototypes: Prototypes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = features.writing._publish
    made: list[Path] = []

    def late(folder: Path, final: Path) -> None:
        if not made:
            made.append(folder)
            facts = {"method": "theirs"}
            features.writing.write_embedding(
                store, store.slide("a.svs"), "panther-made-up", facts, {"mean": np.ones(2, np.float32)}
            )
        real(folder, final)

    monkeypatch.setattr(features.writing, "_publish", late)
    embed_slides(store, prototypes)
    assert store.slide("a.svs").embedding("panther-made-up").facts == {"method": "theirs"}
    assert not list((store.root / ".staging").iterdir())


def test_verify_finds_damage_to_a_vector(store: FeatureStore, prototypes: Prototypes) -> None:
    embed_slides(store, prototypes)
    folder = store.slide("a.svs").embedding_path("panther-made-up")
    chunk = next(path for path in (folder / "mean" / "c").rglob("*") if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    (problem,) = store.verify(deep=True)
    assert problem.part == "embeddings/panther-made-up"
    chunk.unlink()
    assert [problem.what.split()[-1] for problem in store.verify()] == ["missing"]


def test_a_matrix_of_all_slides_has_a_row_a_slide(store: FeatureStore, prototypes: Prototypes) -> None:
    embed_slides(store, prototypes)
    found = Embeddings.from_store(store.root)
    assert found.slides == store.keys
    assert np.array_equal(found.matrix[1], store.slide("b.svs").embedding("panther-made-up").numpy())
    assert np.array_equal(found.part("mean")[2], store.slide("c.svs").embedding("panther-made-up").part("mean"))
    np.testing.assert_allclose(found.part("importance").sum(1), 1, rtol=1e-6)
    assert Embeddings.from_store(store, slides=["c.svs", "x/a.svs"]).slides == (store.keys[0], store.keys[2])
    with pytest.raises(UsageError, match="it has importance, mean, variance"):
        found.part("median")


def test_vectors_that_were_made_differently_are_not_mixed(store: FeatureStore, prototypes: Prototypes) -> None:
    embed_slides(store, prototypes)
    write_store(store.root, {"x/d.svs": tiles(9, 9)})
    embed_slides(store, prototypes, Panther(tau=1))
    with pytest.raises(RunMismatchError, match="made differently"):
        Embeddings.from_store(store)


def test_vectors_that_are_not_there_are_said_with_those_that_are(store: FeatureStore, prototypes: Prototypes) -> None:
    with pytest.raises(NotExtractedError, match="holds no embeddings yet"):
        Embeddings.from_store(store)
    with pytest.raises(NotExtractedError, match="there are: none yet"):
        Embeddings.from_store(store, "h2t")
    embed_slides(store, prototypes)
    with pytest.raises(NotExtractedError, match=r"no slide has an embedding 'h2t' \(there are: panther"):
        Embeddings.from_store(store, "h2t")
    with pytest.raises(NotExtractedError, match="no embedding 'h2t'"):
        store.slide("a.svs").embedding("h2t")
