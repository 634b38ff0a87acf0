"""The pipeline: several encoders in one pass, batches across slides, and where the time went."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from features import (
    EncoderRequest,
    EncoderRunner,
    ExtractOptions,
    FeatureStore,
    encode_slide,
    extract_slides,
    load_encoder,
)
from features.cohort import extract_cohort
from features.custom import ColourMoments
from features.encoder import Encoder, EncoderSpec
from features.runner import EncodedBatch, Encoding
from features.timing import Timing
from tests.features.test_cohort import ENCODER, OPTIONS, codes, slide_file
from tests.features.test_devices import Recorder
from wsi import Slide, Tiling
from wsi.discover import discover
from wsi.errors import UsageError
from wsi.readers.tiff import TiffReader
from wsi.stream import TileJob


class Means(ColourMoments):
    """Mean colours; ``calls`` has the size of each batch, ``fault`` may raise."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []
        self.fault: Any = lambda pixels: None

    def forward(self, pixels: Any) -> Any:
        self.calls.append(len(pixels))
        self.fault(pixels)
        return super().forward(pixels)[:, :3]


def means(name: str = "means") -> tuple[Encoder, Means]:
    spec = EncoderSpec(
        name=name, arch="means", dim=3, input_px=None, resize_px=None, tile_px=64, mpp=None, pooling="pooled",
        key_layout="none",
    )  # fmt: skip
    module = Means()
    return Encoder(spec, module), module


def fail() -> None:
    raise ArithmeticError("enough")


@pytest.fixture
def two_slides(tmp_path: Path) -> Path:
    slide_file(tmp_path / "slides" / "a.tif")
    slide_file(tmp_path / "slides" / "b.tif", seed=1, pieces=2)
    return tmp_path / "slides"


def stored(out: Path, key: str, name: str) -> Any:
    return FeatureStore(out).slide(key).features(name).numpy()


