"""Tests of prototypes whose features count alike: what is divided, where it is kept, and who takes heed of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mil.prototypes import (
    EMBEDDERS,
    Embeddings,
    Panther,
    Prototypes,
    SlideSet,
    TilePool,
    embed_slides,
    fit_prototypes,
    report_k,
    survey_slides,
)
from mil.prototypes.kmeans import scale_of
from mil.prototypes.survey import assigned_tiles
from tests.mil.made_up import write_store
from wsi.errors import StoreCorruptError, UsageError

DIM = 5


def loud(n: int = 400, seed: int = 0) -> Any:
    """(n, DIM) tiles of two kinds that the first feature tells apart, beneath noise a thousand times as loud; and the kinds."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 2, n)
    x = rng.normal(size=(n, DIM)).astype(np.float32)
    x[:, 0] = 0.01 * (8 * kind + rng.normal(0, 0.5, n))
    x[:, 1:3] = 0.01 * (6 * kind[:, None] + rng.normal(0, 0.5, (n, 2)))
    x[:, 3] *= 10
    return x, kind


def pool_of(x: Any) -> TilePool:
    return TilePool(x, np.arange(len(x)) % 4, ("a", "b", "c", "d"), {}, {})


def agreement(kind: Any, found: Any) -> float:
    same = float((kind == found).mean())
    return max(same, 1 - same)


def test_a_quiet_feature_is_heard_where_all_count_alike_and_only_there() -> None:
    x, kind = loud()
    right = {}
    for scale in ("none", "standard"):
        fitted = fit_prototypes(pool_of(x), 2, scale=scale)
        memberships = EMBEDDERS["protocounts"]().assign(torch.from_numpy(x), fitted)
        right[scale] = agreement(kind, memberships[0].argmax(1).numpy())
        assert fitted.provenance["scale"] == scale
    assert right["none"] < 0.7
    assert right["standard"] > 0.99


def test_centres_stay_in_the_units_of_the_features() -> None:
    x, kind = loud()
    fitted = fit_prototypes(pool_of(x), 2, scale="standard")
    means = np.stack([x[kind == k].mean(0) for k in (0, 1)])
    order = fitted.centres[:, 0].argsort()
    np.testing.assert_allclose(fitted.centres[order][:, :3], means[:, :3], atol=2e-3)
    assert fitted.scale is not None
    np.testing.assert_allclose(fitted.scale, x.std(0, dtype=np.float64), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, method in EMBEDDERS.items() if method.needs_prototypes])
def test_every_method_measures_as_if_tiles_and_centres_had_been_divided_before(name: str) -> None:
    x, _ = loud(60)
    fitted = fit_prototypes(pool_of(x), 3, scale="standard")
    assert fitted.scale is not None
    assert fitted.scale_tensor is not None
    divided = Prototypes(fitted.centres / fitted.scale, fitted.shares, {}, {})
    method = EMBEDDERS[name]()
    tiles = torch.from_numpy(x)
    torch.testing.assert_close(
        method.embed(tiles, fitted).vector, method.embed(tiles / fitted.scale_tensor, divided).vector
    )
    torch.testing.assert_close(method.assign(tiles, fitted), method.assign(tiles / fitted.scale_tensor, divided))


def test_methods_without_prototypes_take_features_as_they_are() -> None:
    x, _ = loud(30)
    fitted = fit_prototypes(pool_of(x), 2, scale="standard")
    found = EMBEDDERS["mean"]().embed(torch.from_numpy(x), fitted).vector[0]
    torch.testing.assert_close(found, torch.from_numpy(x).mean(0), rtol=1e-4, atol=1e-5)


def test_what_a_store_is_given_is_what_the_method_says(tmp_path: Path) -> None:
    slides = {f"{name}.svs": loud(40, seed)[0] for seed, name in enumerate("ab")}
    store = write_store(tmp_path / "OUT", slides)
    fitted = fit_prototypes(pool_of(np.concatenate(list(slides.values()))), 2, scale="standard")
    facts = store.slide("a.svs").features("made-up")
    assert facts.shape == (40, DIM)
    embed_slides(store, fitted)
    found = Embeddings.from_store(store)
    for row, x in zip(found.matrix, slides.values(), strict=True):
        expected = Panther().embed(torch.from_numpy(x), fitted).vector[0].numpy()
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)


