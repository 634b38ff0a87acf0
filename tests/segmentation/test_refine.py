"""Refinement: what it is given is what the paper gives it, it learns, and what is saved answers as what was trained."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely

from segmentation.fit import Example, FitConfig, as_input, fit, mean_dice
from segmentation.losses import IGNORE, SegmentationLoss
from segmentation.models import build_network
from segmentation.place import MapPlace
from segmentation.prior import Prior
from segmentation.refine import ExportedRefiner, RefineConfig, Refiner, example_of, refine, slide_picture, train_refiner
from segmentation.saved import save_network
from wsi.annotation import Annotation
from wsi.errors import ModelMismatchError, UsageError
from wsi.slide import Slide

TINY = RefineConfig(("tumour",), hyper={"filters": (4, 8, 8), "norm": "batch"}, side_px=32)
FAST = FitConfig(
    steps=60, batch_size=4, accumulate=1, learning_rate=1e-2, validate_every=20, loss=SegmentationLoss(1.0, 0.5)
)


def slide_of(width: int = 160, height: int = 96) -> Slide:
    """White, with a dark red rectangle from (40, 24) to (120, 72)."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[24:72, 40:120] = (150, 40, 80)
    return Slide.from_array(pixels, mpp=2.0)


def heat_of(slide: Slide, value: float = 1.0) -> Prior:
    """Coarse and wrong: a square of 32 level-0 pixels on the left of the rectangle."""
    values = np.zeros((1, 3, 5), np.float32)
    values[0, 1, 1] = value
    return Prior(values, MapPlace((32.0, 32.0), slide.mpp.xy))


def draw(rng: np.random.Generator) -> Example:
    """A dark square is tumour where the heat map says something near; another dark square is not."""
    image = np.full((32, 32, 3), 240, np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    heat = np.zeros((1, 32, 32), np.float32)
    y, x = rng.integers(2, 20, 2)
    if rng.random() < 0.7:
        image[y : y + 10, x : x + 10] = 90
        if rng.random() < 0.7:
            mask[y : y + 10, x : x + 10] = 1
            heat[0, y - 2 : y + 12, x - 2 : x + 12] = 0.8
    return Example(image, heat, mask)


def test_the_picture_is_the_whole_slide_in_a_square_and_its_pixels_lie_where_they_say() -> None:
    slide = slide_of()
    image, place = slide_picture(slide, TINY)
    assert image.shape == (32, 32, 3)
    assert place.scale == (5.0, 3.0)
    assert tuple(image[16, 16]) == (150, 40, 80)
    assert (image[9:23, 9:23] == (150, 40, 80)).all()
    assert (image[:7] == 255).all()
    assert (image[:, 25:] == 255).all()


def test_an_example_holds_picture_heat_and_truth_at_the_same_places() -> None:
    slide = slide_of()
    truth = [Annotation(shapely.box(40, 24, 120, 72), "tumour"), Annotation(shapely.box(0, 0, 9, 9), "other")]
    example = example_of(slide, heat_of(slide), truth, TINY)
    dark = example.image[..., 1] < 100
    assert np.array_equal(dark, example.mask == 1)
    y, x = (float((example.heat[0].sum(axis) * (np.arange(32) + 0.5)).sum()) for axis in (1, 0))
    assert x / example.heat.sum() == pytest.approx(48 / 5, abs=0.05)
    assert y / example.heat.sum() == pytest.approx(48 / 3, abs=0.05)


def test_the_network_sees_colours_over_255_and_probabilities_as_they_are() -> None:
    slide, seen = slide_of(), []

    def predict(x: np.ndarray) -> np.ndarray:
        seen.append(x)
        return np.stack([1 - x[:, 3], x[:, 3]], axis=1)

    found = refine(ExportedRefiner(TINY, predict), slide, heat_of(slide, 0.9))
    (x,) = seen
    assert x.shape == (1, 4, 32, 32)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x[0, :3, 16, 16], np.array([150, 40, 80]) / 255)
    assert found.classes == {1: "tumour"}
    np.testing.assert_array_equal(found.labels, x[0, 3] > 0.5)
    assert x[0, 3].sum() * found.place.pixel_um2 == pytest.approx(0.9 * (32 * 2.0) ** 2, rel=0.02)


