"""Embedding a store by a slide encoder, in Python and from the command line."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cli import run as cli_run
from cli.main import wsi
from features.embedding import StoredEmbedding
from features.store import FeatureStore
from features.weights import WeightsRecord
from mil.bag import Bag
from mil.prototypes import Embeddings
from mil.slide_encoders import CHIEF, COBRA, LoadedSlideEncoder, SlideEncoderSpec, save_slide_encoder
from mil.slide_encoders.embedding import EncodeOptions, encode_slides, remarks
from mil.slide_encoders.zoo import TileFeatures
from mil.sources import StoreSource
from tests.mil import made_up
from wsi.errors import UsageError

DIM, WIDE = 8, 10


def cobra(seed: int = 0, mpp: float | None = None) -> LoadedSlideEncoder:
    torch.manual_seed(seed)
    made = COBRA((DIM,), width=16, heads=2, attention_dim=4, layers=1, state=4, channels=8).eval()
    spec = SlideEncoderSpec("ours", "cobra", (TileFeatures("one", DIM),), dim=None, mpp=mpp, tile_px=256)
    return LoadedSlideEncoder(spec, made, WeightsRecord("file", f"digest {seed}"))


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    rng = np.random.default_rng(0)
    for name, width in (("one", WIDE), ("two", 5)):
        slides = {f"s{i}.svs": rng.normal(size=(9 + i, width)).astype(np.float32) for i in range(3)}
        made_up.write_store(tmp_path / "OUT", slides, encoder=name)
    made_up.write_store(tmp_path / "OUT", {"only-two.svs": np.ones((4, 5), np.float32)}, encoder="two")
    made_up.write_store(tmp_path / "OUT", {"empty.svs": np.ones((0, WIDE), np.float32)}, encoder="one")
    return FeatureStore(tmp_path / "OUT")


def test_every_slide_with_features_gets_the_vector_of_its_bag(store: FeatureStore) -> None:
    told: list[str] = []
    loaded = cobra()
    report = encode_slides(store, loaded, EncodeOptions("one"), done=lambda key, outcome: told.append(outcome))
    assert sorted(told) == ["done"] * 3 + ["left out"] * 2
    assert sorted(left.reason for left in report.left_out) == ["no features of one", "no tiles"]
    found = Embeddings.from_store(store, "ours-one")
    assert found.slides == report.done
    source = StoreSource(store, ["one"])
    for key, vector in zip(found.slides, found.matrix, strict=True):
        bag = source.read(key)
        expected = loaded.encoder.encode(Bag(bag.features[:, :DIM])).vector  # of wider vectors the first
        np.testing.assert_array_equal(vector, expected.numpy())
    assert found.facts["slide_encoder"] == loaded.identity
    assert not store.verify(deep=True)


def test_what_is_there_is_not_made_again_and_never_mixed_with_another(store: FeatureStore) -> None:
    encode_slides(store, cobra(), EncodeOptions("one"))
    before = Embeddings.from_store(store, "ours-one").matrix
    again = encode_slides(store, cobra(), EncodeOptions("one"))
    assert (len(again.done), len(again.skipped)) == (0, 3)
    other = encode_slides(store, cobra(seed=1), EncodeOptions("one"))
    assert [failure.code for failure in other.failed] == ["ENCODER_CHANGED"] * 3
    np.testing.assert_array_equal(Embeddings.from_store(store, "ours-one").matrix, before)
    replaced = encode_slides(store, cobra(seed=1), EncodeOptions("one", replace=True))
    assert len(replaced.done) == 3
    assert np.abs(Embeddings.from_store(store, "ours-one").matrix - before).max() > 1e-4


def test_weights_of_one_encoder_average_the_features_of_another(store: FeatureStore) -> None:
    loaded = cobra()
    report = encode_slides(store, loaded, EncodeOptions("one", average="two"))
    assert len(report.done) == 3
    found = Embeddings.from_store(store, "ours-one+two")
    assert store.embeddings == (StoredEmbedding("ours-one+two", "ours", ("one", "two"), 5, 3),)
    weighed, averaged = (StoreSource(store, [name]).read(found.slides[0]) for name in ("one", "two"))
    attention = loaded.encoder.encode(Bag(weighed.features[:, :DIM])).attention[0]
    np.testing.assert_allclose(found.matrix[0], (attention @ averaged.features).numpy(), atol=1e-6)


def test_a_pair_is_for_cobra_and_vectors_have_to_fit(store: FeatureStore) -> None:
    chief = CHIEF(WIDE, hidden=8, attention_dim=4)
    loaded = LoadedSlideEncoder(cobra().spec, chief, WeightsRecord("file", "digest"))
    with pytest.raises(UsageError, match="only COBRA"):
        encode_slides(store, loaded, EncodeOptions("one", average="two"))
    with pytest.raises(UsageError, match="takes tile vectors of length 8, not 5"):
        encode_slides(store, cobra(), EncodeOptions("two"))


def test_other_tiles_than_it_was_trained_on_are_remarked_on(store: FeatureStore) -> None:
    assert remarks(store, cobra(), EncodeOptions("one")) == ()
    of_encoder, of_mpp = remarks(store, cobra(mpp=1.0), EncodeOptions("two"))
    assert "trained on features of one, not of two" in of_encoder
    assert "tiles of 1 mpp; these have 0.5" in of_mpp


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def call(*words: Any) -> Any:
        monkeypatch.setattr(sys, "argv", ["wsi", *map(str, words)])
        code = cli_run._run(wsi, "wsi")
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_from_training_to_vectors_on_the_command_line(store: FeatureStore, tmp_path: Path, command: Any) -> None:
    run = tmp_path / "own"
    words = ["slide-encoder", "train", store.root, "--encoder", "one", "--out", run, "--epochs", 2, "--width", 64]
    code, out, err = command(*words, "--device", "cpu")
    assert (code, err) == (0, "")
    assert re.search(r"epoch 2 of 2: loss [0-9.]+, found \d+%", out)
    assert "own: trained on 3 patients" in out
    made = (run / "encoder.safetensors").read_bytes()
    assert command(*words, "--device", "cpu")[0] == 0
    assert (run / "encoder.safetensors").read_bytes() == made
    code, out, _ = command(
        "slide-encoder", "embed", store.root, "--model", run / "encoder.safetensors", "--encoder", "one"
    )
    assert code == 0
    assert "own-one: 3 slides embedded, 0 there already, 2 left out" in out
    assert Embeddings.from_store(store, "own-one").matrix.shape == (3, WIDE)
    code, _, err = command(*words, "--device", "cpu", "--seed", 3)
    assert code == 2
    assert err.startswith("RUN_MISMATCH")


def test_the_commands_say_what_is_missing(store: FeatureStore, tmp_path: Path, command: Any) -> None:
    code, out, _ = command("slide-encoder", "list")
    assert code == 0
    assert all(name in out for name in ("cobra-2", "madeleine", "chief", "virchow2"))
    code, _, err = command("slide-encoder", "embed", store.root, "--model", "chief", "--encoder", "one")
    assert code == 5
    assert err.startswith("MODEL_MISSING: chief: its weights are not on the Hugging Face hub")
    file = tmp_path / "ours.safetensors"
    save_slide_encoder(file, cobra().encoder, cobra().spec, {})
    code, _, err = command("slide-encoder", "embed", store.root, "--model", file)
    assert code == 2
    assert "say which with --encoder" in err


def test_slides_that_cannot_be_read_are_named_and_the_others_done(
    store: FeatureStore, tmp_path: Path, command: Any
) -> None:
    file = tmp_path / "ours.safetensors"
    save_slide_encoder(file, cobra().encoder, cobra().spec, {})
    victim = store.slide("s1.svs")
    shard = next((victim.encoder_path("one") / "features" / "c").rglob("0"))
    shard = shard if shard.is_file() else next(path for path in shard.rglob("*") if path.is_file())
    shard.write_bytes(shard.read_bytes()[:-9])
    code, out, _ = command("slide-encoder", "embed", store.root, "--model", file, "--encoder", "one")
    assert code == 3
    assert "s1.svs: FAILED, STORE_CORRUPT" in out
    assert "2 slides embedded" in out
