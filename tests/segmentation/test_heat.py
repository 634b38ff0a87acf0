"""Heat maps: every patch's answer at its place, blended where patches overlap, whole on disk or not there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from features.encoder import Encoder, EncoderSpec
from features.runner import EncoderRunner
from segmentation.classifier import PatchFacts
from segmentation.heat import HeatOptions, ProbabilityMap, heat_grid, write_heat
from tests.segmentation.patches import PX, TUMOUR, box, picture
from wsi.errors import ReadError, StoreCorruptError, StoreFormatError, TooCoarseError, UsageError
from wsi.readers.array import ArrayReader
from wsi.readers.base import Pixels
from wsi.resolution import Mpp
from wsi.slide import Slide

FACTS = PatchFacts(("background", "tumour"), patch_px=PX)
ALL = (box(0, 0, 10_000, 10_000, "Tissue"),)


class _Purple(nn.Module):
    """The share of purple pixels."""

    def forward(self, pixels: Tensor) -> Tensor:
        purple = (pixels[..., 0] < 180).float().mean((1, 2))
        return torch.stack([1 - purple, purple], dim=1)


class _Constant(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return torch.tensor([[0.1, 0.9]]).expand(len(pixels), 2)


def _runner(module: nn.Module) -> EncoderRunner:
    return EncoderRunner(Encoder(EncoderSpec("made up", "made up", 2, None, None, PX, 1.0, "pooled"), module))


@pytest.fixture
def slide() -> Slide:
    return Slide.from_array(picture(0), mpp=1.0, name="case.png")


def test_without_overlap_the_map_holds_each_patch_s_answer(slide: Slide, tmp_path: Path) -> None:
    heat = write_heat(tmp_path / "heat.zarr", slide, _runner(_Purple()), FACTS, tissue=ALL)
    found = heat.probability("tumour")
    assert found.shape == (192 // PX, 256 // PX)
    expected = np.zeros(found.shape, np.float32)
    x0, y0, x1, y1 = (int(value) // PX for value in TUMOUR.bounds)
    expected[y0:y1, x0:x1] = 1
    assert np.allclose(found, expected, atol=0.02)
    assert np.allclose(heat.probability("background"), 1 - found, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_model_that_answers_the_same_everywhere_gives_it_everywhere(
    steps: int, batch_size: int, tmp_path: Path
) -> None:
    slide = Slide.from_array(picture(0, (250, 187)), mpp=1.0)  # patches stick out
    options = HeatOptions(steps, batch_size=batch_size)
    heat = write_heat(tmp_path / "heat.zarr", slide, _runner(_Constant()), FACTS, options, tissue=ALL)
    found = heat.probability("tumour")
    stride = PX // steps
    assert found.shape == (-(-187 // stride), -(-250 // stride))
    assert np.allclose(found, 0.9, atol=1e-6)
    assert heat.place.scale == (stride, stride)


def test_overlapping_patches_are_the_weighted_mean_of_those_that_hold_a_pixel(slide: Slide, tmp_path: Path) -> None:
    heat = write_heat(tmp_path / "heat.zarr", slide, _runner(_Purple()), FACTS, HeatOptions(2), tissue=ALL)
    purple = (picture(0)[..., 0] < 180).astype(np.float64)
    patches = np.array([[purple[y : y + PX, x : x + PX].mean() for x in range(0, 241, 8)] for y in range(0, 177, 8)])
    inner = (patches[:-1, :-1] + patches[1:, :-1] + patches[:-1, 1:] + patches[1:, 1:]) / 4  # equal weights of halves
    assert np.allclose(heat.probability("tumour")[1:-1, 1:-1], inner, atol=1e-5)


def test_an_edge_moved_by_a_patch_is_seen(slide: Slide, tmp_path: Path) -> None:
    moved = Slide.from_array(np.roll(picture(0), PX, axis=1), mpp=1.0)
    first, second = (
        write_heat(tmp_path / name, each, _runner(_Purple()), FACTS, tissue=ALL).probability("tumour")
        for name, each in (("a", slide), ("b", moved))
    )
    assert np.allclose(np.roll(first, 1, axis=1), second, atol=1e-6)
    assert not np.allclose(first, second, atol=0.5)


def test_only_tissue_is_looked_at(slide: Slide, tmp_path: Path) -> None:
    tissue = (box(32, 0, 70, 64, "Tissue"),)
    heat = write_heat(
        tmp_path / "heat.zarr", slide, _runner(_Constant()), FACTS, HeatOptions(min_tissue=0.5), tissue=tissue
    )
    scored = ~np.isnan(heat.probability("tumour"))
    expected = np.zeros_like(scored)
    expected[:4, 2:4] = True  # of the column from 64 six of sixteen pixels are tissue
    assert (scored == expected).all()
    assert heat.facts["patches"] == 8
    assert heat.unreadable == ()


class _Torn(ArrayReader):
    def read(self, level: int, x: int, y: int, w: int, h: int) -> Pixels:
        if x <= 100 < x + w and y <= 50 < y + h:
            raise ReadError("torn")
        return super().read(level, x, y, w, h)


def test_what_cannot_be_read_is_not_scored_and_named(tmp_path: Path) -> None:
    slide = Slide(_Torn([picture(0)]), name="torn", path=None, mpp=Mpp(1.0, 1.0, "flag"))
    heat = write_heat(tmp_path / "heat.zarr", slide, _runner(_Constant()), FACTS, tissue=ALL)
    assert np.argwhere(np.isnan(heat.probability("tumour"))).tolist() == [[3, 6]]
    assert heat.unreadable == ((96, 48),)


def test_the_map_lies_on_the_slide_as_tiles_for_qupath(slide: Slide, tmp_path: Path) -> None:
    heat = write_heat(tmp_path / "heat.zarr", slide, _runner(_Purple()), FACTS, HeatOptions(2), tissue=ALL)
    region = heat.heatmap("tumour").region_above(0.5)
    assert region is not None
    assert region.symmetric_difference(TUMOUR).area < 0.05 * TUMOUR.area
    again = ProbabilityMap.open(tmp_path / "heat.zarr")
    assert (again.place, again.frame, again.classes) == (heat.place, slide.frame, FACTS.classes)


def test_a_slide_at_another_magnification_is_cut_at_the_classifier_s(tmp_path: Path) -> None:
    fine = Slide.from_array(np.repeat(np.repeat(picture(0), 2, 0), 2, 1), mpp=0.5)
    coarse = Slide.from_array(picture(0), mpp=1.0)
    one, two = (
        write_heat(tmp_path / name, each, _runner(_Purple()), FACTS, tissue=ALL)
        for name, each in (("a", fine), ("b", coarse))
    )
    assert np.allclose(one.probability("tumour"), two.probability("tumour"), atol=0.01)
    with pytest.raises(TooCoarseError):
        write_heat(tmp_path / "c", Slide.from_array(picture(0), mpp=1.5), _runner(_Purple()), FACTS, tissue=ALL)
    assert not (tmp_path / "c").exists()


def test_a_run_that_fails_leaves_nothing_behind(slide: Slide, tmp_path: Path) -> None:
    class Failing(_Constant):
        def forward(self, pixels: Tensor) -> Tensor:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        write_heat(tmp_path / "heat.zarr", slide, _runner(Failing()), FACTS, tissue=ALL)
    assert list(tmp_path.iterdir()) == []


def test_damage_and_misuse_are_said_in_a_line(slide: Slide, tmp_path: Path) -> None:
    path = tmp_path / "heat.zarr"
    heat = write_heat(path, slide, _runner(_Purple()), FACTS, tissue=ALL)
    with pytest.raises(UsageError, match="is there already"):
        write_heat(path, slide, _runner(_Purple()), FACTS, tissue=ALL)
    with pytest.raises(UsageError, match="no class 'gland'; there are background, tumour"):
        heat.probability("gland")
    with pytest.raises(UsageError, match="2 numbers for 3 classes"):
        three = PatchFacts(("background", "a", "b"), patch_px=PX)
        write_heat(tmp_path / "other", slide, _runner(_Purple()), three, tissue=ALL)
    chunk = next(file for file in (path / "probability" / "c").rglob("*") if file.is_file())
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(bytes(content))
    with pytest.raises(StoreCorruptError, match=r"heat\.zarr"):
        heat.probability("tumour")
    chunk.unlink()
    with pytest.raises(StoreCorruptError, match="0 pixels are there of 192"):
        heat.probability("tumour")
    with pytest.raises(StoreFormatError, match="gone"):
        ProbabilityMap.open(tmp_path / "gone")


def test_patches_are_read_from_the_level_that_has_their_resolution() -> None:
    pixels = np.full((512, 512, 3), 120, np.uint8)
    opened = Slide(
        ArrayReader([pixels, pixels[::2, ::2], pixels[::4, ::4]]), name="a", path=None, mpp=Mpp(0.25, 0.25, "flag")
    )
    assert heat_grid(opened, FACTS, HeatOptions(), ALL).level == 2  # 0.25 microns, times four
