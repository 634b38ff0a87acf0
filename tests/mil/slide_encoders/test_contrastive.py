"""Training a slide encoder: it learns what slides of a kind have in common, repeats to the bit and goes on after a kill."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.store import FeatureStore
from mil.slide_encoders import COBRA, SlideEncoderRequest, load_slide_encoder
from mil.slide_encoders.contrastive import (
    SlideTrainConfig,
    TrainingEpoch,
    _Views,
    train_slide_encoder,
)
from mil.sources import StoreSource
from tests.mil import made_up
from wsi.errors import CohortError, NotExtractedError, RunMismatchError, UsageError

KINDS, TILES, DIM = 4, 60, 16
QUICK = SlideTrainConfig(
    width=32, layers=1, heads=2, attention_dim=16, state=8, channels=16, hidden=64, projection=16, dropout=0.0,
    tiles=30, epochs=40, warmup_epochs=2, batch_size=16, lr=0.05, weight_decay=0.01, momentum=0.9, device="cpu", seed=1,
)  # fmt: skip


def slides(n: int, seed: int = 0) -> dict[str, Any]:
    """Tiles alike in all slides, wide apart, but for a tenth: those lie in a direction that slides of a kind share."""
    rng = np.random.default_rng(seed)
    made = {}
    for i in range(n):
        x = 2 * rng.normal(size=(TILES, DIM)).astype(np.float32)
        x[: TILES // 10] = 6 * np.eye(DIM)[i % KINDS] + 0.3 * rng.normal(size=(TILES // 10, DIM))
        made[f"s{i:03d}.svs"] = rng.permutation(x)
    return made


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """32 slides of four kinds with features of two encoders: the other's are turned, and have some noise."""
    rng = np.random.default_rng(5)
    first = slides(32)
    turn = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0][:, :12].astype(np.float32)
    other = {name: (x @ turn + 0.1 * rng.normal(size=(TILES, 12))).astype(np.float32) for name, x in first.items()}
    made_up.write_store(tmp_path / "OUT", first, encoder="one")
    made_up.write_store(tmp_path / "OUT", other, encoder="two")
    return FeatureStore(tmp_path / "OUT")


def purity(store: FeatureStore, encoder: Any, name: str) -> float:
    """How often the slide that is nearest by cosine is of the same kind."""
    source = StoreSource(store, [name])
    vectors = torch.stack([encoder.encode(source.read(key)).vector for key in store.keys])
    vectors = torch.nn.functional.normalize(vectors - vectors.mean(0))
    near = (vectors @ vectors.T - 2 * torch.eye(len(vectors))).argmax(1).numpy()
    kinds = np.arange(len(vectors)) % KINDS
    return float((kinds[near] == kinds).mean())


def test_slides_of_a_kind_come_together(store: FeatureStore) -> None:
    torch.manual_seed(0)
    arguments = {
        name: getattr(QUICK, name) for name in ("width", "layers", "heads", "attention_dim", "state", "channels")
    }
    untrained = COBRA((12, DIM), **arguments)
    curve: list[TrainingEpoch] = []
    trained = train_slide_encoder(store, ["one", "two"], QUICK, done=curve.append)
    for name in ("one", "two"):
        before, after = purity(store, untrained, name), purity(store, trained.encoder, name)
        assert after >= 0.9, (name, before, after)
        assert before <= 0.7, (name, before, after)
    assert curve[-1].loss < curve[0].loss - 0.1
    assert len(curve) == QUICK.epochs
    source = StoreSource(store, ["one"])
    bag = source.read(store.keys[1])
    telling = bag.features[:, 1] > 4  # of the second kind
    attention = trained.encoder.encode(bag).attention[0]
    assert attention[telling].mean() > 3 * attention[~telling].mean()


SHORT = replace(QUICK, epochs=6, checkpoint_epochs=2)


def state(loaded: Any) -> dict[str, torch.Tensor]:
    return dict(loaded.encoder.state_dict())


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(value, state(other)[key]) for key, value in state(one).items())


def test_the_same_seed_gives_the_same_bits_and_another_others(store: FeatureStore) -> None:
    luck = torch.get_rng_state()
    one = train_slide_encoder(store, ["one", "two"], SHORT)
    assert torch.equal(torch.get_rng_state(), luck)
    torch.manual_seed(77)
    np.random.seed(77)
    assert same(one, train_slide_encoder(store, ["one", "two"], SHORT))
    assert not same(one, train_slide_encoder(store, ["one", "two"], replace(SHORT, seed=2)))