def test_several_encoders_share_one_pass_over_the_pixels(
    two_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[TileJob] = []

    def noted(*arguments: Any) -> TileJob:
        jobs.append(TileJob(*arguments))
        return jobs[-1]

    monkeypatch.setattr("features.pipeline.TileJob", noted)
    report = extract_slides(two_slides, tmp_path / "out", [means()[0], ENCODER], OPTIONS)
    assert codes(report) == {"a.tif": ("done", "OK"), "b.tif": ("done", "OK")}
    assert len(jobs) == 2
    assert all(job.cells_decoded == job.cells_needed > 0 for job in jobs)
    assert report.outcomes[0].facts["encoders"] == {
        "means": {"dim": 3, "n_nonfinite": 0},
        ENCODER: {"dim": 9, "n_nonfinite": 0},
    }
    alone = extract_slides(two_slides, tmp_path / "alone", ENCODER, OPTIONS)
    assert alone.count("done") == 2
    for key in ("a", "b"):
        together = stored(tmp_path / "out", key, ENCODER)
        np.testing.assert_allclose(together, stored(tmp_path / "alone", key, ENCODER), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(together[:, :3], stored(tmp_path / "out", key, "means"), rtol=1e-6)


def test_an_encoder_that_comes_later_runs_alone(two_slides: Path, tmp_path: Path) -> None:
    first, module = means()
    extract_slides(two_slides, tmp_path / "out", first, OPTIONS)
    calls = len(module.calls)
    report = extract_slides(two_slides, tmp_path / "out", [first, ENCODER], OPTIONS)
    assert report.count("done") == 2
    assert len(module.calls) == calls
    assert stored(tmp_path / "out", "a", ENCODER).shape[1] == 9
    assert extract_slides(two_slides, tmp_path / "out", [first, ENCODER], OPTIONS).count("skipped") == 2


def test_encoders_that_stopped_at_different_tiles_each_go_on_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("features.arrays.SHARD_ROWS", 16)
    monkeypatch.setattr("features.writing.SHARD_ROWS", 16)
    monkeypatch.setattr("features.arrays.CHUNK_ROWS", 8)
    slide = slide_file(tmp_path / "a.tif")
    options = ExtractOptions(prepare=OPTIONS.prepare, batch_size=16)
    encoders = {name: means(name) for name in ("one", "two")}

    for name, shards in (("one", 2), ("two", 4)):
        encoder, module = encoders[name]
        module.fault = lambda _, module=module, shards=shards: fail() if len(module.calls) > shards else None
        assert extract_slides(slide, tmp_path / "out", encoder, options).count("failed") == 1
        module.fault = lambda pixels: None
        module.calls.clear()
    told = Recorder()
    both = [encoders["two"][0], encoders["one"][0]]
    report = extract_slides(slide, tmp_path / "out", both, options, observer=told)
    n_tiles = report.outcomes[0].facts["n_tiles"]
    assert report.count("done") == 1
    assert told.tiles == report.timing.tiles == n_tiles - 32
    assert sum(encoders["one"][1].calls) == n_tiles - 32
    assert sum(encoders["two"][1].calls) == n_tiles - 64
    np.testing.assert_allclose(
        stored(tmp_path / "out", "a", "one"), stored(tmp_path / "out", "a", "two"), rtol=1e-5, atol=1e-7
    )


def test_tiles_that_an_error_left_undone_are_not_taken_for_unreadable_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's disk goes away for a while; what is staged then is taken up by the next run."""
    monkeypatch.setattr("features.arrays.SHARD_ROWS", 1)
    monkeypatch.setattr("features.writing.SHARD_ROWS", 1)
    monkeypatch.setattr("features.arrays.CHUNK_ROWS", 1)
    slide = slide_file(tmp_path / "a.tif")
    read = TiffReader.read_stored
    calls: list[int] = []

    def gone(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 20:
            raise OSError("gone")
        return read(self, *arguments)

    options = ExtractOptions(prepare=OPTIONS.prepare, batch_size=16, max_unreadable=1)
    monkeypatch.setattr(TiffReader, "read_stored", gone)
    assert extract_slides(slide, tmp_path / "out", ENCODER, options).count("failed") == 1
    monkeypatch.setattr(TiffReader, "read_stored", read)
    report = extract_slides(slide, tmp_path / "out", ENCODER, options)
    assert report.count("done") == 1
    assert report.outcomes[0].facts["n_unreadable"] == 0


def test_batches_go_over_the_end_of_a_slide(two_slides: Path, tmp_path: Path) -> None:
    encoder, module = means()
    report = extract_slides(two_slides, tmp_path / "out", encoder, OPTIONS)
    assert set(module.calls[:-1]) == {OPTIONS.batch_size}
    assert sum(module.calls) == sum(outcome.facts["n_tiles"] for outcome in report.outcomes)
    for outcome in report.outcomes:
        slide = FeatureStore(tmp_path / "out").slide(outcome.key)
        with Slide.open(two_slides / outcome.slide) as opened:
            expected = encode_slide(opened, slide.grid, means()[0], batch_size=7)
        np.testing.assert_allclose(slide.features("means").numpy(), expected, rtol=1e-5, atol=1e-7)


def test_in_a_shared_batch_only_the_slide_at_fault_fails(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        slide_file(tmp_path / "slides" / f"{name}.tif", seed=seed, width=700, height=500)
    encoder, module = means()
    with_one_batch = ExtractOptions(prepare=OPTIONS.prepare, batch_size=500)
    whole = extract_slides(tmp_path / "slides", tmp_path / "whole", encoder, with_one_batch)
    assert len(module.calls) == 1  # all three slides' tiles at once
    middle = stored(tmp_path / "whole", "b", "means")

    def fault(pixels: Any) -> None:
        colours = pixels.float().mean((1, 2)).numpy() / 255
        if any(np.allclose(row, middle[0], atol=1e-6) for row in colours):
            raise ArithmeticError("bad tile")

    module.fault = fault
    report = extract_slides(tmp_path / "slides", tmp_path / "out", encoder, with_one_batch)
    assert whole.count("done") == 3
    assert codes(report) == {"a.tif": ("done", "OK"), "b.tif": ("failed", "UNEXPECTED"), "c.tif": ("done", "OK")}
    np.testing.assert_allclose(
        stored(tmp_path / "out", "c", "means"), stored(tmp_path / "whole", "c", "means"), rtol=1e-5, atol=1e-7
    )


def test_an_encoder_that_fails_does_not_take_the_other_with_it(two_slides: Path, tmp_path: Path) -> None:
    bad, module = means("bad")
    module.fault = lambda _: fail()
    report = extract_slides(two_slides, tmp_path / "out", [bad, ENCODER], OPTIONS)
    assert {code for _, code in codes(report).values()} == {"UNEXPECTED"}
    for key in ("a", "b"):
        assert FeatureStore(tmp_path / "out").slide(key).encoders == (ENCODER,)


def test_two_encoders_of_one_name_are_refused(two_slides: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 encoders would store their features as colour-stats"):
        extract_slides(two_slides, tmp_path / "out", [ENCODER, ENCODER], OPTIONS)


def test_a_store_of_another_tiling_is_refused(two_slides: Path, tmp_path: Path) -> None:
    """Its slides' tiles would share batches with tiles of another size."""
    store = FeatureStore.create(tmp_path / "out", Tiling(mpp=1.0, tile_px=32))
    with pytest.raises(UsageError, match=r"tile_px=32.*not.*tile_px=64"):
        extract_cohort(discover(two_slides), store, EncoderRunner(means()[0]), OPTIONS)


def test_batches_in_flight_keep_their_pixels_until_their_vectors_have_come(
    two_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the forward pass of a batch runs when its result is asked for, with the next one under way already."""
    extract_slides(two_slides, tmp_path / "plain", ENCODER, OPTIONS)
    under_way: list[int] = []

    class Late(Encoding):
        def result(self) -> EncodedBatch:
            under_way.append(0)
            return EncoderRunner(self.runner.encoder).encode(self.pixels)

    class Flying(EncoderRunner):
        def __init__(self, encoder: Encoder) -> None:
            super().__init__(encoder)
            self.in_flight = 3

        def start(self, pixels: Any) -> Encoding:
            under_way.append(1)
            return Late(self, pixels, [])

    monkeypatch.setattr("features.cohort.EncoderRunner", Flying)
    report = extract_slides(two_slides, tmp_path / "late", ENCODER, OPTIONS)
    assert report.count("done") == 2
    assert under_way[:4] == [1, 1, 1, 0]
    for key in ("a", "b"):
        plain, late = (stored(tmp_path / out, key, ENCODER) for out in ("plain", "late"))
        np.testing.assert_allclose(late, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_what_the_cpu_gives(two_slides: Path, tmp_path: Path) -> None:
    for device in ("cpu", "cuda:0"):
        request = EncoderRequest("timm:resnet10t", random_seed=0, device=device, precision="fp32")
        report = extract_slides(two_slides, tmp_path / device, request, OPTIONS)
        assert report.count("done") == 2
    assert report.timing.peak_gpu_bytes > 0
    for key in ("a", "b"):
        ours, theirs = (stored(tmp_path / out, key, "timm:resnet10t+random0") for out in ("cpu", "cuda:0"))
        np.testing.assert_allclose(theirs, ours, rtol=1e-2, atol=1e-2)


class TestTiming:
    def test_the_parts_of_slides_are_those_of_the_run(self, two_slides: Path, tmp_path: Path) -> None:
        report = extract_slides(two_slides, tmp_path / "out", ENCODER, OPTIONS)
        run = report.timing.facts()
        for key in ("encoder_busy_s", "prepare_s"):
            parts = sum(outcome.facts[key] for outcome in report.outcomes)
            assert parts == pytest.approx(run[key], abs=0.005), key
        assert sum(o.facts["loop_s"] for o in report.outcomes) <= run["loop_s"] + 0.005
        assert run["loop_s"] <= report.seconds
        assert report.timing.tiles == sum(outcome.facts["n_tiles"] for outcome in report.outcomes)
        assert 1e8 < report.timing.peak_bytes < 1e11

    def test_a_runner_that_worked_before_begins_anew(self, two_slides: Path, tmp_path: Path) -> None:
        runner = EncoderRunner(means()[0])
        store = FeatureStore.create(tmp_path / "out", OPTIONS.prepare.tiling)
        runner.busy_s = 1000.0
        report = extract_cohort(discover(two_slides), store, runner, OPTIONS)
        assert 0 < report.timing.encoder_busy_s < report.seconds

    def test_tiles_of_a_slide_that_failed_count_as_far_as_they_went(self, tmp_path: Path) -> None:
        slide = slide_file(tmp_path / "a.tif")
        whole = extract_slides(slide, tmp_path / "whole", ENCODER, OPTIONS).timing.tiles
        bad, module = means()
        module.fault = lambda _: fail()
        report = extract_slides(slide, tmp_path / "out", bad, ExtractOptions(prepare=OPTIONS.prepare, batch_size=4))
        assert report.count("failed") == 1
        assert 0 < report.timing.tiles < whole / 2

    @pytest.mark.parametrize(
        ("timing", "said"),
        [
            (Timing(10, loop_s=10, waited_s=0.2, encoder_busy_s=9.7), "busy 97% of the time"),
            (Timing(10, loop_s=10, waited_s=8, encoder_busy_s=1), "more --read-threads or local disk"),
            (Timing(10, loop_s=10, waited_s=8, encoder_busy_s=1, prepare_s=9), "opening slides and finding tissue"),
            (Timing(10, loop_s=10, waited_s=1, encoder_busy_s=1), "writing is the limit"),
            (Timing(0), "busy 0%"),
        ],
    )
    def test_one_sentence_says_what_the_limit_is(self, timing: Timing, said: str) -> None:
        sentence = timing.sentence(read_threads=2, cores=8)
        assert said in sentence
        assert ("limit" in sentence) == ("limit" in said or "read-threads" in said or "opening" in said)

    def test_several_devices_count_as_one_that_is_as_fast_as_all(self) -> None:
        total = Timing()
        for busy_s in (4.0, 2.0):
            total.add(Timing(100, loop_s=5, encoder_busy_s=busy_s, peak_bytes=int(busy_s)))
        mean = total.over(2)
        assert (mean.tiles_per_s, mean.busy_share, mean.peak_bytes) == (40, 0.6, 4)


def test_a_compiled_network_gives_the_same_vectors() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    spec = EncoderSpec(
        name="small", arch="small", dim=4, input_px=16, resize_px=None, tile_px=16, mpp=None, pooling="pooled"
    )
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain, compiled = (Encoder(spec, network, compiled=compiled) for compiled in (False, True))
    assert (plain.provenance["compiled"], compiled.provenance["compiled"]) == (False, True)
    assert plain.identity == compiled.identity
    np.testing.assert_allclose(
        EncoderRunner(compiled).encode(tiles).vectors, EncoderRunner(plain).encode(tiles).vectors, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(UsageError, match="no network to compile"):
        load_encoder(EncoderRequest(ENCODER, compiled=True))
