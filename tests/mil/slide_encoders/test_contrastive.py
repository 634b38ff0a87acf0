"""Training a slide encoder: it learns what slides of a kind have in common, repeats to the bit and goes on after a kill."""

import shutil
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

KINDS, TILES, DIM, OTHER_DIM = 4, 80, 16, 20
QUICK = SlideTrainConfig(
    width=32, layers=1, heads=1, attention_dim=32, state=8, channels=16, hidden=64, projection=16, dropout=0.0, tiles=40,
    epochs=80, warmup_epochs=2, batch_size=32, lr=0.2, weight_decay=0.01, momentum=0.9, device="cpu", seed=1,
)  # fmt: skip


def slides(n: int, seed: int = 0) -> dict[str, Any]:
    """Tiles of eight common sorts, each of which may point either way, but for a tenth: those are of the slide's kind.

    The mean over all tiles says little of the kind, as the common ones outweigh it by chance.
    """
    rng = np.random.default_rng(seed)
    made = {}
    for i in range(n):
        x = 0.3 * rng.normal(size=(TILES, DIM)).astype(np.float32)
        x[np.arange(TILES), rng.integers(8, 16, TILES)] += 8 * rng.choice([-1, 1], TILES)
        x[: TILES // 10] = 4 * np.eye(DIM)[i % KINDS] + 0.3 * rng.normal(size=(TILES // 10, DIM))
        made[f"s{i:03d}.svs"] = rng.permutation(x)
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """24 slides of four kinds with features of two encoders: the other's are turned, and have some noise."""
    rng = np.random.default_rng(5)
    first = slides(24)
    turn = np.linalg.qr(rng.normal(size=(OTHER_DIM, DIM)))[0].T.astype(np.float32)
    other = {k: (x @ turn + 0.1 * rng.normal(size=(TILES, OTHER_DIM))).astype(np.float32) for k, x in first.items()}
    root = tmp_path_factory.mktemp("contrastive") / "OUT"
    made_up.write_store(root, first, encoder="one")
    made_up.write_store(root, other, encoder="two")
    return FeatureStore(root)


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
    names = ("width", "layers", "heads", "attention_dim", "state", "channels")
    untrained = COBRA((DIM, OTHER_DIM), **{name: getattr(QUICK, name) for name in names})
    curve: list[TrainingEpoch] = []
    trained = train_slide_encoder(store, ["one", "two"], QUICK, done=curve.append).encoder
    before = [purity(store, untrained, name) for name in ("one", "two")]
    after = [purity(store, trained, name) for name in ("one", "two")]
    assert np.mean(before) < 0.5, before
    assert np.mean(after) > 0.7, after
    assert curve[-1].loss < curve[0].loss - 0.5
    assert [epoch.epoch for epoch in curve] == list(range(1, QUICK.epochs + 1))
    source = StoreSource(store, ["one"])
    weights = []
    for kind, key in enumerate(store.keys[:KINDS]):
        bag = source.read(key)
        telling = bag.features[:, kind] > 3
        attention = trained.encode(bag).attention[0]
        weights.append(float(attention[telling].mean() / attention[~telling].mean()))
    assert np.mean(weights) > 1.5, weights


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


@pytest.mark.parametrize("killed_after", [1, 5])
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
    for name in ("curve.csv", "encoder.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "cut" / "checkpoint.pt").exists()


def test_what_was_trained_is_loaded_from_its_file_and_not_trained_again(store: FeatureStore, tmp_path: Path) -> None:
    made = train_slide_encoder(store, ["one", "two"], SHORT, out=tmp_path / "run", name="ours")
    loaded = load_slide_encoder(SlideEncoderRequest(str(tmp_path / "run" / "encoder.safetensors"), device="cpu"))
    assert loaded.spec == made.spec
    assert loaded.identity == made.identity
    assert [(tile.encoder, tile.dim) for tile in loaded.spec.tiles] == [("one", DIM), ("two", OTHER_DIM)]
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
    larger = shutil.copytree(store.root, tmp_path / "larger")
    made_up.write_store(larger, {"new.svs": np.ones((9, DIM), np.float32)}, encoder="one")
    with pytest.raises(RunMismatchError, match="other patients, cohort"):
        train_slide_encoder(larger, ["one"], replace(SHORT, epochs=1), out=tmp_path / "run")
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
    assert widths == {(a, b) for a in (DIM, OTHER_DIM) for b in (DIM, OTHER_DIM)}
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
