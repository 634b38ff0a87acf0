"""TrainConfig: checks itself, goes to JSON and back, and refuses what it does not know."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mil.config import TrainConfig
from wsi.errors import UsageError


@given(
    st.builds(
        TrainConfig,
        folds=st.integers(2, 9),
        lr=st.floats(1e-6, 1.0),
        tile_dropout=st.floats(0, 0.99),
        loss=st.sampled_from(["auto", "focal"]),
        calibrate=st.sampled_from(["auto", False]),
        task_weights=st.dictionaries(st.text(), st.floats(0.1, 9), max_size=2),
        hyper=st.dictionaries(st.text(min_size=1), st.integers() | st.text() | st.booleans(), max_size=3),
        seed=st.integers(0, 2**40),
    )
)
def test_settings_go_to_json_and_back(config: TrainConfig) -> None:
    assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fold": 3}, "unknown setting 'fold'; did you mean 'folds'"),
        ({"zzz": 3}, "unknown setting 'zzz'; there are model"),
        ({"folds": 1}, "folds is a whole number from 2, not 1"),
        ({"folds": 2.5}, "folds is a whole number"),
        ({"epochs": True}, "epochs is a whole number"),
        ({"lr": 0}, "lr is a number from 0"),
        ({"lr": "fast"}, "lr is a number"),
        ({"tile_dropout": 1.0}, "tile_dropout is a number from 0 to below 1"),
        ({"loss": "hinge"}, "loss is one of auto, cross_entropy"),
        ({"members": 6, "inner": 5}, "6 members need as many parts"),
        ({"calibrate": True}, "with inner 1 there are none; set inner to 5, or calibrate to auto"),
        ({"calibrate": 1, "inner": 5}, "calibrate is auto, true or false, not 1"),
        ({"loss": "cox", "batch_size": 1}, "batch_size must be at least 2"),
        ([], "a JSON object is needed"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_the_way_out(tmp_path: Path, values: Any, message: str) -> None:
    import json

    path = tmp_path / "c.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UsageError, match=message) as error:
        TrainConfig.read(path)
    assert str(error.value).startswith(str(path))


def test_a_file_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        TrainConfig.read(tmp_path / "none.json")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(UsageError, match="no JSON"):
        TrainConfig.read(tmp_path / "c.json")


def test_few_bags_get_small_batches_and_more_epochs() -> None:
    plain = TrainConfig()
    assert plain.pace(766) == (16, 48, 48, 15)
    assert plain.pace(48) == (4, 12, 12, 40)
    assert plain.pace(3).batch_size == 2  # some losses compare the bags of a batch
    assert TrainConfig(epochs=3, batch_size=10, accumulate=2).pace(48) == (10, 5, 3, 3)
