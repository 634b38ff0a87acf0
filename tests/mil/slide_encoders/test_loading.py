"""Loading slide encoders: by name with the authors' file, or one's own; and what is said where that cannot be."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.zoo import ALIASES, ZOO
from mil.bag import Bag
from mil.slide_encoders import (
    COBRA,
    KINDS,
    SLIDE_ZOO,
    SlideEncoderRequest,
    SlideEncoderSpec,
    load_slide_encoder,
    save_slide_encoder,
)
from mil.slide_encoders.loading import find_slide_encoder
from mil.slide_encoders.zoo import SLIDE_ALIASES, TileFeatures
from tests.mil import golden
from tests.mil.golden import assert_near, number
from wsi.errors import MissingWeightsError, ModelMismatchError, UnknownEncoderError, UnsafePickleError


def published(path: Path, file: str = "cobra", tag: str = "cobra2_like", wrap: Any = lambda state: state) -> Path:
    state = {name: torch.from_numpy(np.array(value)) for name, value in golden.state(file, tag).items()}
    torch.save(wrap(state), path)
    return path


def test_every_row_is_of_a_known_kind_and_every_name_means_one_row() -> None:
    assert all(row.kind in KINDS for row in SLIDE_ZOO.values())
    names = [*SLIDE_ZOO, *(alias for row in SLIDE_ZOO.values() for alias in row.aliases)]
    assert len(set(names)) == len(names)
    assert all(find_slide_encoder(alias.upper()).name == name for alias, name in SLIDE_ALIASES.items())
    tiles = {tile.encoder for row in SLIDE_ZOO.values() for tile in row.tiles}
    assert {"uni", "virchow2", "h-optimus-0"} <= tiles & ZOO.keys()
    assert not tiles & ALIASES.keys()  # an alias would never be found again
    assert all(row.hub_id or row.fetch_from for row in SLIDE_ZOO.values())


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_a_published_file_gives_the_published_vector(tmp_path: Path, wrap: Any) -> None:
    request = SlideEncoderRequest("COBRA2", weights=published(tmp_path / "x.bin", wrap=wrap), device="cpu")
    loaded = load_slide_encoder(request)
    vector = loaded.encoder.encode(Bag(number("bags", "x_64x32_clustered"))).vector
    assert_near(vector, number("cobra", "cobra2_like/feats"))
    assert loaded.spec.name == "cobra-2"
    assert loaded.weights.source == "file"
    assert not any(parameter.requires_grad for parameter in loaded.encoder.parameters())


def test_equal_weights_have_equal_identities_whatever_file_they_came_in(tmp_path: Path) -> None:
    files = [
        published(tmp_path / "a.bin"),
        published(tmp_path / "b.bin", wrap=lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}),
        published(tmp_path / "c.bin", tag="cobra1_like"),
    ]
    one, same, other = (load_slide_encoder(SlideEncoderRequest("cobra", weights=f)).identity for f in files)
    assert one == same != other


def test_an_encoder_of_ones_own_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    torch.manual_seed(5)
    made = COBRA((8, 6), width=16, heads=2, attention_dim=4, layers=1, state=4, channels=8, top_k=3).eval()
    tiles = (TileFeatures("a", 8), TileFeatures("b", 6))
    spec = SlideEncoderSpec("ours", "cobra", tiles, dim=None, mpp=0.5, tile_px=256)
    for name in ("one", "two"):
        save_slide_encoder(tmp_path / f"{name}.safetensors", made, spec, {"seed": 5})
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    before = torch.get_rng_state()
    loaded = load_slide_encoder(SlideEncoderRequest(str(tmp_path / "one.safetensors"), device="cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.spec == spec
    bag = Bag(torch.randn(9, 6))
    for ours, theirs in zip(loaded.encoder.encode(bag), made.encode(bag), strict=True):
        assert torch.equal(ours, theirs)


def test_of_longer_vectors_the_class_token_is_taken_and_strange_ones_are_remarked_on(tmp_path: Path) -> None:
    loaded = load_slide_encoder(SlideEncoderRequest("cobra", weights=published(tmp_path / "x.bin")))
    assert loaded.tiles_of("virchow2", 2560) == (1280, ())
    assert loaded.tiles_of("Virchow_2", 1280) == (1280, ())
    width, (remark,) = loaded.tiles_of("my-own", 32)
    assert width == 32
    assert "ctranspath or uni or virchow2 or h-optimus-0, not of my-own" in remark


def test_what_is_missing_is_named_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeightsError, match=r"hf download KatherLab/COBRA pytorch_model.bin.*--weights FILE"):
        load_slide_encoder(SlideEncoderRequest("cobra", offline=True))
    with pytest.raises(MissingWeightsError, match=r"github.com/hms-dbmi/CHIEF.*--weights FILE"):
        load_slide_encoder(SlideEncoderRequest("chief", offline=True))
    with pytest.raises(MissingWeightsError, match="wsi slide-encoder train"):
        load_slide_encoder(SlideEncoderRequest(str(tmp_path / "none.safetensors")))
    with pytest.raises(UnknownEncoderError, match="did you mean madeleine"):
        load_slide_encoder(SlideEncoderRequest("madelaine"))


def test_the_file_of_another_model_is_refused_and_named(tmp_path: Path) -> None:
    file = published(tmp_path / "x.bin")
    with pytest.raises(ModelMismatchError, match=r"x\.bin.*is it the file of madeleine"):
        load_slide_encoder(SlideEncoderRequest("madeleine", weights=file))
    fake = tmp_path / "x.safetensors"
    fake.write_bytes(file.read_bytes())
    with pytest.raises(ModelMismatchError, match="--model NAME --weights"):
        load_slide_encoder(SlideEncoderRequest(str(fake)))


class _Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("went-off",)


def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.bin").write_bytes(pickle.dumps({"state_dict": _Bomb()}))
    with pytest.raises((UnsafePickleError, ModelMismatchError)):
        load_slide_encoder(SlideEncoderRequest("cobra", weights=tmp_path / "x.bin"))
    assert not (tmp_path / "went-off").exists()