@pytest.mark.parametrize("overlap_px", [0, 8, 20])
def test_tiles_are_blended_so_that_what_all_agree_on_is_what_comes_out(overlap_px: int) -> None:
    slide = slide_of(190, 130)
    config = RefineConfig(("tumour",), hyper=TINY.hyper, side_px=24, mpp=4.0, overlap_px=overlap_px)
    found = refine(ExportedRefiner(config, lambda x: np.stack([1 - x[:, 0], x[:, 0]], 1)), slide, heat_of(slide))
    image, place = slide_picture(slide, config)
    assert found.place == place
    assert found.place.scale == (2.0, 2.0)
    assert found.probabilities.shape == (2, 65, 95)
    np.testing.assert_allclose(found.probabilities[1], image[..., 0] / 255, atol=1e-6)


def test_training_beats_the_rough_map_and_repeats_to_the_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    validation = [draw(rng) for _ in range(12)]
    refiner, fitted = train_refiner(draw, TINY, FAST, validation, device="cpu")
    rough = sum(2 * ((e.heat[0] > 0.5) & (e.mask == 1)).sum() for e in validation) / sum(
        (e.heat[0] > 0.5).sum() + (e.mask == 1).sum() for e in validation
    )
    found = mean_dice(refiner.network, validation)
    assert 0.6 < rough < 0.75
    assert found > 0.9
    assert found == max(score for _, score in fitted.scores) == dict(fitted.scores)[fitted.best_step]
    again, _ = train_refiner(draw, TINY, FAST, validation, device="cpu")
    x = as_input([validation[0].image], [validation[0].heat])
    np.testing.assert_array_equal(refiner.predict(x), again.predict(x))
    refiner.save(tmp_path / "r.safetensors", fitted=FAST)
    loaded = Refiner.load(tmp_path / "r.safetensors", device="cpu")
    assert loaded.config.classes == ("tumour",)
    np.testing.assert_array_equal(loaded.predict(x), refiner.predict(x))
    again.save(tmp_path / "again.safetensors", fitted=FAST)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "r.safetensors").read_bytes()


def test_examples_of_other_sizes_become_squares_and_what_is_added_counts_for_nothing() -> None:
    tiles = RefineConfig(("tumour",), hyper=TINY.hyper, side_px=16, mpp=4.0, overlap_px=4)
    seen: list[Example] = []

    def wide(rng: np.random.Generator) -> Example:
        seen.append(
            Example(np.zeros((10, 40, 3), np.uint8), np.zeros((1, 10, 40), np.float32), np.ones((10, 40), np.uint8))
        )
        return seen[-1]

    config = FitConfig(steps=1, batch_size=2, accumulate=2)
    train_refiner(wide, tiles, config, [wide(np.random.default_rng())], device="cpu")
    train_refiner(wide, TINY, config, device="cpu")
    assert len(seen) == 1 + 4 + 4
    from segmentation.refine import _fitted

    cut = _fitted(seen[0], tiles, np.random.default_rng(0))
    assert (cut.mask[:10] == 1).all()
    assert (cut.mask[10:] == IGNORE).all()


def test_turning_turns_picture_heat_and_truth_alike() -> None:
    rng = np.random.default_rng(1)
    mask = rng.integers(0, 200, (5, 5)).astype(np.uint8)
    example = Example(np.stack([mask] * 3, 2), mask[None].astype(np.float32), mask)
    ways = set()
    for quarters in range(4):
        for mirrored in (False, True):
            turned = example.turned(quarters, mirrored)
            assert np.array_equal(turned.image[..., 0], turned.mask)
            assert np.array_equal(turned.heat[0], turned.mask)
            ways.add(turned.mask.tobytes())
    assert len(ways) == 8


def test_training_keeps_the_best_weights_and_stops_without_better_ones() -> None:
    network = build_network("u-net", 4, 2, filters=(4, 4), norm="batch")
    truth = [Example(np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8), np.float32), np.zeros((8, 8), np.uint8))]
    config = FitConfig(steps=50, batch_size=1, accumulate=1, validate_every=1, patience=3, learning_rate=1e-9)
    fitted = fit(network, lambda rng: truth[0], config, truth)
    assert fitted.best_step == 1
    assert len(fitted.losses) == 4
    assert not network.training


