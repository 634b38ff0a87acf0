"""Stored examples: what was saved is what is drawn, and a folder is whole or not there."""

from pathlib import Path

import numpy as np
import pytest

from segmentation.examples import StoredExamples, save_example
from segmentation.fit import Example


def example(seed: int, channels: int = 2) -> Example:
    rng = np.random.default_rng(seed)
    return Example(
        rng.integers(0, 256, (6, 4, 3), dtype=np.uint8),
        rng.random((channels, 6, 4), np.float32),
        rng.integers(0, 3, (6, 4), dtype=np.uint8),
    )


def same(one: Example, other: Example) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("image", "heat", "mask"))


@pytest.mark.parametrize("channels", [0, 2])
def test_what_was_saved_comes_back_and_is_not_held_in_memory(channels: int, tmp_path: Path) -> None:
    folders = [tmp_path / str(seed) for seed in range(3)]
    for seed, folder in enumerate(folders):
        save_example(folder, example(seed, channels))
    stored = StoredExamples(folders)
    assert len(stored) == 3
    assert all(same(stored[seed], example(seed, channels)) for seed in range(3))
    assert [same(found, example(2 - i, channels)) for i, found in enumerate(stored[::-1])] == [True] * 3
    assert isinstance(stored[0].image, np.memmap)


def test_every_example_is_drawn_as_often_as_any_other_and_a_seed_repeats(tmp_path: Path) -> None:
    folders = [tmp_path / str(seed) for seed in range(3)]
    for seed, folder in enumerate(folders):
        save_example(folder, example(seed))
    stored, rng = StoredExamples(folders), np.random.default_rng(0)
    drawn = [stored.draw(rng).image.tobytes() for _ in range(300)]
    assert min(drawn.count(example(seed).image.tobytes()) for seed in range(3)) > 70
    again = np.random.default_rng(0)
    assert [stored.draw(again).image.tobytes() for _ in range(10)] == drawn[:10]


def test_an_example_that_is_not_written_to_its_end_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = np.save

    def full(path: Path, values: np.ndarray) -> None:
        if path.name == "mask.npy":
            raise OSError(28, "no space left")
        save(path, values)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="no space left"):
        save_example(tmp_path / "a", example(0))
    assert list(tmp_path.iterdir()) == []
