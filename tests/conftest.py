"""What all tests share: where the real data lie, if they are there."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: how fast a test runs says nothing about whether it is right. Under CI the same examples every time, so that a
# change is judged by what it changes; elsewhere new ones, which is how faults are found.
settings.register_profile("project", deadline=None, max_examples=60, derandomize=bool(os.environ.get("CI")))
settings.load_profile("project")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real slides, weights and annotations beside the repository; the test is skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the shared data are not on this machine")
    return folder


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small cascade, which tests leave as it is."""
    from segmentation.train import train  # would load torch for every test
    from tests.segmentation.trained import config, slide

    folder = tmp_path_factory.mktemp("trained-model")
    train([slide(folder, seed) for seed in range(5)], config(), folder / "model")
    return folder / "model"
