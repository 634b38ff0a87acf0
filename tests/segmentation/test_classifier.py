"""Patch classifier: the published shape, kept whole on disk, refusing what it was not made for; and it learns."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from features.encoder import Encoder, EncoderSpec
from features.runner import EncoderRunner
from segmentation.augment import NO_AUGMENTATION, Augmentation
from segmentation.classifier import NetworkOptions, PatchClassifier, PatchFacts
from segmentation.classifier_training import ClassifierEpoch, ClassifierTraining, balanced_loss, train_classifier
from segmentation.clusters import ClusterOptions, PatchClusters, cluster_patches
from segmentation.sampling import AnnotatedSlide, PatchIndex, PatchOptions, index_slide
from tests.segmentation.patches import OPTIONS, PX, slide
from wsi.annotation import Annotation, class_color
from wsi.errors import CohortError, ModelMismatchError, RunMismatchError, UsageError
from wsi.grid import TileGrid, Tiling
from wsi.phantom import Phantom, PhantomSpec

FACTS = PatchFacts(("background", "tumour"), patch_px=PX)
COLOURS = NetworkOptions("colour-stats", frozen=True, hidden=0, dropout=0)
RANDOM = NetworkOptions(random_seed=0)
QUICK = ClassifierTraining(
    epochs=6, patches=256, validation_patches=128, batch_size=32, lr=0.05, device="cpu", augmentation=NO_AUGMENTATION
)


class _Convolution(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _trunk(seed: int = 0) -> Encoder:
    spec = EncoderSpec("small", "small", 6, PX, None, PX, 1.0, "pooled", std=(0.5, 0.5, 0.5))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(spec, _Convolution())


def _pixels(n: int = 5, px: int = PX) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, px, px, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def mobilenet() -> PatchClassifier:
    return PatchClassifier.create(replace(FACTS, patch_px=64), RANDOM).eval()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> PatchIndex:
    folder = tmp_path_factory.mktemp("slides")
    return PatchIndex.of([index_slide(slide(folder, seed), OPTIONS) for seed in range(2)], OPTIONS)


def test_the_published_network_is_mobilenet_v2_with_a_layer_of_100(mobilenet: PatchClassifier) -> None:
    sizes = [(m.in_features, m.out_features) for m in mobilenet.modules() if isinstance(m, nn.Linear)]
    assert sizes == [(1280, 100), (100, 2)]
    assert [m.p for m in mobilenet.head if isinstance(m, nn.Dropout)] == [0.5]
    n_trunk = sum(p.numel() for p in mobilenet.trunk.backbone.parameters())
    assert n_trunk == 2_223_872  # of torchvision's MobileNetV2 at width 1 without its head
    assert all(p.requires_grad for p in mobilenet.parameters())
    white = torch.full((1, 64, 64, 3), 255, dtype=torch.uint8)
    assert (mobilenet.trunk.prepare(white) == 1).all()  # 0 to 1, not normalised further


def test_as_an_encoder_it_gives_the_probabilities_of_its_logits() -> None:
    for options, trunk in ((RANDOM, _trunk()), (COLOURS, COLOURS.load())):
        classifier = PatchClassifier(FACTS, options, trunk, seed=3).eval()
        with torch.no_grad():
            expected = classifier(_pixels()).softmax(1).numpy()
        found = EncoderRunner(classifier.encoder()).encode(_pixels().numpy())
        assert np.allclose(found.vectors, expected, atol=1e-6)
        assert np.ptp(expected[:, 0]) > 1e-5
        before = classifier.sha256
        classifier.encoder(precision="bf16" if options is RANDOM else "fp32")
        assert classifier.sha256 == before  # a copy was cast


@pytest.mark.parametrize("kind", ["mobilenet", "frozen"])
def test_what_is_saved_answers_the_same(kind: str, mobilenet: PatchClassifier, tmp_path: Path) -> None:
    made = mobilenet if kind == "mobilenet" else PatchClassifier.create(FACTS, COLOURS, seed=5).eval()
    made.save(tmp_path / "model.safetensors")
    again = PatchClassifier.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(made(_pixels(px=64)), again(_pixels(px=64)))
    assert (again.facts, again.options, again.sha256) == (made.facts, made.options, made.sha256)
    assert again.facts.colours[1] == class_color("tumour")
    assert not again.training
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    if kind == "frozen":
        assert (tmp_path / "model.safetensors").stat().st_size < 4000  # the head alone


def test_a_damaged_or_foreign_file_is_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    PatchClassifier.create(FACTS, COLOURS).save(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole.replace(b"patch-classifier", b"patch-classifiex")):
        path.write_bytes(damaged)
        with pytest.raises(ModelMismatchError, match=r"model\.safetensors"):
            PatchClassifier.load(path)
    with pytest.raises(ModelMismatchError, match="gone"):
        PatchClassifier.load(tmp_path / "gone.safetensors")


def test_a_frozen_trunk_with_other_weights_is_refused(tmp_path: Path) -> None:
    options = replace(RANDOM, frozen=True)
    made = PatchClassifier.create(FACTS, options)
    next(made.trunk.backbone.parameters()).data += 1
    made.trunk.weights = replace(made.trunk.weights, sha256="other")
    made.save(tmp_path / "model.safetensors")
    with pytest.raises(ModelMismatchError, match="other weights of h2g-mobilenet"):
        PatchClassifier.load(tmp_path / "model.safetensors")


def test_tiles_of_another_resolution_or_size_are_refused() -> None:
    def grid(px: int, mpp: float) -> TileGrid:
        return TileGrid(np.zeros((1, 2), np.int64), px, (px, px), (px, px), (1.0, mpp))

    FACTS.check(grid(PX, 1.04))
    with pytest.raises(RunMismatchError, match=r"16 px at 1 microns per pixel, not 16 px at 1 x 0\.5"):
        FACTS.check(grid(PX, 0.5))
    with pytest.raises(RunMismatchError, match="not 32 px"):
        FACTS.check(grid(32, 1.0))


def test_a_balanced_loss_is_the_mean_of_cell_means() -> None:
    losses = torch.tensor([1.0, 3.0, 10.0, 20.0, 7.0])
    labels, clusters = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 4, 4, 4])
    assert float(balanced_loss(losses, labels, clusters)) == pytest.approx((2 + 10 + 13.5) / 3)


def _curve(index: PatchIndex, options: ClassifierTraining, threads: int = 2) -> tuple[list[ClassifierEpoch], str]:
    classifier = PatchClassifier(FACTS, replace(RANDOM, hidden=8, dropout=0.1), _trunk(), seed=1)
    return list(train_classifier(classifier, index, options, index, threads=threads)), classifier.sha256


def test_training_learns_and_a_seed_repeats_to_the_bit_with_any_number_of_readers(index: PatchIndex) -> None:
    options = replace(QUICK, augmentation=Augmentation(), lr=0.02)
    torch.manual_seed(99)
    expected = torch.rand(1)
    torch.manual_seed(99)
    curve, digest = _curve(index, options)
    assert torch.equal(torch.rand(1), expected)  # whoever calls keeps his own luck
    assert curve[-1].balanced_accuracy > 0.95
    assert curve[-1].validation_loss < 0.5 * curve[0].validation_loss
    assert _curve(index, options, threads=3) == (curve, digest)
    assert _curve(index, replace(options, seed=1))[1] != digest


def test_the_best_weights_are_kept_and_patience_ends_training(index: PatchIndex) -> None:
    classifier = PatchClassifier(FACTS, replace(RANDOM, hidden=0, dropout=0), _trunk(), seed=1)
    digests, curve = [], []
    for epoch in train_classifier(classifier, index, replace(QUICK, lr=30.0, patience=2, epochs=12), index):
        curve.append(epoch)
        digests.append(classifier.sha256)
    best = min(range(len(curve)), key=lambda i: curve[i].validation_loss)
    assert len(curve) == best + 3 < 12
    assert classifier.sha256 == digests[best]


def test_a_frozen_trunk_is_never_touched(index: PatchIndex) -> None:
    classifier = PatchClassifier.create(replace(FACTS, patch_px=PX), replace(RANDOM, frozen=True))
    before = {name: tensor.clone() for name, tensor in classifier.trunk.state_dict().items()}
    head = {name: tensor.clone() for name, tensor in classifier.head.state_dict().items()}
    list(train_classifier(classifier, index, replace(QUICK, epochs=1, patches=32)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.trunk.state_dict().items())
    assert not any(torch.equal(tensor, head[name]) for name, tensor in classifier.head.state_dict().items())


@pytest.mark.parametrize("variant", [{"mine_hard": True}, {"region_share": 0.5}, {"loss": "clusters"}])
def test_every_way_to_sample_and_weigh_trains_and_is_another_one(variant: dict[str, object], index: PatchIndex) -> None:
    clusters = np.random.default_rng(0).integers(0, 3, len(index)).astype(np.int16)
    halved = PatchIndex(
        tuple(replace(each, in_region=each.grid.xy[:, 0] < 128) for each in index.with_clusters(clusters).slides),
        index.names,
    )
    options = replace(QUICK, epochs=3, lr=0.02)
    curve, digest = _curve(halved, replace(options, **variant))  # type: ignore[arg-type]
    assert digest != _curve(halved, options)[1]
    assert curve[-1].validation_loss < curve[0].validation_loss


def test_patches_of_other_classes_or_resolution_are_refused(index: PatchIndex) -> None:
    trained = PatchClassifier.create(PatchFacts(("background", "gland"), patch_px=PX), COLOURS)
    with pytest.raises(RunMismatchError, match="tells background, gland apart"):
        next(train_classifier(trained, index, QUICK))
    coarse = PatchClassifier.create(replace(FACTS, mpp=2.0), COLOURS)
    with pytest.raises(RunMismatchError, match="at 2 microns"):
        next(train_classifier(coarse, index, QUICK))


def test_clusters_are_told_apart_and_numbered_by_how_common_they_are(index: PatchIndex) -> None:
    clustered = cluster_patches(index, COLOURS.load(), ClusterOptions(k=2, sample=200, variance=0.9))
    agree = clustered.clusters == index.labels  # purple and pink; pink is more common, and background
    assert agree.mean() > 0.95
    assert np.bincount(clustered.clusters)[0] > len(index) / 2
    with pytest.raises(CohortError, match="3 patches do not make 10 clusters"):
        PatchClusters.fit(np.zeros((3, 4), np.float32), ClusterOptions())


@pytest.mark.parametrize("wrong", [{"classes": ("background",)}, {"mpp": 0.0}, {"colours": ((1, 2, 3),)}])
def test_facts_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        replace(FACTS, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="nothing to train"):
        PatchClassifier.create(FACTS, replace(COLOURS, frozen=False))


def test_on_phantoms_colours_alone_tell_tumour_far_better_than_chance(tmp_path: Path) -> None:
    options = PatchOptions(("tumour",), Tiling(mpp=1.0, tile_px=32, overlap_px=16, min_tissue=0.5), min_coverage=0.5)
    parts = []
    for seed in (1, 2):
        phantom = Phantom(PhantomSpec(512, 512, mpp=1.0, seed=seed, tissue_fraction=0.6, tumour=0.4))
        path = tmp_path / f"{seed}.png"
        Image.fromarray(phantom.render(0, 0, 512, 512)).save(path)
        tissue = (Annotation(phantom.tissue, "Tissue"),)
        drawn = AnnotatedSlide(path, (Annotation(phantom.tumour, "tumour"),), {}, (1.0, 1.0), tissue)
        parts.append(PatchIndex.of([index_slide(drawn, options)], options))
    classifier = PatchClassifier.create(replace(FACTS, patch_px=32), COLOURS)
    curve = list(train_classifier(classifier, parts[0], replace(QUICK, epochs=10), parts[1]))
    assert curve[-1].balanced_accuracy > 0.8