@pytest.mark.parametrize("killed_after", [1, 2, 5])
def test_a_killed_run_goes_on_to_the_same_bits(store: FeatureStore, tmp_path: Path, killed_after: int) -> None:
    whole = train_slide_encoder(store, ["one", "two"], SHORT, out=tmp_path / "whole")

    def kill(epoch: TrainingEpoch) -> None:
        if epoch.epoch == killed_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_slide_encoder(store, ["one", "two"], SHORT, out=tmp_path / "cut", done=kill)
    again: list[TrainingEpoch] = []
    resumed = train_slide_encoder(store, ["one", "two"], SHORT, out=tmp_path / "cut", done=again.append)
    assert [epoch.epoch for epoch in again] == list(range(killed_after // 2 * 2 + 1, 7))
    assert same(whole, resumed)
    files = {name: (tmp_path / run / name).read_bytes() for run in ("whole", "cut") for name in ("curve.csv",)}
    assert files["curve.csv"] == (tmp_path / "whole" / "curve.csv").read_bytes()
    assert (tmp_path / "cut" / "encoder.safetensors").read_bytes() == (
        tmp_path / "whole" / "encoder.safetensors"
    ).read_bytes()
    assert not (tmp_path / "cut" / "checkpoint.pt").exists()


def test_what_was_trained_is_loaded_from_its_file_and_not_trained_again(store: FeatureStore, tmp_path: Path) -> None:
    made = train_slide_encoder(store, ["one", "two"], SHORT, out=tmp_path / "run", name="ours")
    loaded = load_slide_encoder(SlideEncoderRequest(str(tmp_path / "run" / "encoder.safetensors"), device="cpu"))
    assert loaded.spec == made.spec
    assert loaded.identity == made.identity
    assert [(tile.encoder, tile.dim) for tile in loaded.spec.tiles] == [("one", DIM), ("two", 12)]
    assert same(loaded, made)
    epochs: list[Any] = []
    again = train_slide_encoder(store, ["one", "two"], SHORT, out=tmp_path / "run", name="ours", done=epochs.append)
    assert same(again, made)
    assert epochs == []


def test_a_folder_with_another_run_is_left_alone(store: FeatureStore, tmp_path: Path) -> None:
    train_slide_encoder(store, ["one"], replace(SHORT, epochs=1), out=tmp_path / "run")
    before = (tmp_path / "run" / "encoder.safetensors").read_bytes()
    with pytest.raises(RunMismatchError, match="other config"):
        train_slide_encoder(store, ["one"], SHORT, out=tmp_path / "run")
    with pytest.raises(RunMismatchError, match="other features"):
        train_slide_encoder(store, ["two"], replace(SHORT, epochs=1), out=tmp_path / "run")
    made_up.write_store(store.root, {"new.svs": np.ones((9, DIM), np.float32)}, encoder="one")
    with pytest.raises(RunMismatchError, match="other patients, cohort"):
        train_slide_encoder(store, ["one"], replace(SHORT, epochs=1), out=tmp_path / "run")
    assert (tmp_path / "run" / "encoder.safetensors").read_bytes() == before


def test_views_are_of_two_slides_of_a_patient_and_of_at_most_half_their_tiles(store: FeatureStore) -> None:
    sources = [StoreSource(store, [name]) for name in ("one", "two")]
    keys = list(store.keys)
    patients = [keys[i : i + 2] for i in range(0, 10, 2)]
    views = _Views(sources, patients, replace(SHORT, batch_size=4, tiles=1000))
    read: list[str] = []
    for source in sources:
        whole = source.read
        source.read = lambda slide, whole=whole: read.append(slide) or whole(slide)  # type: ignore[method-assign, func-returns-value, misc]
    sizes, widths = [], set()
    for epoch in range(20):
        for one, other in views.batches(np.random.default_rng(epoch)):
            assert len(one) == len(other) >= 2
            sizes.append(len(one))
            widths |= {(one.features.shape[-1], other.features.shape[-1])}
            assert one.mask.sum(1).max() <= TILES // 2
    assert sum(sizes) == 20 * len(patients)
    assert widths == {(a, b) for a in (12, DIM) for b in (12, DIM)}
    assert set(read) == {slide for slides in patients for slide in slides}


def test_three_patients_in_batches_of_two_are_never_alone(store: FeatureStore) -> None:
    views = _Views([StoreSource(store, ["one"])], [[key] for key in store.keys[:3]], replace(SHORT, batch_size=2))
    assert [len(one) for one, _ in views.batches(np.random.default_rng(0))] == [3]


def test_what_cannot_be_trained_on_is_said(store: FeatureStore) -> None:
    with pytest.raises(UsageError, match="at least one"):
        train_slide_encoder(store, [], SHORT)
    with pytest.raises((CohortError, NotExtractedError), match="three"):
        train_slide_encoder(store, ["three"], SHORT)
    with pytest.raises(CohortError, match="1 patients have features of one"):
        train_slide_encoder(store, ["one"], SHORT, patients=dict.fromkeys(store.keys, "same"))


@pytest.mark.parametrize(
    "wrong", [{"tiles": 0}, {"batch_size": 1}, {"lr": 0.0}, {"momentum": 1.5}, {"precision": "fp8"}]
)
def test_settings_without_a_meaning_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        replace(QUICK, **wrong)
