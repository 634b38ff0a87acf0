"""Augmentation: lenses are the published ones to the pixel, stains move and nothing else, a seed says all."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segmentation.augment import NO_AUGMENTATION, Augmentation, Lenses, LensOptions, augment, hed_jitter, macenko_jitter
from wsi.errors import UsageError
from wsi.phantom import Phantom, PhantomSpec

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "dru_multi_lens.npz")


@pytest.fixture(scope="module")
def patches() -> np.ndarray:
    phantom = Phantom(PhantomSpec(1024, 1024, mpp=1.0, seed=3, tissue_fraction=0.6))
    return np.stack([phantom.render(384 + 64 * i, 448, 64, 64) for i in range(4)])


def _lenses(case: str) -> Lenses:
    return Lenses(*(GOLDEN[f"{case}/{name}"] for name in ("cx", "cy", "radius", "strength")))


@pytest.mark.parametrize("case", ["a", "b"])
def test_lenses_bend_a_picture_as_the_published_code_does(case: str) -> None:
    assert (_lenses(case).apply(GOLDEN["image"]) == GOLDEN[f"{case}/out"]).all()


def test_a_picture_and_its_map_bend_together() -> None:
    image = GOLDEN["image"]
    lenses = _lenses("a")
    assert (lenses.apply(image[..., 1]) == lenses.apply(image)[..., 1]).all()


def test_lenses_are_drawn_within_what_was_asked() -> None:
    rng = np.random.default_rng(0)
    drawn = [LensOptions(3, (5, 9), (0.1, 0.2)).draw((20, 40), rng) for _ in range(100)]
    radii = np.concatenate([each.radius for each in drawn])
    strengths = np.concatenate([each.strength for each in drawn])
    assert set(radii.tolist()) == {5, 6, 7, 8}
    assert 0.1 <= strengths.min() < 0.11
    assert 0.19 < strengths.max() < 0.2
    assert max(each.cx.max() for each in drawn) == 39
    assert max(each.cy.max() for each in drawn) == 19


def test_nothing_asked_is_nothing_done(patches: np.ndarray) -> None:
    assert (augment(patches, NO_AUGMENTATION, np.random.default_rng(0)) == patches).all()


@pytest.mark.parametrize("jitter", [hed_jitter, macenko_jitter])
def test_no_stain_jitter_leaves_pixels_as_they_are(jitter, patches: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    for patch in patches:
        out = jitter(patch, 0.0, np.random.default_rng(0))
        assert np.abs(out.astype(int) - patch).max() <= 1


@pytest.mark.parametrize("jitter", [hed_jitter, macenko_jitter])
def test_stain_jitter_moves_concentrations_within_its_bounds(jitter, patches: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(1)
    patch = patches[0]
    moved = [np.abs(jitter(patch, 0.1, rng).astype(int) - patch).mean() for _ in range(30)]
    assert min(moved) > 0.3
    assert 4 < np.mean(moved) < 25


def test_two_stains_are_found_in_their_mixtures() -> None:
    rng = np.random.default_rng(2)
    stains = np.array([[0.65, 0.70, 0.29], [0.12, 0.86, 0.46]])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    amounts = rng.uniform(0, 1, (64, 64, 2)) * (rng.random((64, 64, 1)) < 0.9) + 0.1
    patch = np.rint(255 * np.exp(-amounts @ stains)).astype(np.uint8)

    class Stronger:
        """Doubles nothing but the first stain."""

        def uniform(self, low: float, high: float, n: int) -> np.ndarray:
            return np.array([high, 1.0]) if low > 0 else np.zeros(n)

    out = macenko_jitter(patch, 0.5, Stronger())  # type: ignore[arg-type]
    expected = 255 * np.exp(-(amounts * [1.5, 1.0]) @ stains)
    assert np.abs(out - expected).mean() < 3


def test_glass_has_no_stains_to_jitter() -> None:
    glass = np.full((32, 32, 3), 243, np.uint8)
    assert (macenko_jitter(glass, 0.5, np.random.default_rng(0)) == glass).all()


@given(seed=st.integers(0, 1 << 32))
def test_turned_patches_hold_the_same_pixels(seed: int) -> None:
    patch = np.arange(5 * 5 * 3, dtype=np.uint8).reshape(1, 5, 5, 3)
    turned = augment(
        patch, Augmentation(stain="none", hue=0, saturation=0, brightness=(1, 1)), np.random.default_rng(seed)
    )
    wanted = [np.rot90(each, k) for each in (patch[0], patch[0, :, ::-1]) for k in range(4)]
    assert sum((turned[0] == each).all() for each in wanted) == 1


def test_all_eight_turns_come_and_a_seed_says_which() -> None:
    patch = np.arange(5 * 5 * 3, dtype=np.uint8).reshape(1, 5, 5, 3)
    options = Augmentation(lenses=LensOptions(2, (2, 4)))
    plain = Augmentation(stain="none", hue=0, saturation=0, brightness=(1, 1))
    assert len({augment(patch, plain, np.random.default_rng(seed)).tobytes() for seed in range(80)}) == 8
    one, again, other = (augment(patch, options, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert (one == again).all()
    assert (one != other).any()


def test_hue_turns_and_brightness_scales() -> None:
    red = np.full((1, 2, 2, 3), (200, 0, 0), np.uint8)
    options = Augmentation(turns=False, stain="none", hue=0, saturation=0, brightness=(0.5, 0.5))
    assert augment(red, options, np.random.default_rng(0))[0, 0, 0].tolist() == [100, 0, 0]
    hues = Augmentation(turns=False, stain="none", hue=20, saturation=0, brightness=(1, 1))
    seen = {tuple(augment(red, hues, np.random.default_rng(seed))[0, 0, 0].tolist()) for seed in range(200)}
    assert len(seen) == 41  # of 2 degrees each
    assert max(g for _, g, _ in seen) == max(b for _, _, b in seen) == 133  # 40 of 60 degrees to either side


@pytest.mark.parametrize(
    "wrong",
    [{"stain": "vahadane"}, {"stain_sigma": 1.0}, {"hue": 91}, {"brightness": (0, 1)}, {"saturation": -1}],
)
def test_what_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Augmentation(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        LensOptions(0)
    with pytest.raises(UsageError, match="square"):
        augment(np.zeros((1, 4, 5, 3), np.uint8), Augmentation(), np.random.default_rng(0))