def test_what_cannot_be_is_said_in_one_line(tmp_path: Path) -> None:
    slide = slide_of()
    refiner = Refiner.untrained(TINY, device="cpu")
    two = Prior(np.zeros((2, 3, 5), np.float32), MapPlace((32.0, 32.0), slide.mpp.xy))
    with pytest.raises(UsageError, match="2 channels; the network wants one for each of tumour"):
        refine(refiner, slide, two)
    with pytest.raises(ValueError, match="different names"):
        RefineConfig(("a", "a"))
    with pytest.raises(ValueError, match="overlap_px"):
        RefineConfig(("a",), side_px=8, mpp=4.0, overlap_px=8)
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(ModelMismatchError, match="cannot be used as a network"):
        Refiner.load(tmp_path / "no.safetensors")
    save_network(tmp_path / "other.safetensors", "dense", {}, refiner.network)
    with pytest.raises(ModelMismatchError, match=r"of kind dense, not .* of refinement"):
        Refiner.load(tmp_path / "other.safetensors")
    save_network(tmp_path / "bad.safetensors", "refinement", {"config": {"classes": ["a"]}}, refiner.network)
    with pytest.raises(ModelMismatchError, match="cannot be used as a refinement network"):
        Refiner.load(tmp_path / "bad.safetensors", device="cpu")
    with pytest.raises(ValueError, match="image, heat and mask"):
        Example(np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 5), np.float32), np.zeros((4, 4), np.uint8))


def test_a_network_that_sees_no_map_is_given_the_picture_alone_and_looks_at_no_map(tmp_path: Path) -> None:
    slide, seen = slide_of(), []
    config = replace(TINY, heat=False)

    def predict(x: np.ndarray) -> np.ndarray:
        seen.append(x)
        return np.stack([x[:, 1], 1 - x[:, 1]], axis=1)

    for heat in (None, heat_of(slide)):
        found = refine(ExportedRefiner(config, predict), slide, heat)
        assert found.labels[16, 16] == 1
        assert found.labels[0, 0] == 0
    assert [x.shape for x in seen] == [(1, 3, 32, 32)] * 2
    np.testing.assert_array_equal(seen[0], seen[1])
    example = example_of(slide, None, [Annotation(shapely.box(40, 24, 120, 72), "tumour")], config)
    assert example.heat.shape == (0, 32, 32)
    assert np.array_equal(example.image[..., 1] < 100, example.mask == 1)
    with pytest.raises(UsageError, match="this network sees a probability map beside the picture"):
        refine(ExportedRefiner(TINY, predict), slide, None)
    with pytest.raises(UsageError, match="give the first stage's"):
        example_of(slide, None, [], TINY)


def test_a_network_that_sees_no_map_learns_from_pictures_and_is_saved_as_such(tmp_path: Path) -> None:
    def alone(rng: np.random.Generator) -> Example:
        image = np.full((32, 32, 3), 240, np.uint8)
        mask = np.zeros((32, 32), np.uint8)
        y, x = rng.integers(2, 20, 2)
        image[y : y + 10, x : x + 10], mask[y : y + 10, x : x + 10] = 90, 1
        return Example(image, np.empty((0, 32, 32), np.float32), mask)

    validation = [alone(np.random.default_rng(seed)) for seed in range(6)]
    for config in (replace(TINY, heat=False), replace(TINY, heat=False, mpp=1.0, overlap_px=0)):
        refiner, fitted = train_refiner(alone, config, replace(FAST, steps=40), validation, device="cpu")
        assert max(score for _, score in fitted.scores) > 0.9
    refiner.save(tmp_path / "r.safetensors")
    assert Refiner.load(tmp_path / "r.safetensors", device="cpu").config.heat is False


def test_an_exported_network_knows_what_the_saved_one_does_and_says_what_it_is_told(tmp_path: Path) -> None:
    refiner = Refiner.untrained(replace(TINY, heat=False, mpp=4.0, overlap_px=8), device="cpu")
    refiner.save(tmp_path / "r.safetensors")
    exported = ExportedRefiner.of_file(tmp_path / "r.safetensors", refiner.predict)
    loaded = Refiner.load(tmp_path / "r.safetensors", device="cpu")
    assert exported.config == loaded.config
    one, other = (refine(each, slide_of(), None).probabilities for each in (exported, loaded))
    np.testing.assert_array_equal(one, other)
    save_network(tmp_path / "bad.safetensors", "refinement", {"config": {"sides": 3}}, refiner.network)
    for name, said in (("bad", "cannot be used as a refinement network"), ("none", "cannot be used as a network")):
        with pytest.raises(ModelMismatchError, match=said):
            ExportedRefiner.of_file(tmp_path / f"{name}.safetensors", refiner.predict)
