"""Several devices: one queue, the same features, and processes that die."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features import EncoderRequest, FeatureStore, extract_slides
from features.devices import devices_of
from tests.features.test_cohort import OPTIONS, codes, slide_file, stained
from tests.wsi.test_readers import write_tiff
from wsi.errors import MissingWeightsError, UsageError

TWICE = "cpu,cpu"  # two processes, as on two GPUs


class Recorder:
    """An observer that counts."""

    def __init__(self) -> None:
        self.tiles = 0
        self.finished: list[str] = []

    def started(self, sources: int, total_bytes: int) -> None: ...

    def slide_started(self, source: Any, tiles: int, first: int) -> None: ...

    def tiles_done(self, source: Any, count: int) -> None:
        self.tiles += count

    def slide_finished(self, source: Any, outcome: Any) -> None:
        self.finished.append(source.relpath)


def plugin(folder: Path, code: str) -> str:
    path = folder / "plugin.py"
    path.write_text("import os, torch\nfrom pathlib import Path\n" + textwrap.dedent(code))
    return f"{path}:build"


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*devices: str) -> list[str]:
        return devices_of([EncoderRequest("colour-stats", device=device) for device in devices])

    assert asked("cpu") == ["cpu"]
    assert asked("cuda:0, cuda:2") == ["cuda:0", "cuda:2"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert asked("cuda", "cuda") == ["cuda:0", "cuda:1", "cuda:2"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert asked("cuda") == ["cuda"]
    with pytest.raises(UsageError, match="cpu and cuda"):
        asked("cpu", "cuda")


def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    for seed, name in enumerate(["a.tif", "x/b.tif", "c.tif", "d.tif"]):
        slide_file(tmp_path / "slides" / name, seed=seed)
    (tmp_path / "slides" / "broken.svs").write_text("<html>")
    one = extract_slides(tmp_path / "slides", tmp_path / "one", "colour-stats", OPTIONS)
    told = Recorder()
    request = EncoderRequest("colour-stats", device=TWICE)
    two = extract_slides(tmp_path / "slides", tmp_path / "two", request, OPTIONS, observer=told)
    assert codes(one) == codes(two)
    assert sorted(told.finished) == ["a.tif", "broken.svs", "c.tif", "d.tif", "x/b.tif"]
    assert told.tiles == two.timing.tiles == one.timing.tiles > 0
    stores = FeatureStore(tmp_path / "one"), FeatureStore(tmp_path / "two")
    for slide in stores[0]:
        ours, theirs = (store.slide(slide.key).features("colour-stats").numpy() for store in stores)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)  # batches hold other neighbours
    assert not list((tmp_path / "two" / ".locks").iterdir())


def test_a_process_that_dies_is_replaced_and_the_slide_that_kills_it_is_named(tmp_path: Path) -> None:
    """One slide's colours make the encoder crash, as a segmentation fault would; the others all get through."""
    for seed in range(3):
        slide_file(tmp_path / "slides" / f"{seed}.tif", seed=seed)
    write_tiff(tmp_path / "slides" / "deadly.tif", stained(seed=9)[..., ::-1], mpp=1.0)
    name = plugin(
        tmp_path,
        """
        class Crashes(torch.nn.Module):
            def forward(self, pixels):
                x = pixels.float().mean((1, 2))
                if (x[:, 0] < x[:, 2] - 10).any() and pixels.shape[1] == 64:
                    os._exit(7)
                return x
        def build():
            return Crashes()
        """,
    )
    request = EncoderRequest(name, device=TWICE)
    report = extract_slides(tmp_path / "slides", tmp_path / "out", request, OPTIONS)
    outcomes = codes(report)
    assert outcomes.pop("deadly.tif") == ("failed", "WORKER_DIED")
    assert "died 2 times (exit code 7)" in next(o.message for o in report.outcomes if o.slide == "deadly.tif")
    assert outcomes == {f"{seed}.tif": ("done", "OK") for seed in range(3)}  # also what was at work beside it


def test_what_no_process_can_do_ends_the_run(tmp_path: Path) -> None:
    slide_file(tmp_path / "slides" / "a.tif")
    request = EncoderRequest("uni", weights=None, offline=True, device=TWICE)
    with pytest.raises(MissingWeightsError):
        extract_slides(tmp_path / "slides", tmp_path / "out", request, OPTIONS)
