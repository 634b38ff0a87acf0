"""Dense path: the map says of every pixel of the tissue what the network says, and lies where it says it lies."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from PIL import Image

import segmentation.dense as module
from features.encoder import Encoder, EncoderRequest, EncoderSpec, build_encoder
from segmentation.dense import (
    DenseConfig,
    DenseLook,
    DenseSegmenter,
    contours_of,
    draw_from,
    over_turns,
    segment_slide,
    train_dense,
)
from segmentation.fit import Example, FitConfig, Fitted, fit
from segmentation.instances import InstanceOptions
from segmentation.losses import IGNORE, SegmentationLoss
from segmentation.objects import find_objects
from segmentation.place import MapPlace
from segmentation.polygons import find_polygons
from segmentation.rows import LabelRows
from segmentation.sampling import AnnotatedSlide
from segmentation.segmenter import Found
from tests.segmentation.trained import save_glands
from wsi.annotation import Annotation
from wsi.errors import ModelMismatchError, ReadError, UsageError
from wsi.readers import ArrayReader, Pixels
from wsi.slide import Slide

CONFIG = DenseConfig(("gland",), mpp=2.0, hyper={"filters": (4, 8), "norm": "batch"}, tile_px=32, overlap_px=8)


def everything(slide: Slide) -> list[Annotation]:
    return [Annotation(shapely.box(0, 0, *slide.size), "Tissue")]


def darkness(x: np.ndarray) -> np.ndarray:
    """(B, 2, h, w): the darker, the likelier."""
    return np.stack([x[:, 0], 1 - x[:, 0]], axis=1)


def slide_of(width: int = 300, height: int = 210) -> Slide:
    pixels = np.full((height, width, 3), 250, np.uint8)
    pixels[40:120, 60:200] = 30
    return Slide.from_array(pixels, mpp=1.0)


def test_the_map_is_what_the_network_says_of_each_pixel_at_its_resolution_up_to_the_slides_edges(
    tmp_path: Path,
) -> None:
    slide = slide_of()
    segmenter = DenseSegmenter.untrained(CONFIG, device="cpu")
    made = segment_slide(segmenter, slide, tmp_path / "map.zarr", tissue=everything(slide), predict=darkness)
    assert made.place == MapPlace((2.0, 2.0), (1.0, 1.0))
    assert made.array.shape == (2, 105, 150)
    assert made.classes == ("background", "gland")
    expected = 1 - slide.thumbnail(150)[..., 0] / 255
    np.testing.assert_allclose(made.probability("gland"), expected, atol=1e-3)
    (piece,) = find_polygons(LabelRows(made.array), made.place, {1: "gland"})
    assert piece.geometry.symmetric_difference(shapely.box(60, 40, 200, 120)).area == 0
    assert made.unreadable == ()
    made.check()
    with pytest.raises(UsageError, match="is there already"):
        segment_slide(segmenter, slide, tmp_path / "map.zarr")


def test_only_tiles_that_touch_tissue_are_seen_and_the_rest_is_nan_and_background(tmp_path: Path) -> None:
    slide = slide_of()
    tissue = [Annotation(shapely.box(60, 40, 90, 60), "Tissue")]
    seen = 0

    def predict(x: np.ndarray) -> np.ndarray:
        nonlocal seen
        seen += len(x)
        return darkness(x)

    segmenter = DenseSegmenter.untrained(CONFIG, device="cpu")
    made = segment_slide(segmenter, slide, tmp_path / "map.zarr", tissue=tissue, predict=predict)
    values = made.probability("gland")
    assert seen == 4  # tiles every 48 px of 64 px: columns from 0 (to 64) and 48, rows from 0 and 48
    scored = ~np.isnan(values)
    assert scored[:56, :56].all()
    assert scored.sum() == 56 * 56
    assert (LabelRows(made.array)[:][~scored] == 0).all()
    assert LabelRows(made.array)[:][25, 35] == 1


def test_a_tile_that_cannot_be_read_is_not_made_up_and_is_counted(tmp_path: Path) -> None:
    class Broken(ArrayReader):
        def read(self, level: int, x: int, y: int, w: int, h: int) -> Pixels:
            if x <= 100 < x + w and y <= 100 < y + h and level == 0:
                raise ReadError("(100, 100) is gone")
            return super().read(level, x, y, w, h)

    whole = slide_of()
    slide = Slide(Broken([whole.reader.read(0, 0, 0, *whole.size)]), name="b", path=None, mpp=whole.mpp)
    segmenter = DenseSegmenter.untrained(CONFIG, device="cpu")
    made = segment_slide(segmenter, slide, tmp_path / "map.zarr", tissue=everything(slide), predict=darkness)
    values = made.probability("gland")
    assert {(x // 48 * 48, y // 48 * 48) for x, y in made.unreadable} == set(made.unreadable)
    assert all(x <= 100 < x + 64 and y <= 100 < y + 64 for x, y in made.unreadable)
    assert len(made.unreadable) > 0
    assert np.isnan(values[50, 50])
    scored = ~np.isnan(values)
    expected = 1 - whole.thumbnail(150)[..., 0] / 255
    np.testing.assert_allclose(values[scored], expected[scored], atol=1e-3)


def test_what_fails_on_the_way_leaves_nothing_behind(tmp_path: Path) -> None:
    def broken(x: np.ndarray) -> np.ndarray:
        raise RuntimeError("no")

    slide = slide_of()
    segmenter = DenseSegmenter.untrained(CONFIG, device="cpu")
    with pytest.raises(RuntimeError, match="no"):
        segment_slide(segmenter, slide, tmp_path / "map.zarr", tissue=everything(slide), predict=broken)
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_slides_height(tmp_path: Path) -> None:
    config = DenseConfig(("gland",), mpp=1.0, hyper={"filters": (4, 4)}, tile_px=64, overlap_px=0)
    segmenter = DenseSegmenter.untrained(config, device="cpu")

    def peak(height: int) -> int:
        slide = Slide.from_array(np.broadcast_to(np.uint8(30), (height, 512, 3)), mpp=1.0)
        tracemalloc.start()
        segment_slide(
            segmenter,
            slide,
            tmp_path / f"{height}.zarr",
            DenseLook(batch_size=8),
            tissue=everything(slide),
            predict=darkness,
        )
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(512)  # what is imported and cached once
    assert peak(6144) < 1.3 * peak(1536)


def test_a_network_trained_on_squares_of_slides_finds_the_glands_of_another(tmp_path: Path) -> None:
    def glands(seed: int) -> tuple[Slide, list[Annotation]]:
        rng = np.random.default_rng(seed)
        pixels = np.full((160, 160, 3), 225, np.uint8)
        truth = []
        for corner in [(10, 20), (70, 90), (100, 15), (20, 100)]:
            x, y = (rng.integers(10, size=2) + corner).tolist()
            pixels[y : y + 40, x : x + 30] = (160, 90, 150)
            truth.append(Annotation(shapely.box(x, y, x + 30, y + 40), "gland"))
        noisy = pixels + rng.normal(0, 20, pixels.shape)
        return Slide.from_array(np.clip(noisy, 0, 255).astype(np.uint8), mpp=2.0), truth

    trained = [glands(0), glands(1)]
    draw = draw_from(trained, CONFIG, tissue=[everything(slide) for slide, _ in trained])
    example = draw(np.random.default_rng(0))
    assert example.image.shape == (32, 32, 3)
    segmenter = DenseSegmenter.untrained(CONFIG, seed=1, device="cpu")
    config = FitConfig(40, 6, 1, 2e-2, schedule="cosine", loss=SegmentationLoss(1, 1))
    fit(segmenter.network, draw, config)
    slide, truth = glands(2)
    made = segment_slide(segmenter, slide, tmp_path / "map.zarr", tissue=everything(slide))
    expected = np.zeros((160, 160), bool)
    for one in truth:
        x0, y0, x1, y1 = (int(v) for v in one.geometry.bounds)
        expected[y0:y1, x0:x1] = True
    found = LabelRows(made.array)[:] == 1
    assert 2 * (found & expected).sum() / (found.sum() + expected.sum()) > 0.95
    segmenter.save(tmp_path / "d.safetensors", fitted=config)
    loaded = DenseSegmenter.load(tmp_path / "d.safetensors", device="cpu")
    x = np.random.default_rng(0).random((1, 3, 32, 32), np.float32)
    np.testing.assert_array_equal(loaded.predict(x), segmenter.predict(x))
    with pytest.raises(ModelMismatchError, match=r"of kind dense, not .* of refinement"):
        from segmentation.refine import Refiner

        Refiner.load(tmp_path / "d.safetensors")


def test_squares_drawn_from_a_slide_hold_pixels_and_truth_of_the_same_place() -> None:
    slide = slide_of()
    truth = [Annotation(shapely.box(60, 40, 200, 120), "gland")]
    draw = draw_from([(slide, truth)], CONFIG, tissue=[everything(slide)])
    rng = np.random.default_rng(3)
    drawn = [draw(rng) for _ in range(80)]
    for example in drawn:
        share = (example.image[..., 0] < 140).astype(int)
        inner = (example.image[..., 0] == 30) | (example.image[..., 0] == 250)
        assert (share == example.mask)[inner].all()
    assert 0.08 < np.mean([e.mask.mean() for e in drawn]) < 0.3  # 0.18 of the slide
    assert len({e.mask.tobytes() for e in drawn}) > 10


def test_what_is_ignored_or_outside_of_chosen_regions_counts_for_nothing_and_squares_lie_around_places_inside() -> None:
    slide = slide_of(320, 320)
    region = shapely.box(40, 40, 200, 280)
    truth = [
        Annotation(shapely.box(60, 40, 200, 120), "gland"),
        Annotation(shapely.box(60, 100, 100, 120), "Ignore*"),
        Annotation(region, "Region*"),
    ]
    draw = draw_from([(slide, truth)], CONFIG, tissue=[everything(slide)])
    rng = np.random.default_rng(0)
    drawn = [draw(rng) for _ in range(100)]
    seen = np.stack([e.mask for e in drawn])
    gland = np.stack([e.image[..., 0] < 140 for e in drawn])
    assert gland[seen == 1].mean() > 0.98  # but for pixels on its border
    assert not gland[seen == 0].any()
    assert (seen == IGNORE).mean() > 0.15  # squares of 64 reach over the edge of a region 160 wide
    middles = seen[:, 15:17, 15:17]
    assert (middles == IGNORE).mean() < 0.08  # of the region, 0.02 is ignored, and pixels straddle its border
    assert {label for mask in seen for label in np.unique(mask)} == {0, 1, IGNORE}


def test_places_are_drawn_evenly_over_the_tissue() -> None:
    height, width = 240, 480
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(height)[:, None], np.arange(width) // 2
    slide = Slide.from_array(pixels, mpp=2.0)
    tissue = [
        Annotation(shapely.box(40, 30, 170, 210), "Tissue"),
        Annotation(shapely.box(300, 100, 430, 190), "Tissue"),
    ]
    draw = draw_from([(slide, [])], CONFIG, tissue=[tissue])
    rng = np.random.default_rng(1)
    middles = np.array([draw(rng).image[16, 16, 1::-1] for _ in range(1500)]) * (2, 1)
    left = middles[:, 0] < 220
    assert left.mean() == pytest.approx(2 / 3, abs=0.04)  # by their areas
    y = middles[left, 1]
    assert (y.min(), y.max()) == (pytest.approx(30, abs=3), pytest.approx(210, abs=3))
    assert np.histogram(y, 4, (30, 210))[0] / len(y) == pytest.approx([0.25] * 4, abs=0.05)


def test_a_network_trained_with_contours_parts_glands_that_touch(tmp_path: Path) -> None:
    def glands(seed: int) -> AnnotatedSlide:
        path = tmp_path / f"{seed}.png"
        truth = save_glands(path, seed)
        return AnnotatedSlide(path, truth, mpp=(2.0, 2.0), tissue=[Annotation(shapely.box(0, 0, 192, 192), "Tissue")])

    config = DenseConfig(
        ("gland",), 2.0, hyper={"filters": (8, 8), "norm": "batch"}, tile_px=32, overlap_px=16, contour_um=6.0
    )
    assert config.labels == {"gland": 1, "contour": 2}
    learning = FitConfig(60, 6, 1, 2e-2, validate_every=30, schedule="cosine", loss=SegmentationLoss(1, 1))
    segmenter, fitted = train_dense([glands(0), glands(1)], config, learning, [glands(2)], device="cpu")
    assert [step for step, _ in fitted.scores] == [30, 60]
    assert fitted.scores[-1][1] > 0.9
    segmenter.save(tmp_path / "d.safetensors", fitted=learning)
    assert DenseSegmenter.load(tmp_path / "d.safetensors").config.labels == config.labels
    unseen = glands(3)
    with unseen.open() as slide:
        made = segment_slide(segmenter, slide, tmp_path / "map.zarr", tissue=unseen.tissue)
    assert made.classes == ("background", "gland", "contour")
    found = list(find_objects(Found.of_map(made), InstanceOptions(min_area_um2=200)))
    assert len(found) == 8
    for one in unseen.annotations:
        best = max(found, key=lambda a: a.geometry.intersection(one.geometry).area).geometry
        assert best.intersection(one.geometry).area / best.union(one.geometry).area > 0.85


def test_the_mean_over_turns_turns_with_the_picture() -> None:
    def leaning(x: np.ndarray) -> np.ndarray:
        return x * np.linspace(0, 1, x.shape[3], dtype=np.float32)

    predict = over_turns(leaning)
    x = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    np.testing.assert_allclose(predict(np.rot90(x, 1, (2, 3)).copy()), np.rot90(predict(x), 1, (2, 3)), atol=1e-6)
    np.testing.assert_allclose(predict(x), x * 0.5, atol=1e-6)  # the ramps of the four turns sum to the same everywhere


def test_rims_of_touching_objects_part_them() -> None:
    place = MapPlace((2.0, 2.0), (0.5, 0.5))
    objects = [Annotation(shapely.box(0, 0, 100, 100), "gland"), Annotation(shapely.box(100, 0, 200, 100), "gland")]
    left, right = contours_of(objects, 5.0, place, "contour")
    assert left.class_name == "contour"
    assert left.geometry.equals(shapely.box(0, 0, 100, 100).difference(shapely.box(10, 10, 90, 90)))
    assert right.geometry.intersection(left.geometry).area == 0
    (thin,) = contours_of([Annotation(shapely.box(0, 0, 8, 8), "gland")], 5.0, place, "contour")
    assert thin.geometry.area == 64


def test_labels_are_read_by_rows_and_unscored_is_background() -> None:
    values = np.array([[[0.1, np.nan]], [[0.7, np.nan]], [[0.2, np.nan]]], np.float16)
    labels = LabelRows(values)
    assert labels.shape == (1, 2)
    assert labels[0:1].tolist() == [[1, 0]]


# Tokens

SPEC = EncoderSpec(
    "tiny", "vit_tiny_patch16_224", 16, 32, None, 32, 1.0, "cls", std=(0.5, 0.5, 0.5),
    arch_kwargs={"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 32, "reg_tokens": 3},
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build_encoder(SPEC, EncoderRequest("tiny", random_seed=0, device="cpu"))


@pytest.mark.parametrize("hidden", [0, 12])
def test_tokens_of_a_frozen_encoder_are_decoded_where_they_lie(encoder: Encoder, hidden: int) -> None:
    config = DenseConfig(("a",), network="tokens", hyper={"hidden": hidden}, tile_px=32, overlap_px=0)
    network = DenseSegmenter.untrained(config, encoder=encoder, device="cpu").network
    x = torch.rand(2, 3, 50, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = network(x).logits
        assert logits.shape == (2, 2, 50, 64)
        torch.testing.assert_close(logits[1:, :, :32, 32:], network(x[1:, :, :32, 32:]).logits, atol=1e-5, rtol=1e-4)
        if hidden == 0:
            tokens = encoder.backbone.forward_features((x[:1, :, :32, :32]) / 0.5)[:, 4:]  # type: ignore[operator]
            coarse = (tokens @ network.decoder.weight[:, :, 0, 0].T).view(1, 4, 4, 2).movedim(3, 1)  # type: ignore[union-attr,index]
            expected = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
            torch.testing.assert_close(logits[:1, :, :32, :32], expected, atol=1e-4, rtol=1e-3)
    network.train()
    before = encoder.weights_sha256
    network(x).logits.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert all(p.grad is None for p in encoder.backbone.parameters())
    assert not encoder.backbone.training
    assert not any(key.startswith("_frozen") or "backbone" in key for key in network.state_dict())
    assert encoder.weights_sha256 == before


def test_a_decoder_is_saved_without_its_encoder_and_answers_only_on_that_one(encoder: Encoder, tmp_path: Path) -> None:
    config = DenseConfig(("a",), network="tokens", tile_px=32, overlap_px=0)
    made = DenseSegmenter.untrained(config, encoder=encoder, seed=4)
    path = tmp_path / "t.safetensors"
    made.save(path)
    assert path.stat().st_size < 4000
    x = np.random.default_rng(0).random((1, 3, 32, 32), np.float32)
    np.testing.assert_array_equal(DenseSegmenter.load(path, encoder=encoder).predict(x), made.predict(x))
    other = build_encoder(SPEC, EncoderRequest("tiny", random_seed=1, device="cpu"))
    with pytest.raises(ModelMismatchError, match="other weights or another encoder"):
        DenseSegmenter.load(path, encoder=other)
    with pytest.raises(UsageError, match=r"was trained on tokens of tiny\+random0; pass that encoder"):
        DenseSegmenter.load(path)
    with pytest.raises(UsageError, match="needs an encoder, and no other does"):
        DenseSegmenter.untrained(config)


def test_what_cannot_be_is_said_in_one_line() -> None:
    with pytest.raises(UsageError, match="no slide to draw"):
        draw_from([], CONFIG)
    with pytest.raises(ValueError, match="different names"):
        DenseConfig(())
    with pytest.raises(ValueError, match="different names"):
        DenseConfig(("gland", "contour"), contour_um=5.0)
    with pytest.raises(ValueError, match="contour_um is positive"):
        DenseConfig(("gland",), contour_um=0.0)
    with pytest.raises(UsageError, match="no slide to draw"):
        train_dense([], CONFIG)
    with pytest.raises(ValueError, match="overlap_px"):
        DenseConfig(("a",), tile_px=8, overlap_px=8)


def test_training_is_judged_by_a_bounded_number_of_squares_from_all_over_the_slides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slide(name: str, shade: int) -> AnnotatedSlide:
        pixels = np.full((240, 480, 3), shade, np.uint8)
        pixels[:, 400:] = shade + 1
        Image.fromarray(pixels).save(tmp_path / name)
        tissue = [Annotation(shapely.box(0, 0, 480, 240), "Tissue")]
        return AnnotatedSlide(tmp_path / name, [], mpp=(2.0, 2.0), tissue=tissue)

    judged: list[Example] = []

    def watched(network: object, draw: object, config: object, validation: list[Example], **named: object) -> Fitted:
        judged.extend(validation)
        return Fitted((0.0,), (), 1)

    monkeypatch.setattr(module, "fit", watched)
    monkeypatch.setattr(module, "_MOST_SQUARES", 9)
    slides = [slide("a.png", 100), slide("b.png", 150)]
    train_dense(slides, CONFIG, FitConfig(1), slides, device="cpu")
    assert len(judged) == 10  # five of the 120 of each
    for shade in (100, 150):
        assert {int(each.image[0, 0, 0]) for each in judged} >= {shade}
    assert {int(each.image[-1, -1, 0]) for each in judged} & {101, 151}


def test_a_network_may_look_at_larger_squares_than_it_was_trained_on_with_the_same_result(tmp_path: Path) -> None:
    assert DenseLook(tile_px=64).of(CONFIG).overlap_px == 32
    assert DenseLook().of(CONFIG) == CONFIG
    assert DenseLook(tile_px=64, overlap_px=0).of(CONFIG).overlap_px == 0
    slide = slide_of()
    segmenter = DenseSegmenter.untrained(CONFIG, device="cpu")
    shapes: list[tuple[int, ...]] = []

    def predict(x: np.ndarray) -> np.ndarray:
        shapes.append(x.shape)
        return darkness(x)

    maps = [
        segment_slide(
            segmenter, slide, tmp_path / f"{number}.zarr", look, tissue=everything(slide), predict=predict
        ).probability("gland")
        for number, look in enumerate((None, DenseLook(64, turns=True, batch_size=2)))
    ]
    np.testing.assert_allclose(maps[0], maps[1], atol=2e-3)
    assert {shape[2:] for shape in shapes} == {(32, 32), (64, 64)}
    assert max(shape[0] for shape in shapes if shape[2] == 64) == 2


def test_training_on_many_slides_holds_few_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: set[int] = set()
    most = 0
    close = Slide.close

    def counting_open(self: AnnotatedSlide) -> Slide:
        nonlocal most
        slide = Slide.open(self.location, mpp=self.mpp)
        opened.add(id(slide))
        most = max(most, len(opened))
        return slide

    def counting_close(self: Slide) -> None:
        opened.discard(id(self))
        close(self)

    monkeypatch.setattr(AnnotatedSlide, "open", counting_open)
    monkeypatch.setattr(Slide, "close", counting_close)
    slides = []
    for number in range(40):
        truth = save_glands(tmp_path / f"{number}.png", number)
        tissue = [Annotation(shapely.box(0, 0, 192, 192), "Tissue")]
        slides.append(AnnotatedSlide(tmp_path / f"{number}.png", truth, mpp=(2.0, 2.0), tissue=tissue))
    train_dense(slides[:38], CONFIG, FitConfig(3, 8, 2), slides[38:], device="cpu")
    assert most <= 33
    assert not opened