def test_pictures_and_proportions_are_of_tiles_in_the_scale_of_the_prototypes(tmp_path: Path) -> None:
    x, kind = loud(60)
    store = write_store(tmp_path / "OUT", {"a.svs": x})
    slides = SlideSet.from_store(store.root, "made-up")
    fitted = fit_prototypes(slides, 2, scale="standard")
    assert fitted.scale is not None
    own, distance = assigned_tiles(slides.source, slides.slides[0], fitted)
    assert agreement(kind, own) == 1
    expected = np.linalg.norm((x - fitted.centres[own]) / fitted.scale, axis=1)
    np.testing.assert_allclose(distance, expected, rtol=1e-4)
    np.testing.assert_allclose(survey_slides(slides, fitted).shares[0], np.bincount(own) / 60)


def test_the_scale_is_kept_with_the_prototypes_and_is_part_of_what_they_are(tmp_path: Path) -> None:
    fitted = fit_prototypes(pool_of(loud()[0]), 2, scale="standard")
    fitted.save(tmp_path / "p.zarr")
    read = Prototypes.load(tmp_path / "p.zarr")
    assert read.scale is not None
    np.testing.assert_array_equal(read.scale, fitted.scale)
    assert read.digest == fitted.digest
    assert Prototypes(fitted.centres, fitted.shares, {}, {}).digest != fitted.digest
    plain = fit_prototypes(pool_of(loud()[0]), 2)
    plain.save(tmp_path / "plain.zarr")
    assert Prototypes.load(tmp_path / "plain.zarr").scale is None
    chunk = next(path for path in (tmp_path / "p.zarr" / "scale").rglob("*") if path.is_file() and path.name == "0")
    chunk.write_bytes(chunk.read_bytes()[::-1])
    with pytest.raises(StoreCorruptError):
        Prototypes.load(tmp_path / "p.zarr")


def test_a_constant_feature_is_left_alone() -> None:
    x = loud(50)[0]
    x[:, 4] = 7
    found = scale_of(x, "standard")
    assert found is not None
    assert found[4] == 1
    assert np.isfinite(fit_prototypes(pool_of(x), 2, scale="standard").centres).all()


def test_large_values_lose_no_digits() -> None:
    x = (1e4 + np.random.default_rng(0).normal(0, 0.1, (2000, 2))).astype(np.float32)
    found = scale_of(x, "standard")
    assert found is not None
    np.testing.assert_allclose(found, x.std(0, dtype=np.float64), rtol=1e-5)


def test_the_report_measures_in_the_scale_that_is_asked_for() -> None:
    x, _ = loud()
    standard = report_k(pool_of(x), (2,), repeats=2, scale="standard").rows[0]
    divided = report_k(pool_of((x / x.std(0)).astype(np.float32)), (2,), repeats=2).rows[0]
    assert standard.inertia == pytest.approx(divided.inertia, rel=1e-3)
    assert standard.inertia != pytest.approx(report_k(pool_of(x), (2,), repeats=2).rows[0].inertia, rel=0.1)


@pytest.mark.parametrize("scale", [np.zeros(DIM), np.ones(DIM - 1), np.full(DIM, np.nan)])
def test_a_scale_that_divides_nothing_is_refused(scale: Any) -> None:
    with pytest.raises(UsageError, match="a scale is 5 finite numbers above 0"):
        Prototypes(np.ones((2, DIM), np.float32), np.array([0.5, 0.5]), {}, {}, scale)


def test_another_scale_is_refused() -> None:
    with pytest.raises(UsageError, match="scale is one of none, standard"):
        fit_prototypes(pool_of(loud()[0]), 2, scale="whiten")  # type: ignore[arg-type]
