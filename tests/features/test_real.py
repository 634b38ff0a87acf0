"""Real slides: the stored features are those of an independent script, and nothing readable is left out."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import timm
import torch
from torchvision.transforms import v2

from features import ExtractOptions, FeatureStore, PrepareOptions, extract_slides
from features.encoder import EncoderRequest
from wsi import Tiling

ROOT = Path(__file__).parents[2]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "mpp"), [("cmu-1-small-region.svs", 0.5), ("1065626.svs", 1.0), ("philips_cmu1.tiff", 1.0)]
)
def test_features_equal_an_independent_script(shared: Path, tmp_path: Path, name: str, mpp: float) -> None:
    weights = tmp_path / "weights.pt"
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=0).eval()
    torch.save(model.state_dict(), weights)
    options = ExtractOptions(prepare=PrepareOptions(tiling=Tiling(mpp=mpp, tile_px=224, min_tissue=0.5)))
    request = EncoderRequest("timm:resnet18", weights=weights, device="cpu")
    extract_slides(shared / "slides" / name, tmp_path / "out", request, options)
    stored = FeatureStore(tmp_path / "out").slide(name)

    slide = openslide.OpenSlide(shared / "slides" / name)
    side = 224 * round(mpp / float(slide.properties["openslide.mpp-x"]))
    transform = v2.Compose([
        v2.Resize(235, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    expected = []
    for x, y in stored.grid.xy.tolist():
        pixels = np.asarray(slide.read_region((x, y), 0, (side, side)).convert("RGB"))
        small = torch.from_numpy(cv2.resize(pixels, (224, 224), interpolation=cv2.INTER_AREA)).permute(2, 0, 1)
        with torch.inference_mode():
            expected.append(model(transform(small)[None])[0].numpy())
    slide.close()
    assert len(expected) > 2
    np.testing.assert_allclose(stored.features("timm:resnet18").numpy(), expected, atol=1e-4)


@pytest.mark.shared
def test_the_folder_of_real_slides_ends_as_it_should(shared: Path, tmp_path: Path) -> None:
    report = extract_slides(shared / "slides", tmp_path / "out", "colour-stats")
    codes = {outcome.slide: outcome.code for outcome in report.outcomes}
    readable = {"1065626.svs", "cmu-1-small-region.svs", "glas_composite_testB.tif", "glas_composite_train.tif"}
    readable |= {"leica_cmu1.scn", "philips_cmu1.tiff"}
    readable |= {slide for slide in codes if slide.startswith("dicom-cmu-1-small/")}
    assert len(readable) == 7
    assert {slide for slide, code in codes.items() if code == "OK"} == readable
    assert codes["edge-cases/unreadable.svs"] == "READ_FAILED"
    assert codes["fluorescence-dapi.ndpi"] == "UNSUPPORTED_PIXEL"
    assert codes["edge-cases/boxes.png"] == "MPP_MISSING"
    assert codes["dicom-camelyon-jpeg.dcm"] == "MPP_IMPLAUSIBLE"
    assert not {"UNEXPECTED", "ERROR"} & set(codes.values())
    assert report.exit_code == 3
    leica = next(o for o in report.outcomes if o.slide == "leica_cmu1.scn")
    assert leica.facts["slide_mpp_estimated"]
    again = extract_slides(shared / "slides", tmp_path / "out", "colour-stats")
    assert again.count("done", "empty") == 0
    assert FeatureStore(tmp_path / "out").verify(deep=True) == []


@pytest.mark.shared
def test_the_example_plug_in_keeps_what_the_network_knows(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    command = [
        sys.executable,
        "benchmarks/glas_probe.py",
        "--quick",
        "--shared",
        str(shared),
        "--json",
        str(tmp_path / "f"),
    ]
    subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True)
    trained, random, _ = (figure["value"] for figure in json.loads((tmp_path / "f").read_text())["figures"])
    assert trained > 0.9
    assert trained > random + 0.1
